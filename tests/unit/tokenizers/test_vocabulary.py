"""What objectives see of a vocabulary: roles, ids that no text has, and the beginnings of words."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import re
import tempfile
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer

from llmkit.interfaces import TokenIds, Tokenizer
from llmkit.tokenizers import vocabulary
from llmkit.tokenizers.hf_json import HFTokenizer
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.sentencepiece import SentencePieceTokenizer
from tests.unit.tokenizers.strings import (
    ADVERSARIAL,
    BERT_ODD,
    ODD,
    documents,
    spec,
    strings,
    trained,
    trained_byte_level,
    trained_wordpiece,
)

pytest.importorskip("tokenizers")

SENTINELS = [f"<extra_id_{n}>" for n in range(100)]
INFILL = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
KINDS = ["bpe", "wordpiece", "byte_level"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def _tokenizer(kind: str) -> Tokenizer:
    if kind in ("bpe", "unigram"):
        return trained("bpe" if kind == "bpe" else "unigram")
    return trained_wordpiece() if kind == "wordpiece" else trained_byte_level()


@cache
def _with_symbols(kind: Literal["bpe", "unigram"]) -> tuple[SentencePieceTokenizer, HFTokenizer]:
    """A model with every symbol an objective may want, and its ``tokenizer.json``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        tokenizer = spec(kind, 700, extra_symbols=["<mask>", *INFILL, *SENTINELS, "<|user|>"]).train(documents(), path)
        config = json.loads((path / "tokenizer_config.json").read_text())
        assert config["mask_token"] == "<mask>"
        return tokenizer, HFTokenizer.load(path)


def _same(one: TokenIds, other: TokenIds) -> bool:
    pairs = zip(dataclasses.astuple(one), dataclasses.astuple(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_symbols_of_a_trained_model(kind: Any) -> None:
    tokenizer, converted = _with_symbols(kind)
    ids = tokenizer.token_ids()
    assert (ids.vocab_size, ids.bos_id, ids.eos_id, ids.pad_id) == (700, 1, 2, 3)
    assert (ids.mask_id, ids.infill_ids, ids.sentinel_ids) == (4, (5, 6, 7), tuple(range(8, 108)))
    assert np.flatnonzero(ids.special).tolist() == list(range(109))  # the bytes are ordinary
    assert _same(ids, converted.token_ids())
    assert ids is tokenizer.token_ids()
    with pytest.raises(ValueError, match="read-only"):
        ids.special[0] = False


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_symbols_are_never_made_from_text(kind: Any) -> None:
    tokenizer, converted = _with_symbols(kind)
    texts = [ADVERSARIAL, "".join(SENTINELS), " ".join(INFILL), "a<mask>b", *ODD, *BERT_ODD]
    ids = tokenizer.encode_batch(texts)
    assert not tokenizer.token_ids().special[np.concatenate(ids).astype(int)].any()
    assert converted.encode_batch(texts) == ids
    assert [tokenizer.decode(row) for row in ids] == texts
    assert tokenizer.decode([1, 4, *ids[0], 5, 99, 2]) == converted.decode([1, 4, *ids[0], 5, 99, 2]) == ADVERSARIAL


@pytest.mark.parametrize("kind", [*KINDS, "unigram"])
@settings(derandomize=True, max_examples=100, deadline=None)
@given(text=st.one_of(st.text(max_size=60), st.sampled_from(strings()), st.just(ADVERSARIAL)))
def test_special_ids_are_those_no_text_has(kind: str, text: str) -> None:
    tokenizer = _tokenizer(kind)
    ids = [i for i in tokenizer.encode(text) if i != getattr(tokenizer, "unk_id", None)]
    assert not tokenizer.token_ids().special[ids].any()


@every_kind
def test_all_ordinary_ids_can_be_had(kind: str) -> None:
    """Nothing that text uses is kept from the objectives."""
    tokenizer = _tokenizer(kind)
    found = np.unique(np.concatenate(tokenizer.encode_batch(documents())))
    ids = tokenizer.token_ids()
    assert ids.special.sum() < 10
    assert np.isin(
        found, np.flatnonzero(~ids.special) if kind != "wordpiece" else [1, *np.flatnonzero(~ids.special)]
    ).all()


@every_kind
def test_a_word_begins_where_a_decoder_puts_a_space(kind: str) -> None:
    """The whole vocabulary: what comes between a letter and the piece."""
    tokenizer = _tokenizer(kind)
    ids = tokenizer.token_ids()
    (letter,) = tokenizer.encode("a")
    for piece in np.flatnonzero(~ids.special):
        text = tokenizer.decode([letter, int(piece)])[1:]
        if kind == "wordpiece" and not text.lstrip()[:1].isalnum():
            assert ids.word_starts[piece], text  # punctuation: a word of its own
        elif text[:1] not in "\x1c\x1d\x1e\x1f\x85\xa0":  # white in some eyes only
            assert ids.word_starts[piece] == text[:1].isspace(), (piece, text)
    assert ids.word_starts[ids.special].all()


def _words(tokenizer: Tokenizer, row: Sequence[int]) -> list[str]:
    """The text of each group of ids that belong together."""
    starts = tokenizer.token_ids().word_starts[list(row)]
    cuts = [0, *(np.flatnonzero(starts[1:]) + 1).tolist(), len(row)]
    return [tokenizer.decode(row[a:b]).strip() for a, b in pairwise(cuts) if b > a]


@every_kind
@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    words=st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20), max_size=12)
)
def test_words_are_never_split(kind: str, words: list[str]) -> None:
    tokenizer = _tokenizer(kind)
    text = " ".join(words)
    row = tokenizer.encode(text)
    if kind != "wordpiece":
        assert _words(tokenizer, row) == words
    elif 1 not in row:
        assert _words(tokenizer, row) == re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower())


