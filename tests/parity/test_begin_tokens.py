"""Rows begin with the begin token where ``transformers`` puts it before a text, for every kind of tokenizer folder."""

from __future__ import annotations

import io
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llmkit.commands.training import write_model
from llmkit.generation import generate, generate_from_ids
from llmkit.interfaces import Tokenizer
from llmkit.models.gguf import save_gguf
from llmkit.tasks.encoding import begin
from llmkit.tokenizers.gguf import gguf_fields
from llmkit.tokenizers.hf_json import HFTokenizer
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.sentencepiece import SentencePieceTokenizer
from tests.unit.generation_settings import GREEDY
from tests.unit.models.tiny import built, llama
from tests.unit.tokenizers.strings import documents, trained

pytest.importorskip("transformers")

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEXT = "some text"
BEGIN = {"SpecialToken": {"id": "<s>", "type_id": 0}}
FIRST, SECOND = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [BEGIN, FIRST],
    "pair": [BEGIN, FIRST, SECOND],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}
PLAIN = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
END_ONLY = {
    "type": "TemplateProcessing",
    "single": [FIRST, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
    "pair": [FIRST, SECOND],
    "special_tokens": {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}},
}
ROBERTA = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1], "trim_offsets": True}
PROCESSORS: dict[str, tuple[Any, bool]] = {
    "none": (None, False),
    "bytes": (PLAIN, False),
    "template": (TEMPLATE, True),
    "end": (END_ONLY, False),
    "both": ({"type": "Sequence", "processors": [PLAIN, TEMPLATE]}, True),
    "roberta": ({**ROBERTA, "add_prefix_space": False}, True),
}
SETTINGS: tuple[dict[str, bool], ...] = ({}, {"add_bos_token": True}, {"add_bos_token": False})


@cache
def _byte_level() -> dict[str, Any]:
    """A ``tokenizer.json`` with the ids of ``NAMES``: <unk> 0, <s> 1, </s> 2."""
    from tokenizers import ByteLevelBPETokenizer

    backend = ByteLevelBPETokenizer()
    symbols = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(documents()[:5], vocab_size=300, show_progress=False, special_tokens=symbols)
    content: dict[str, Any] = json.loads(backend.to_str())
    return content


@cache
def _model(prefix: bool) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    lines = [line for line in documents()[0].splitlines() if line][:300]
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        add_dummy_prefix=prefix,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


def _write(folder: Path, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def _begins(folder: Path, file: str | None = None) -> bool:
    """Whether rows begin with the begin token, in both libraries the same, of the folder and of its saved copy."""
    from transformers import AutoTokenizer

    ours = load_tokenizer(folder if file is None else folder / file)
    _agree(ours, AutoTokenizer.from_pretrained(folder, **({} if file is None else {"gguf_file": file})))
    ours.save(folder / "copy")
    again = load_tokenizer(folder / "copy")
    _agree(ours, AutoTokenizer.from_pretrained(folder / "copy"))
    assert (again.bos_id, again.bos_token_id, again.fingerprint) == (ours.bos_id, ours.bos_token_id, ours.fingerprint)
    shutil.rmtree(folder / "copy")
    return ours.bos_id is not None


def _agree(ours: Tokenizer, theirs: Any) -> None:
    row = [*begin(ours), *ours.encode(TEXT)]
    assert theirs(TEXT).input_ids[: len(row)] == row
    assert theirs.bos_token_id == ours.bos_token_id
    assert ours.bos_token_id is not None
    assert ours.token_ids().special[ours.bos_token_id]
    assert ours.bos_token_id not in ours.encode("a <s> b")


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        ("PreTrainedTokenizerFast", None),
        ("LlamaTokenizer", "llama"),
        ("GPT2Tokenizer", "gpt2"),
        ("Qwen2Tokenizer", "qwen2"),
        (None, "gpt2"),
        ("GPTNeoXTokenizer", "gpt_neox"),
    ],
)
def test_the_post_processor_of_a_tokenizer_json_decides(
    kind: str | None, model_type: str | None, tmp_path: Path
) -> None:
    """``add_bos_token`` beside it changes nothing. GPT-NeoX's class alone (5.23) leaves a begin token away."""
    for name, (processor, begins) in PROCESSORS.items():
        if model_type == "gpt_neox" and begins:
            continue
        for number, settings in enumerate(SETTINGS if name in ("none", "template") else SETTINGS[:1]):
            config = {**NAMES, **({} if kind is None else {"tokenizer_class": kind}), **settings}
            content = {**_byte_level(), "post_processor": processor}
            folder = _write(tmp_path / f"{name}{number}", tokenizer=content, tokenizer_config=config)
            if model_type is not None:
                _write(folder, config={"model_type": model_type})
            assert _begins(folder) == begins, (name, settings)


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GemmaTokenizer", "PreTrainedTokenizerFast"])
def test_the_settings_beside_a_sentencepiece_model_decide(kind: str, tmp_path: Path) -> None:
    """Without ``add_bos_token`` transformers (5.23) puts nothing first, whatever the class."""
    for settings in SETTINGS:
        folder = _write(
            tmp_path / str(len(str(settings))), tokenizer_config={"tokenizer_class": kind, **NAMES, **settings}
        )
        (folder / "tokenizer.model").write_bytes(_model(kind == "LlamaTokenizer"))
        assert _begins(folder) == settings.get("add_bos_token", False), settings


