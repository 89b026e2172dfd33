"""Whether an exported model computes elsewhere what it computes here: the library it is for opens it and is compared.

``transformers`` reads both formats, GGUF by dequantising it. Everything is computed in fp32 on the CPU, so that what is
left between two readings of one file is the order of sums. One model is in memory at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmkit.commands.exported import TEXTS, Exported, Finding, Reading, Subject, differing, first_line, mismatch
from llmkit.commands.head_check import LOADERS, head_logits, read_head
from llmkit.commands.template_check import check_chats
from llmkit.errors import LLMKitError
from llmkit.interfaces import IGNORE_INDEX, Batch, ModelConfig, Tokenizer, Tokens
from llmkit.models.hf import load_config, load_model
from llmkit.tokenizers.load import load_tokenizer

ROWS, COLUMNS, SEED = 2, 32, 1  # of the ids whose logits are compared
PROMPT, NEW_TOKENS = 16, 32  # of the greedy text
SUMMING = 1e-4  # of the largest logit: what another order of sums may change
# Of the spread of the logits, root mean square: what rounded weights may change. Two unrelated models differ by 1.4.
ROUNDING = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.3, "q8_0": 0.3}

log = logging.getLogger("llmkit.export")


def check_export(exported: Exported) -> list[Finding]:
    """Compare the files with the model they were made from. Raises ``CheckpointError`` where they differ from it."""
    load_config(exported.model)  # without its config transformers builds a model of billions of weights
    theirs = None
    if exported.subject.architecture is None:
        findings = [Finding("opened by", f"llmkit only: {exported.subject.why_own}")]
    elif find_spec("transformers") is None:
        log.warning("transformers is not installed, so that the export was read back by llmkit alone")
        findings = [Finding("opened by", "llmkit only: transformers is not installed (pip install 'llmkit[hf]')")]
    else:
        with _quiet_transformers():
            theirs = read_by_transformers(exported)
            findings = [Finding("opened by", theirs.library), *_check_texts(exported), *theirs.findings]
    _check_own_tokenizer(exported)
    ours = load_model(exported.model, dtype=torch.float32)
    found = probe_logits(ours, exported.subject)
    findings.append(_check_rounding(found if theirs is None else theirs.logits, exported))
    if theirs is not None:
        findings.append(_check_logits(theirs.logits, found))
        findings += _check_greedy(ours, theirs, exported)
    return findings


def _check_own_tokenizer(exported: Exported) -> None:
    again = load_tokenizer(exported.model)
    for text in TEXTS:
        if (read := again.encode(text)) != (wrote := exported.subject.tokenizer.encode(text)):
            raise mismatch(exported, f"llmkit makes other tokens of {text!r:.40}: {read!s:.60}, not {wrote!s:.60}")


# -- the same computation here ----------------------------------------------------------------------------------------


def probe_ids(config: ModelConfig, tokenizer: Tokenizer) -> Tensor:
    """BT: ids that a text may hold, always the same for a vocabulary."""
    special = torch.tensor(tokenizer.token_ids().special)
    usable = (~special).nonzero().flatten()
    shape = ROWS, min(COLUMNS, config.max_seq_len)
    return usable[torch.randint(len(usable), shape, generator=torch.Generator().manual_seed(SEED))]


def probe_logits(model: Any, subject: Subject) -> list[Tensor]:
    """Logits in fp32 of a model that llmkit has opened: BTV of the probe, or of its task head as ``head_logits``."""
    if subject.head is not None:
        return head_logits(model, subject)
    ids_BT = probe_ids(model.config, subject.tokenizer)
    if model.config.kind == "encoder_decoder":
        return [_logits(model, _shifted(ids_BT, subject.tokenizer.pad_id), ids_BT)]
    return [_logits(model, ids_BT)]


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
    subject, library = exported.subject, f"transformers {transformers.__version__}"
    model, info = _opened(exported, getattr(transformers, _loader(subject)))
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info.get(problem) or ())):
            raise mismatch(exported, f"{problem.replace('_keys', '')} tensors, {names[0]} among them ({len(names)})")
    if subject.head is not None:
        return read_head(exported, model, _opened_tokenizer(exported), f"{library}, {type(model).__name__}")
    ids_BT, start_id = probe_ids(subject.config, subject.tokenizer), None
    with torch.no_grad():
        if subject.config.kind == "encoder_decoder":
            start_id = int(model.config.decoder_start_token_id)
            output = model(input_ids=ids_BT, decoder_input_ids=_shifted(ids_BT, subject.tokenizer.pad_id))
        else:
            output = model(input_ids=ids_BT)
        logits_BTV = output.logits if "logits" in output else output.prediction_logits
        new_ids = [] if subject.config.kind == "encoder" else _greedy(model, ids_BT, start_id, subject.config)
    return Reading(library, [logits_BTV.float()], start_id, new_ids, [])


def _loader(subject: Subject) -> str:
    """What opens it there: of a model with a task head what a user of it would take."""
    return str(subject.architecture) if subject.head is None else LOADERS[subject.head.kind]


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
    except LLMKitError:  # a stop signal's among them
        raise
    except Exception as error:  # whatever its readers raise says that they do not read the file
        raise mismatch(exported, f"transformers cannot open it: {first_line(error)}") from error
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


def _check_rounding(written: Sequence[Tensor], exported: Exported) -> Finding:
    """The files against the model before rounding: small, or other weights were written."""
    difference = _flat(written).double() - _flat(exported.source).double()
    spread = float(torch.cat([part.double().var(-1).flatten() for part in exported.source]).mean().sqrt())
    share = float(difference.square().mean().sqrt()) / max(spread, 1e-30)
    if not share <= ROUNDING[exported.dtype]:
        what = f"its logits differ from the source's by {share:.1%} of their spread"
        raise mismatch(exported, f"{what}; {exported.dtype} explains {ROUNDING[exported.dtype]:.2%}")
    return Finding("logits, against the source", f"{_largest(difference):.1e} at most, {share:.2%} of their spread")


def _check_logits(theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> Finding:
    """Two readings of the same files."""
    difference, allowed = _largest(_flat(theirs) - _flat(ours)), _tolerance(_flat(ours))
    if not difference <= allowed:
        what = f"the logits that transformers computes differ from llmkit's by {difference:.1e}"
        raise differing(f"{what}; {allowed:.1e} is allowed")
    return Finding("logits, against llmkit", f"{difference:.1e} at most, of {_largest(_flat(ours)):.2g}")


def _check_greedy(model: Any, theirs: Reading, exported: Exported) -> list[Finding]:
    """Every greedy id is the one that llmkit chooses after the same ids, or as good within the tolerance."""
    if not theirs.new_ids:
        return []
    ids_BT = probe_ids(exported.subject.config, exported.subject.tokenizer)
    prompt_BT, limit = _prompt(ids_BT, exported.subject.config)
    new_1N = torch.tensor([theirs.new_ids])
    if theirs.start_id is None:
        logits_NV = _logits(model, torch.cat((prompt_BT, new_1N[:, :-1]), dim=1))[0, prompt_BT.shape[1] - 1 :]
    else:
        logits_NV = _logits(model, _shifted(new_1N, theirs.start_id), prompt_BT)[0]
    behind_N = logits_NV.max(-1).values - logits_NV.gather(1, new_1N.T)[:, 0]
    for step, behind in enumerate(behind_N.tolist()):
        if not behind <= 2 * _tolerance(logits_NV):
            what = f"greedy token {step + 1} of transformers is {theirs.new_ids[step]}, llmkit's is"
            raise mismatch(exported, f"{what} {int(logits_NV[step].argmax())}")
    return [Finding("greedy tokens", f"{len(theirs.new_ids)} of {limit} equal")]


def _check_texts(exported: Exported) -> list[Finding]:
    """Ids and texts of the tokenizer, and chats by the template."""
    theirs = _opened_tokenizer(exported)
    spaced = _spaced_there_only(exported)
    for text in TEXTS:
        _check_text(f" {text}" if spaced else text, exported, theirs, spaced)
    after = "; transformers, not llama.cpp, puts a space before every text" if spaced else ""
    findings = [Finding("tokenizer", f"{len(TEXTS)} texts equal, there and back{after}")]
    if exported.template is not None:
        findings.append(check_chats(exported, exported.template))
    return findings


def _opened_tokenizer(exported: Exported) -> Any:
    transformers: Any = import_module("transformers")
    gguf = {} if exported.file is None else {"gguf_file": exported.file}
    try:
        return transformers.AutoTokenizer.from_pretrained(exported.folder, local_files_only=True, **gguf)
    except LLMKitError:  # a stop signal's among them
        raise
    except Exception as error:  # as above
        raise mismatch(exported, f"transformers cannot open the tokenizer: {first_line(error)}") from error


def _check_text(text: str, exported: Exported, theirs: Any, spaced: bool) -> None:
    """The same ids of a text, and the same text of the ids; ``spaced``: but for one space at its beginning."""
    ours, got = exported.subject.tokenizer.encode(text), list(theirs.encode(text, add_special_tokens=False))
    if got != ours:
        raise mismatch(exported, f"transformers makes other tokens of {text!r:.40}: {got!s:.60}, not {ours!s:.60}")
    read, told = theirs.decode(ours, skip_special_tokens=True), exported.subject.tokenizer.decode(ours)
    if read != (told.removeprefix(" ") if spaced else told):
        raise mismatch(exported, f"transformers reads the tokens of {text!r:.40} as {read!r:.60}, not {told!r:.60}")


def _spaced_there_only(exported: Exported) -> bool:
    """Whether a GGUF file says that no space goes before a text, which transformers (5.23) does not heed."""
    if exported.file is None:
        return False
    from llmkit.gguf_file import read_gguf
    from llmkit.tokenizers.gguf_fields import ADD_SPACE, KIND

    file = read_gguf(exported.model)
    return file.text(KIND) == "llama" and file.metadata.get(ADD_SPACE) is False


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def _tolerance(logits_BTV: Tensor) -> float:
    return SUMMING * max(1.0, _largest(logits_BTV))