@every_kind
def test_words_of_real_text(kind: str) -> None:
    tokenizer = _tokenizer(kind)
    for document in documents()[:20]:
        text = " ".join(document.split())
        words = re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower()) if kind == "wordpiece" else text.split()
        row = tokenizer.encode(text)
        assert _words(tokenizer, row) == words or 1 in row


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["<mask>", "[MASK]"], (1, (), None)),
        (["<extra_id_10>", "<extra_id_9>", "<extra_id_x>", "<extra_id_0>"], (None, (3, 1, 0), None)),
        (["<fim_prefix>", "<fim_suffix>"], (None, (), None)),
        (["<|fim_middle|>", "<|fim_prefix|>", "<|fim_suffix|>"], (None, (), (1, 2, 0))),
        (["<fim-prefix>", "<fim-middle>", "<fim-suffix>"], (None, (), (0, 2, 1))),
        (["<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"], (None, (), (1, 0, 2))),
        (["▁<PRE>", "▁<MID>", "▁<SUF>"], (None, (), (0, 2, 1))),
        (["[PREFIX]", "[SUFFIX]", "[MIDDLE]"], (None, (), (0, 1, 2))),
    ],
)
def test_roles_by_name(names: list[str], expected: tuple[Any, ...]) -> None:
    roles = vocabulary.find_roles({name: index for index, name in enumerate(names)})
    assert (roles.mask_id, roles.sentinel_ids, roles.infill_ids) == expected


def test_a_mask_that_the_files_name() -> None:
    assert vocabulary.find_roles({"<mask>": 0, "<blank>": 1}, "<blank>").mask_id == 1
    assert vocabulary.find_roles({"<mask>": 0}, "<not there>").mask_id == 0


def _metaspace(mark: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": mark, "prepend_scheme": "always", "split": True}


_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_BACK = {
    "type": "Sequence",
    "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "Fuse"}],
}
_SPLIT = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}
_NESTED = {"type": "Sequence", "pretokenizers": [_SPLIT, {"type": "ByteLevel", "add_prefix_space": False}]}


