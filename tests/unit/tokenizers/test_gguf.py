"""Tokenizers into the metadata of a GGUF file and back: the same ids, the same roles, the same chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.errors import ConfigError
from llmkit.gguf_file import SCORES, TOKENS, TYPES
from llmkit.interfaces import Tokenizer
from llmkit.tokenizers.chat_template import ChatTemplate
from llmkit.tokenizers.gguf import gguf_fields, load_gguf_tokenizer
from llmkit.tokenizers.gguf_splits import SPLITS, kind_named, kind_of
from llmkit.tokenizers.hf_json import HFTokenizer
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.sentencepiece import SentencePieceTokenizer
from tests.unit.tokenizers.strings import documents, strings, trained, trained_byte_level, trained_wordpiece

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
pytest.importorskip("tokenizers", reason="needs the extra hf")


def file_of(fields: dict[str, Any], path: Path) -> Path:
    """A GGUF file with nothing but metadata."""
    writer = gguf.GGUFWriter(path, "llama")
    types = {bool: "BOOL", int: "UINT32", str: "STRING", list: "ARRAY"}
    for key, value in fields.items():
        writer.add_key_value(key, value, gguf.GGUFValueType[types[type(value)]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def there_and_back(tokenizer: Tokenizer, path: Path) -> HFTokenizer:
    again = load_tokenizer(file_of(gguf_fields(tokenizer), path))
    assert isinstance(again, HFTokenizer)
    return again


def agree(ours: Tokenizer, again: Tokenizer, texts: list[str]) -> None:
    assert (again.vocab_size, again.bos_id, again.eos_id, again.pad_id) == (
        ours.vocab_size,
        ours.bos_id,
        ours.eos_id,
        ours.pad_id,
    )
    ids = ours.encode_batch(texts)
    for text, found, expected in zip(texts, again.encode_batch(texts), ids, strict=True):
        assert found == expected, text
    assert [again.decode(row) for row in ids] == [ours.decode(row) for row in ids]
    assert (again.token_ids().special == ours.token_ids().special).all()


def test_a_trained_sentencepiece_model(tmp_path: Path) -> None:
    """No space is put before a text, as in training; control symbols stay apart."""
    fields = gguf_fields(trained("bpe"))
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.add_space_prefix"]) == ("llama", False)
    again = there_and_back(trained("bpe"), tmp_path / "t.gguf")
    agree(trained("bpe"), again, list(strings()))
    assert again.encode_symbols("</s><|user|>") == [2, 4]


def test_a_byte_level_bpe(tmp_path: Path) -> None:
    ours = trained_byte_level()
    assert gguf_fields(ours)["tokenizer.ggml.pre"] == "gpt-2"
    again = there_and_back(ours, tmp_path / "t.gguf")
    agree(ours, again, list(strings()))
    assert again.unk_id == ours.unk_id
    assert again.token_ids().sentinel_ids == ours.token_ids().sentinel_ids


def byte_level(kind: str, **changes: Any) -> HFTokenizer:
    """The small byte-level BPE, cutting text in another way."""
    content = json.loads(trained_byte_level()._content)
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": SPLITS[kind]}
    content["model"]["ignore_merges"] = kind in ("llama-bpe", "tekken")
    content["model"] |= changes.pop("model", {})
    return HFTokenizer(json.dumps({**content, **changes}), {}, {}, kind)


@pytest.mark.parametrize("kind", SPLITS)
def test_every_way_to_cut_text(kind: str, tmp_path: Path) -> None:
    ours = byte_level(kind)
    assert gguf_fields(ours)["tokenizer.ggml.pre"] == kind
    agree(ours, there_and_back(ours, tmp_path / "t.gguf"), list(strings()))


def test_names_of_the_ways_to_cut_text() -> None:
    known = {name: kind_named(name) for name in ("llama3", "starcoder", "phi-2", "qwen2", "llama4", "default", None)}
    assert list(known.values()) == ["llama-bpe", "smollm", "gpt-2", "qwen2", "gpt-4o", None, None]
    assert kind_of({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}) == "gpt-2"
    assert kind_of({"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}) is None
    assert kind_of(None) is None


def test_gpt2(data_dir: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(data_dir / "tokenizers" / "gpt2")
    agree(ours, there_and_back(ours, tmp_path / "t.gguf"), list(strings()))


def test_stories260k_from_its_json(data_dir: Path, tmp_path: Path) -> None:
    """Its merges become scores, and the scores those of its SentencePiece model in their order."""
    folder = data_dir / "models" / "stories260K"
    ours = HFTokenizer.load(folder / "tokenizer.json")
    fields = gguf_fields(ours)
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    agree(ours, there_and_back(ours, tmp_path / "t.gguf"), list(strings()))
    model = gguf_fields(SentencePieceTokenizer.load(folder / "tokenizer.model"))
    assert (fields[TOKENS], fields[TYPES]) == (model[TOKENS], model[TYPES])
    made = [index for index, token in enumerate(fields[TOKENS]) if fields[TYPES][index] == 1 and len(token) > 1]
    assert sorted(made, key=lambda i: -fields[SCORES][i]) == sorted(made, key=lambda i: -model[SCORES][i])


def test_stories260k_from_its_sentencepiece_model(data_dir: Path, tmp_path: Path) -> None:
    """The library puts a space even before a text that begins with one; transformers' class for Llama does not."""
    ours = SentencePieceTokenizer.load(data_dir / "models" / "stories260K" / "tokenizer.model")
    again = there_and_back(ours, tmp_path / "t.gguf")
    texts = [text for text in strings() if not text.startswith(" ")]
    agree(ours, again, texts)
    assert again.encode(" a") == ours.encode("a")


