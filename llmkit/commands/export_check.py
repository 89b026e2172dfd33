"""Whether an exported model computes elsewhere what it computes here: the library it is for opens it and is compared.

``transformers`` reads both formats, GGUF by dequantising it. Everything is computed in fp32 on the CPU, so that what is
left between two readings of one file is the order of sums. One model is in memory at a time.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmkit.errors import CheckpointError, ConfigError, DataError
from llmkit.interfaces import IGNORE_INDEX, Batch, ModelConfig, Tokenizer, Tokens
from llmkit.models.hf import load_config, load_model
from llmkit.tokenizers.chat_template import ChatTemplate
from llmkit.tokenizers.load import load_tokenizer

ROWS, COLUMNS, SEED = 2, 32, 1  # of the ids whose logits are compared
PROMPT, NEW_TOKENS = 16, 32  # of the greedy text
SUMMING = 1e-4  # of the largest logit: what another order of sums may change
# Of the spread of the logits, root mean square: what rounded weights may change. Two unrelated models differ by 1.4.
ROUNDING = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.3, "q8_0": 0.3}
TEXTS = (
    "The cat sat on the mat.",
    "  two spaces, then\na new line\n\n\tand a tab",
    "Naïve café — “quotes” 123,456.78",
    "def f(x):\n    return x ** 2  # code",
    "東京は晴れ。 Привет, мир! שלום 🙂👍🏽",
    "a" * 50,
    "",
)
_USER = {"role": "user", "content": "What is 2 + 2?"}
_ANSWER = {"role": "assistant", "content": "It is 4."}
CHATS = (
    [_USER],
    [_USER, _ANSWER, {"role": "user", "content": "  And 3 + 3?\n"}],
    [{"role": "system", "content": "You are brief."}, _USER, _ANSWER],
)

log = logging.getLogger("llmkit.export")


@dataclass(frozen=True)
class Exported:
    """What was written, and what there is to compare it with."""

    folder: Path
    file: str | None  # the GGUF file in the folder; None for a Hugging Face folder
    dtype: str
    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None
    source_BTV: Tensor  # logits of the model before its numbers were rounded

    @property
    def model(self) -> Path:
        return self.folder if self.file is None else self.folder / self.file


class Finding(NamedTuple):
    """One comparison, in words."""

    name: str
    result: str


class Reading(NamedTuple):
    """What the target's library makes of the files."""

    library: str
    logits_BTV: Tensor
    start_id: int | None  # what the greedy text of an encoder-decoder begins with
    new_ids: list[int]  # greedy; none of an encoder


def check_export(exported: Exported) -> list[Finding]:
    """Compare the files with the model they were made from. Raises ``CheckpointError`` where they differ from it."""
    load_config(exported.model)  # without its config transformers builds a model of billions of weights
    theirs = None
    if exported.config.hf_architecture() is None:
        findings = [Finding("opened by", "llmkit only: no Hugging Face architecture computes this model")]
    elif find_spec("transformers") is None:
        log.warning("transformers is not installed, so that the export was read back by llmkit alone")
        findings = [Finding("opened by", "llmkit only: transformers is not installed (pip install 'llmkit[hf]')")]
    else:
        with _quiet_transformers():
            theirs = read_by_transformers(exported)
            findings = [Finding("opened by", theirs.library), *_check_texts(exported)]
    _check_own_tokenizer(exported)
    ours = load_model(exported.model, dtype=torch.float32)
    ours_BTV = probe_logits(ours, exported.tokenizer)
    findings.append(_check_rounding(ours_BTV if theirs is None else theirs.logits_BTV, exported))
    if theirs is not None:
        findings.append(_check_logits(theirs.logits_BTV, ours_BTV))
        findings += _check_greedy(ours, theirs, exported)
    return findings


def _check_own_tokenizer(exported: Exported) -> None:
    again = load_tokenizer(exported.model)
    for text in TEXTS:
        if (read := again.encode(text)) != (wrote := exported.tokenizer.encode(text)):
            raise _mismatch(exported, f"llmkit makes other tokens of {text!r:.40}: {read!s:.60}, not {wrote!s:.60}")


# -- the same computation here ----------------------------------------------------------------------------------------


def probe_ids(config: ModelConfig, tokenizer: Tokenizer) -> Tensor:
    """BT: ids that a text may hold, always the same for a vocabulary."""
    special = torch.tensor(tokenizer.token_ids().special)
    usable = (~special).nonzero().flatten()
    shape = ROWS, min(COLUMNS, config.max_seq_len)
    return usable[torch.randint(len(usable), shape, generator=torch.Generator().manual_seed(SEED))]


def probe_logits(model: Any, tokenizer: Tokenizer) -> Tensor:
    """BTV in fp32, of a model that llmkit has opened."""
    ids_BT = probe_ids(model.config, tokenizer)
    if model.config.kind == "encoder_decoder":
        return _logits(model, _shifted(ids_BT, tokenizer.pad_id), ids_BT)
    return _logits(model, ids_BT)


