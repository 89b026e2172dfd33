"""Byte-level BPE by tiktoken: the ids of tokenizers for any text, and only where that is sure."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import DataError
from llmkit.tokenizers.byte_pairs import BytePairs, byte_pairs
from llmkit.tokenizers.hf_json import _LONG_BATCH, HFTokenizer
from tests.unit.tokenizers.strings import documents, strings

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("tiktoken")

PARTS = ["a", "the", " ", "  ", "\n", "\t", "1", "23", "'s", "'", "<|endoftext|>", ".", "é"]
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
STYLES = ("gpt2", "digits", "numbers", "llama")


def _words(style: str) -> Any:
    before = tokenizers.pre_tokenizers
    if style == "gpt2":
        return before.ByteLevel(add_prefix_space=False)
    if style == "llama":
        split = before.Split(tokenizers.Regex(LLAMA), "isolated")
        return before.Sequence([split, before.ByteLevel(add_prefix_space=False, use_regex=False)])
    digits = before.Digits(individual_digits=style == "digits")
    return before.Sequence([digits, before.ByteLevel(add_prefix_space=False)])


def _trained(style: str) -> tuple[dict[str, Any], Any]:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer, backend.decoder = _words(style), tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, show_progress=False, special_tokens=["<|endoftext|>"]
    )
    backend.train_from_iterator([*documents()[:60], *strings()], trainer)
    backend.encode_special_tokens = True
    return json.loads(backend.to_str()), backend


@pytest.fixture(scope="module", params=STYLES)
def pair(request: pytest.FixtureRequest) -> tuple[BytePairs, Any]:
    content, backend = _trained(request.param)
    fast = byte_pairs(content, backend, {0})
    assert fast is not None
    return fast, backend


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    text=st.one_of(
        st.text(max_size=60),
        st.sampled_from(strings()),
        st.lists(st.sampled_from(PARTS)).map("".join),
    )
)
def test_the_same_ids_for_every_text(pair: tuple[BytePairs, Any], text: str) -> None:
    fast, backend = pair
    assert fast.encode(text) in (None, backend.encode(text, add_special_tokens=False).ids)


def test_every_character_between_others(pair: tuple[BytePairs, Any]) -> None:
    """Their tables of letters and digits must agree, whatever their versions of Unicode."""
    fast, backend = pair
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000 and (i < 0x30000 or i >= 0xE0000)]
    unlike = []
    for start in range(0, len(characters), 4096):
        texts = [f"a{c} {c}{c}1{c}  {c}\n" for c in characters[start : start + 4096 : 1]]
        known = backend.encode_batch_fast(texts, add_special_tokens=False)
        unlike += [
            text for text, encoding in zip(texts, known, strict=True) if fast.encode(text) not in (None, encoding.ids)
        ]
    assert unlike == []


def test_unsure_texts_are_left_to_tokenizers(pair: tuple[BytePairs, Any]) -> None:
    fast, _ = pair
    assert fast.encode("a\U00011de0") is None  # a digit since Unicode 17
    assert None not in map(fast.encode, ["漢字かな", "\U0001f600", "\U00020000", "ü \ufffd"])
    assert fast.encode("a" + " " * 500 + "b") is None
    assert fast.encode("word " * 3 + "x" * 2000) is None
    assert fast.encode("a" + " \n" * 250) is None
    for text in ("a" + " " * 499 + "b", " " * 499, "x" * 1999, "", "\n" * 499 + "x" * 1999 + " " * 499):
        assert fast.encode(text) is not None


def _pairs_of(content: dict[str, Any]) -> BytePairs | None:
    return byte_pairs(content, tokenizers.Tokenizer.from_str(json.dumps(content)), {0})


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "WhitespaceSplit"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}},
    ],
)
def test_other_rules_are_left_to_tokenizers(change: dict[str, Any]) -> None:
    content, _ = _trained("gpt2")
    assert _pairs_of(content | change) is None


def test_an_added_token_that_is_found_in_a_text() -> None:
    content, _ = _trained("gpt2")
    token = {"id": 1500, "content": "house", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": False}  # fmt: skip
    assert _pairs_of(content | {"added_tokens": [*content["added_tokens"], token]}) is None


def test_a_piece_that_its_pairs_never_reach() -> None:
    """``abc`` of ``a`` and ``bc``, where ``ab`` is joined first: tiktoken would go on from ``ab`` and ``c``."""
    content, _ = _trained("gpt2")
    vocabulary = {piece: i for piece, i in content["model"]["vocab"].items() if len(piece) == 1 or i == 0}
    n = max(vocabulary.values()) + 1
    vocabulary |= {"ab": n, "bc": n + 1, "abc": n + 2}
    model = content["model"] | {"vocab": vocabulary, "merges": [["a", "b"], ["b", "c"], ["a", "bc"]]}
    assert _pairs_of(content | {"model": model}) is None
    reachable = model | {"merges": [["a", "b"], ["b", "c"], ["ab", "c"]]}
    assert _pairs_of(content | {"model": reachable}) is not None


def test_words_that_are_taken_whole() -> None:
    """As Llama 3 does: the pairs have to reach every piece all the same."""
    content, _ = _trained("gpt2")
    vocabulary = {piece: i - 1 for piece, i in content["model"]["vocab"].items() if i}  # without the end token
    plain = content | {"added_tokens": []}
    whole = content["model"] | {"vocab": vocabulary, "ignore_merges": True}
    fast = _pairs_of(plain | {"model": whole})
    backend = tokenizers.Tokenizer.from_str(json.dumps(plain | {"model": whole}))
    assert fast is None  # of which id 0, a letter now, is said to be silent
    fast = byte_pairs(plain | {"model": whole}, backend, ())
    assert fast is not None
    for text in [*strings(), *documents()[:5]]:
        assert fast.encode(text) in (None, backend.encode(text, add_special_tokens=False).ids)
    n = len(vocabulary)
    zq = vocabulary | {"zq": n, "qz": n + 1, "qzq": n + 2}
    other = whole | {"vocab": zq, "merges": [*whole["merges"], ["z", "q"], ["q", "z"], ["qz", "q"]]}
    assert byte_pairs(plain | {"model": other}, backend, ()) is None  # q and zq come first


def test_a_split_that_may_leave_characters_out() -> None:
    content, _ = _trained("llama")
    changed = json.loads(json.dumps(content))
    changed["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}+"
    assert _pairs_of(content) is not None
    assert _pairs_of(changed) is None


def test_ids_in_another_order_than_the_pairs() -> None:
    content, _ = _trained("gpt2")
    vocabulary = dict(content["model"]["vocab"])
    one, two = ("".join(content["model"]["merges"][i]) for i in (3, 40))
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    assert _pairs_of(content | {"model": content["model"] | {"vocab": vocabulary}}) is None


def test_a_tokenizer_encodes_long_batches_so(monkeypatch: pytest.MonkeyPatch) -> None:
    content, _ = _trained("gpt2")
    tokenizer = HFTokenizer(json.dumps(content), {}, {}, "here")
    texts = [*strings(), "a" + " " * 600 + "b", "word " * (_LONG_BATCH // 5)]
    one_by_one = [tokenizer.encode(text) for text in texts]
    calls = []
    real = BytePairs.encode
    monkeypatch.setattr(BytePairs, "encode", lambda self, text: calls.append(text) or real(self, text))
    assert tokenizer.encode_batch(texts) == one_by_one
    assert calls == texts
    tokenizer.encode_batch(texts[:-1])
    assert calls == texts  # not repaid by a short batch
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode_batch([*texts, "\ud800"])