def test_a_sentencepiece_model_alone_and_one_of_ours(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.model").write_bytes(_model(False))
    ours = SentencePieceTokenizer.load(tmp_path)
    assert (ours.bos_id, ours.bos_token_id) == (None, 1)
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT).input_ids[0] != 1
    for tokenizer, begins in ((ours, False), (ours.with_symbols(["<new>"]), False), (trained("bpe"), True)):
        tokenizer.save(tmp_path / "saved")
        assert _begins(tmp_path / "saved") == begins == (tokenizer.bos_id is not None)
        assert gguf_fields(tokenizer)["tokenizer.ggml.add_bos_token"] is begins
    assert ours.fingerprint != SentencePieceTokenizer(_model(False)).fingerprint, "rows differ"


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "opt"])
def test_vocabulary_and_merges(model_type: str, tmp_path: Path) -> None:
    for settings in SETTINGS:
        folder = _write(tmp_path / str(len(str(settings))), vocab=_byte_level()["model"]["vocab"])
        pairs = (" ".join(pair) for pair in _byte_level()["model"]["merges"])
        (folder / "merges.txt").write_text("\n".join(pairs), encoding="utf-8")
        _write(folder, config={"model_type": model_type}, tokenizer_config={**NAMES, **settings})
        assert _begins(folder) == settings.get("add_bos_token", False), settings


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_flag_of_a_gguf_file_decides(kind: str, tmp_path: Path) -> None:
    """Where there is none, a SentencePiece vocabulary has the token first, and a byte-level one has not."""
    pytest.importorskip("gguf")
    tokenizer: Any = trained("bpe")
    if kind == "gpt2":
        tokenizer = HFTokenizer(json.dumps({**_byte_level(), "post_processor": TEMPLATE}), NAMES, {}, "x")
    fields = gguf_fields(tokenizer)
    flag = "tokenizer.ggml.add_bos_token"
    assert fields.pop(flag) is True
    for value in (None, True, False):
        more = {} if value is None else {flag: value}
        folder = _write(tmp_path / str(value))
        model = built(llama(vocab_size=tokenizer.vocab_size, n_layers=1))
        save_gguf(model, folder / "x.gguf", kind="f16", tokenizer_fields={**fields, **more})
        ours = load_tokenizer(folder / "x.gguf")
        assert (ours.bos_id is not None) == (kind == "llama" if value is None else value)
        _agree_from_gguf(ours, folder)


@pytest.mark.parametrize(("cut", "begins"), [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("gpt-2", False)])
def test_a_gguf_file_without_the_flag_goes_by_its_kind(cut: str, begins: bool, tmp_path: Path) -> None:
    """As llama.cpp has it; transformers (5.23) puts nothing before the text of a byte-level vocabulary then."""
    pytest.importorskip("gguf")
    tokenizer = HFTokenizer(json.dumps({**_byte_level(), "post_processor": TEMPLATE}), NAMES, {}, "x")
    fields = {**gguf_fields(tokenizer), "tokenizer.ggml.pre": cut}
    del fields["tokenizer.ggml.add_bos_token"]
    model = built(llama(vocab_size=tokenizer.vocab_size, n_layers=1))
    save_gguf(model, tmp_path / "x.gguf", kind="f16", tokenizer_fields=fields)
    assert (load_tokenizer(tmp_path / "x.gguf").bos_id is not None) == begins


def _agree_from_gguf(ours: Tokenizer, folder: Path) -> None:
    """The first id; transformers puts a space before every text, which this vocabulary does not want."""
    from transformers import AutoTokenizer

    row = AutoTokenizer.from_pretrained(folder, gguf_file="x.gguf")(TEXT).input_ids
    assert (row[0] == ours.bos_token_id) == (ours.bos_id is not None)


def test_a_begin_token_that_rows_lack_is_still_known(tmp_path: Path) -> None:
    """Its id in what is written, its name in a template; and an empty prompt is what follows a document."""
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = HFTokenizer(json.dumps(_byte_level()), {**NAMES, "chat_template": template}, {}, "x")
    assert (tokenizer.bos_id, tokenizer.token_ids().bos_id, tokenizer.bos_token_id) == (None, None, 1)
    assert tokenizer.render_chat([{"role": "user", "content": "a"}], add_generation_prompt=False) == "<s>a</s>"
    assert tokenizer.encode_symbols("<s>a")[0] == 1
    fields = gguf_fields(tokenizer)
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.add_bos_token"]) == (1, False)
    model = built(llama(vocab_size=tokenizer.vocab_size))
    write_model(model, tokenizer, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["bos_token_id"] == 1
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["bos_token"] == "<s>"
    empty = generate(model, tokenizer, [""], GREEDY, device="cpu")
    assert empty == generate_from_ids(model, tokenizer, [[tokenizer.eos_id]], GREEDY, device="cpu")[0]