@torch.no_grad()
def _logits(model: Any, ids_BT: Tensor, source_BS: Tensor | None = None) -> Tensor:
    model.eval()
    source = None if source_BS is None else Tokens(source_BS, _positions(source_BS), None)
    labels = torch.full_like(ids_BT, IGNORE_INDEX)
    hidden_BTD = model.hidden_states(Batch(ids_BT, labels, _positions(ids_BT), None, 0, source=source))
    states_PD = model.output_states(hidden_BTD.flatten(0, 1))
    logits_PV = linear(states_PD, model.output_weight_VD, model.output_bias_V).float()
    if model.logit_softcap is not None:
        logits_PV = model.logit_softcap * torch.tanh(logits_PV / model.logit_softcap)
    return logits_PV.view(*ids_BT.shape, -1)


def _positions(ids_BT: Tensor) -> Tensor:
    return torch.arange(ids_BT.shape[1]).expand(ids_BT.shape)


def _shifted(ids_BT: Tensor, start_id: int) -> Tensor:
    """What an encoder-decoder's decoder reads to predict ``ids_BT``."""
    return torch.cat((torch.full((len(ids_BT), 1), start_id), ids_BT[:, :-1]), dim=1)


# -- transformers -----------------------------------------------------------------------------------------------------


def read_by_transformers(exported: Exported) -> Reading:
    """Logits of the probe and greedy ids. Raises ``CheckpointError`` when the files do not open there, or not whole."""
    transformers: Any = import_module("transformers")
    model, info = _opened(exported, getattr(transformers, str(exported.config.hf_architecture())))
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info.get(problem) or ())):
            raise _mismatch(exported, f"{problem.replace('_keys', '')} tensors, {names[0]} among them ({len(names)})")
    ids_BT, start_id = probe_ids(exported.config, exported.tokenizer), None
    with torch.no_grad():
        if exported.config.kind == "encoder_decoder":
            start_id = int(model.config.decoder_start_token_id)
            output = model(input_ids=ids_BT, decoder_input_ids=_shifted(ids_BT, exported.tokenizer.pad_id))
        else:
            output = model(input_ids=ids_BT)
        logits_BTV = output.logits if "logits" in output else output.prediction_logits
        new_ids = [] if exported.config.kind == "encoder" else _greedy(model, ids_BT, start_id, exported.config)
    return Reading(f"transformers {transformers.__version__}", logits_BTV.float(), start_id, new_ids)


def _opened(exported: Exported, kind: Any) -> tuple[Any, dict[str, Any]]:
    """The model in fp32, and what the library says of its tensors."""
    gguf = {} if exported.file is None else {"gguf_file": exported.file}
    try:
        model, info = kind.from_pretrained(
            exported.folder,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
            **gguf,
        )
    except Exception as error:  # whatever its readers raise says that they do not read the file
        raise _mismatch(exported, f"transformers cannot open it: {_first_line(error)}") from error
    return model.eval(), info


def _greedy(model: Any, ids_BT: Tensor, start_id: int | None, config: ModelConfig) -> list[int]:
    """What the library's own ``generate`` adds to the first ids of the first row, by its cache, past any end token."""
    transformers: Any = import_module("transformers")
    prompt_BT, limit = _prompt(ids_BT, config)
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=limit, do_sample=False, decoder_start_token_id=start_id, pad_token_id=0
    )
    row = model.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT))[0]
    new_ids: list[int] = row[1 if start_id is not None else prompt_BT.shape[1] :].tolist()
    return new_ids