def test_fillers_at_the_end_are_left_out(tmp_path: Path) -> None:
    fields = gguf_fields(trained_byte_level())
    n = len(fields[TOKENS])
    fields[TOKENS] += [f"[PAD{i}]" for i in range(n, n + 7)]
    fields[TYPES] += [5] * 7
    assert load_gguf_tokenizer(file_of(fields, tmp_path / "t.gguf")).vocab_size == n


@pytest.mark.parametrize("named", [False, True])
def test_chat_templates(named: bool, tmp_path: Path) -> None:
    ours = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    setting: Any = ours
    if named:
        setting = [{"name": "default", "template": ours}, {"name": "tool_use", "template": "tools {{ tools }}"}]
    tokenizer = HFTokenizer(trained_byte_level()._content, {"chat_template": setting}, {}, "x")
    again = there_and_back(tokenizer, tmp_path / "t.gguf")
    template, expected = ChatTemplate.of(again), ChatTemplate.of(tokenizer)
    assert template is not None
    assert expected is not None
    assert (template.sources, template.special_names) == (expected.sources, expected.special_names)
    assert template.render([{"role": "user", "content": "hi"}]) == "<|user|>hi</s>"


def test_no_chat_template(tmp_path: Path) -> None:
    assert ChatTemplate.of(there_and_back(trained("bpe"), tmp_path / "t.gguf")) is None


def test_what_stands_around_a_text(tmp_path: Path) -> None:
    """In the ``tokenizer.json`` that is saved again; ``encode`` itself adds nothing."""
    for first, last in ((False, False), (True, False), (True, True)):
        fields = gguf_fields(trained_byte_level()) | {
            "tokenizer.ggml.add_bos_token": first,
            "tokenizer.ggml.add_eos_token": last,
        }
        tokenizer = load_gguf_tokenizer(file_of(fields, tmp_path / "t.gguf"))
        ids = tokenizer._backend.encode("a").ids
        assert ids == [*[tokenizer.bos_id] * first, *tokenizer.encode("a"), *[tokenizer.eos_id] * last]
        again = gguf_fields(tokenizer)
        assert (again["tokenizer.ggml.add_bos_token"], again["tokenizer.ggml.add_eos_token"]) == (first, last)


@pytest.mark.parametrize(
    ("tokenizer", "what"),
    [
        (lambda: trained("unigram"), "of the kind Unigram"),
        (trained_wordpiece, "a WordPiece model"),
        (lambda: byte_level("gpt-2", normalizer={"type": "Lowercase"}), "cuts text otherwise than"),
        (lambda: byte_level("gpt-2", pre_tokenizer={**SPLITS["gpt-2"][0], "add_prefix_space": True}), "cuts text"),
        (lambda: byte_level("gpt-2", model={"ignore_merges": True}), "gpt-2 with ignore_merges=True"),
        (lambda: byte_level("gpt-2", model={"end_of_word_suffix": "</w>"}), "pieces of its own kind"),
        (lambda: byte_level("gpt-2", pre_tokenizer={"type": "Whitespace"}), "neither cut into bytes nor"),
    ],
)
def test_tokenizers_that_gguf_has_no_words_for(tokenizer: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        gguf_fields(tokenizer())


def sentencepiece_like(merges: list[list[str]]) -> HFTokenizer:
    vocab = {piece: index for index, piece in enumerate(["</s>", "a", "b", "c", "ab", "bc", "abc"])}
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    return HFTokenizer(json.dumps(content), {"eos_token": "</s>"}, {}, "x")


def test_merges_become_scores() -> None:
    fields = gguf_fields(sentencepiece_like([["b", "c"], ["a", "b"], ["a", "bc"], ["ab", "c"]]))
    assert dict(zip(fields[TOKENS], fields[SCORES], strict=True)) == {
        **{"</s>": -3.0, "a": -3.0, "b": -3.0, "c": -3.0},
        **{"ab": -1.0, "bc": 0.0, "abc": -2.0},
    }


@pytest.mark.parametrize(
    ("merges", "what"),
    [
        ([["a", "b"], ["b", "c"], ["ab", "c"]], "leave out a way"),
        ([["a", "bc"], ["a", "b"], ["b", "c"], ["ab", "c"]], "in an order that scores cannot give"),
    ],
)
def test_merges_that_scores_cannot_give(merges: list[list[str]], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        gguf_fields(sentencepiece_like(merges))


def test_real_text_survives(tmp_path: Path) -> None:
    again = there_and_back(trained("bpe"), tmp_path / "t.gguf")
    for text in documents()[:5]:
        assert again.decode(again.encode(text)) == text


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("tekken", True), ("gpt-2", False), ("qwen2", False)])
def test_words_that_no_merge_makes(pre: str, whole: bool, tmp_path: Path) -> None:
    """Llama 3 takes a word that is a piece whole; the others go by the merges alone."""
    fields = {
        **{"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.eos_token_id": 5},
        **{TOKENS: ["a", "b", "c", "ab", "abc", "</s>"], TYPES: [1, 1, 1, 1, 1, 3]},
        "tokenizer.ggml.merges": ["a b"],
    }
    assert load_gguf_tokenizer(file_of(fields, tmp_path / "t.gguf")).encode("abc") == ([4] if whole else [3, 2])