@pytest.mark.parametrize(
    ("content", "begin", "go_on"),
    [
        (
            {"model": {"type": "Unigram"}, "pre_tokenizer": _metaspace("▁")},
            ["▁a", "▁", "\n", "<0x0A>"],
            ["a", "<0x41>"],
        ),
        ({"model": {"type": "BPE"}, "pre_tokenizer": _metaspace("_")}, ["_a"], ["▁a", "a_"]),
        ({"model": {"type": "BPE"}, "normalizer": {"type": "Sequence", "normalizers": [_REPLACE]}}, ["▁a"], ["a▁"]),
        ({"model": {"type": "BPE"}, "decoder": _BACK}, ["▁a", "<0x20>"], ["a"]),
        ({"model": {"type": "BPE"}, "pre_tokenizer": _NESTED}, ["Ġa", "Ċ", "ĉĉ", "č", " "], ["a", "é", "Ń", "▁"]),
        ({"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}, ["Ġa"], ["a"]),
        ({"model": {"type": "WordPiece", "continuing_subword_prefix": "##"}}, ["a", ",", "#a"], ["##a", "##"]),
        ({"model": {"type": "BPE", "continuing_subword_prefix": "@@"}}, ["a"], ["@@a"]),
        ({"model": {"type": "WordLevel"}, "pre_tokenizer": {"type": "Whitespace"}}, ["a", "##a"], []),
        ({"model": {"type": "BPE", "end_of_word_suffix": "</w>"}, "pre_tokenizer": _NESTED}, ["a", "a</w>"], []),
    ],
)
def test_rule_of_a_file(content: dict[str, Any], begin: list[str], go_on: list[str]) -> None:
    rule = vocabulary.word_rule(content)
    assert [piece for piece in begin if not rule(piece)] == []
    assert [piece for piece in go_on if rule(piece)] == []


def _saved(folder: Path, content: dict[str, Any]) -> HFTokenizer:
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", **content}), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, HFTokenizer)
    return tokenizer


def _added(index: int, content: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": content, "special": special, **flags}


def test_pieces_that_do_not_say_where_words_begin(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = {"type": "BPE", "vocab": {"</s>": 0, "a</w>": 1}, "merges": [], "end_of_word_suffix": "</w>"}
    tokenizer = _saved(tmp_path, {"model": model, "added_tokens": []})
    with caplog.at_level(logging.WARNING, logger="llmkit"):
        assert tokenizer.token_ids().word_starts.all()
        tokenizer.token_ids()
    assert [record.message for record in caplog.records if "whole words" in record.message] == [caplog.messages[0]]


def test_a_sentencepiece_model_with_its_spaces_after_the_words(caplog: pytest.LogCaptureFixture) -> None:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn"] * 9),
        model_writer=model,
        model_type="bpe",
        vocab_size=30,
        treat_whitespace_as_suffix=True,
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    assert tokenizer.token_ids().word_starts.all()
    assert "whole words" in caplog.text
    assert tokenizer.lossy  # others put a space before a text, or fold characters


def test_unigram_of_others_does_not_take_its_symbols_from_text(tmp_path: Path) -> None:
    """Their scores of 0 are better than any other; T5 and XLM-R have such files."""
    letters = [[letter, -2.0] for letter in "▁a</s>mk"]
    names = ["<unk>", "</s>", "<pad>", "<mask>", "<extra_id_1>", "<extra_id_0>"]
    model = {"type": "Unigram", "unk_id": 0, "vocab": [*([name, 0.0] for name in names), *letters]}
    added = [_added(1, "</s>", True), _added(3, "<mask>", True)]
    parts = {"model": model, "added_tokens": added, "pre_tokenizer": _metaspace("▁"), "decoder": _metaspace("▁")}
    tokenizer = _saved(tmp_path, parts)
    ids = tokenizer.token_ids()
    assert (ids.mask_id, ids.sentinel_ids, ids.eos_id, ids.pad_id) == (3, (5, 4), 1, 2)
    assert np.flatnonzero(ids.special).tolist() == [0, 1, 2, 3, 4, 5]
    for text in ("a</s>a", "</s>", "<mask> a", "<pad><mask></s>"):  # p and d are unknown, and that is id 0
        assert not {1, 2, 3, 4, 5} & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode("a</s>a<mask> k")) == "a</s>a<mask> k"


def test_symbols_that_a_file_does_not_mark(tmp_path: Path) -> None:
    """Some files list their infill tokens as ordinary added tokens, which text would give."""
    from tokenizers.pre_tokenizers import ByteLevel

    names = ["<|endoftext|>", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "<|user|>"]
    letters = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    added = [_added(256 + n, name, name == names[0]) for n, name in enumerate(names)]
    model = {"type": "BPE", "vocab": letters, "merges": []}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    parts = {"model": model, "added_tokens": added, "pre_tokenizer": level, "decoder": level}
    tokenizer = _saved(tmp_path, parts)
    ids = tokenizer.token_ids()
    assert ids.infill_ids == (257, 258, 259)
    text = "a<｜fim▁begin｜> a<｜fim▁end｜><|endoftext|>"
    assert not ids.special[tokenizer.encode(text)].any()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    (user,) = tokenizer.encode("<|user|>")  # of the file's own making: text as before
    assert not ids.special[user]
    assert tokenizer.decode([letters["a"], 257, letters["a"]]) == "aa"


def test_unused_ids_are_special(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"</s>": 0, "a": 1, "b": 5, "<unk>": 6}, "unk_token": "<unk>"}
    ids = _saved(tmp_path, {"model": model, "added_tokens": []}).token_ids()
    assert np.flatnonzero(ids.special).tolist() == [0, 2, 3, 4, 6]
    assert ids.word_starts.all()