def _prompt(ids_BT: Tensor, config: ModelConfig) -> tuple[Tensor, int]:
    """The prompt, and how many tokens fit behind it."""
    prompt_BT = ids_BT[:1, : max(1, min(PROMPT, config.max_seq_len // 2))]
    used = 1 if config.kind == "encoder_decoder" else prompt_BT.shape[1]
    return prompt_BT, max(1, min(NEW_TOKENS, config.max_seq_len - used))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bars and remarks."""
    remarks: Any = import_module("transformers.utils.logging")
    level = remarks.get_verbosity()
    remarks.set_verbosity_error()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        remarks.set_verbosity(level)


# -- comparisons ------------------------------------------------------------------------------------------------------


def _check_rounding(written_BTV: Tensor, exported: Exported) -> Finding:
    """The files against the model before rounding: small, or other weights were written."""
    difference = (written_BTV - exported.source_BTV).double()
    spread = float(exported.source_BTV.double().std(-1).square().mean().sqrt())
    share = float(difference.square().mean().sqrt()) / max(spread, 1e-30)
    if not share <= ROUNDING[exported.dtype]:
        what = f"its logits differ from the source's by {share:.1%} of their spread"
        raise _mismatch(exported, f"{what}; {exported.dtype} explains {ROUNDING[exported.dtype]:.2%}")
    return Finding("logits, against the source", f"{_largest(difference):.1e} at most, {share:.2%} of their spread")


def _check_logits(theirs_BTV: Tensor, ours_BTV: Tensor) -> Finding:
    """Two readings of the same files."""
    difference, allowed = _largest(theirs_BTV - ours_BTV), _tolerance(ours_BTV)
    if not difference <= allowed:
        raise CheckpointError(
            f"the logits that transformers computes differ from llmkit's by {difference:.1e}; {allowed:.1e} is allowed",
            fix=_NOT_PUBLISHED,
        )
    return Finding("logits, against llmkit", f"{difference:.1e} at most, of {_largest(ours_BTV):.1f}")


def _check_greedy(model: Any, theirs: Reading, exported: Exported) -> list[Finding]:
    """Every greedy id is the one that llmkit chooses after the same ids, or as good within the tolerance."""
    if not theirs.new_ids:
        return []
    ids_BT = probe_ids(exported.config, exported.tokenizer)
    prompt_BT, limit = _prompt(ids_BT, exported.config)
    new_1N = torch.tensor([theirs.new_ids])
    if theirs.start_id is None:
        logits_NV = _logits(model, torch.cat((prompt_BT, new_1N[:, :-1]), dim=1))[0, prompt_BT.shape[1] - 1 :]
    else:
        logits_NV = _logits(model, _shifted(new_1N, theirs.start_id), prompt_BT)[0]
    behind_N = logits_NV.max(-1).values - logits_NV.gather(1, new_1N.T)[:, 0]
    for step, behind in enumerate(behind_N.tolist()):
        if not behind <= 2 * _tolerance(logits_NV):
            what = f"greedy token {step + 1} of transformers is {theirs.new_ids[step]}, llmkit's is"
            raise _mismatch(exported, f"{what} {int(logits_NV[step].argmax())}")
    return [Finding("greedy tokens", f"{len(theirs.new_ids)} of {limit} equal")]


def _check_texts(exported: Exported) -> list[Finding]:
    """Ids and texts of the tokenizer, and chats by the template."""
    transformers: Any = import_module("transformers")
    gguf = {} if exported.file is None else {"gguf_file": exported.file}
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(exported.folder, local_files_only=True, **gguf)
    except Exception as error:  # as above
        raise _mismatch(exported, f"transformers cannot open the tokenizer: {_first_line(error)}") from error
    spaced = _spaced_there_only(exported)
    for text in TEXTS:
        _check_text(f" {text}" if spaced else text, exported, theirs, spaced)
    after = "; transformers, not llama.cpp, puts a space before every text" if spaced else ""
    findings = [Finding("tokenizer", f"{len(TEXTS)} texts equal, there and back{after}")]
    if exported.template is not None:
        findings.append(_check_chats(exported, exported.template, theirs))
    return findings


def _check_text(text: str, exported: Exported, theirs: Any, spaced: bool) -> None:
    """The same ids of a text, and the same text of the ids; ``spaced``: but for one space at its beginning."""
    ours, got = exported.tokenizer.encode(text), list(theirs.encode(text, add_special_tokens=False))
    if got != ours:
        raise _mismatch(exported, f"transformers makes other tokens of {text!r:.40}: {got!s:.60}, not {ours!s:.60}")
    read, told = theirs.decode(ours, skip_special_tokens=True), exported.tokenizer.decode(ours)
    if read != (told.removeprefix(" ") if spaced else told):
        raise _mismatch(exported, f"transformers reads the tokens of {text!r:.40} as {read!r:.60}, not {told!r:.60}")


def _spaced_there_only(exported: Exported) -> bool:
    """Whether a GGUF file says that no space goes before a text, which transformers (5.23) does not heed."""
    if exported.file is None:
        return False
    from llmkit.gguf_file import read_gguf
    from llmkit.tokenizers.gguf_fields import ADD_SPACE, KIND

    file = read_gguf(exported.model)
    return file.text(KIND) == "llama" and file.metadata.get(ADD_SPACE) is False


def _check_chats(exported: Exported, template: ChatTemplate, theirs: Any) -> Finding:
    """What the template makes of a few conversations. One that it refuses in our sandbox is not tried in another."""
    rendered = 0
    for chat in CHATS:
        for prompted in (False, True):
            try:
                expected = template.render(chat, add_generation_prompt=prompted)
            except (ConfigError, DataError):  # templates may refuse an order of roles, a system message ...
                continue
            if (got := _rendered_there(theirs, chat, prompted)) != expected:
                raise _mismatch(exported, f"the chat template gives {got!r:.200} there, not {expected!r:.200}")
            rendered += 1
    return Finding("chat template", f"{rendered} prompts equal, {2 * len(CHATS) - rendered} refused by it")


def _rendered_there(theirs: Any, chat: list[dict[str, str]], prompted: bool) -> str:
    try:
        return str(theirs.apply_chat_template(copy.deepcopy(chat), tokenize=False, add_generation_prompt=prompted))
    except Exception as error:  # a template raises what it likes
        return _first_line(error)


_NOT_PUBLISHED = "nothing was published; please report it with `llmkit doctor`, the architecture and its config.json"


def _mismatch(exported: Exported, what: str) -> CheckpointError:
    return CheckpointError(f"the export failed its check: {what}", where=exported.model.name, fix=_NOT_PUBLISHED)


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def _tolerance(logits_BTV: Tensor) -> float:
    return SUMMING * max(1.0, _largest(logits_BTV))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
