"""SentencePiece tokenizers: exact round trips, special tokens never made from text, nothing lost in training."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from llmkit.errors import ConfigError, DataError
from llmkit.tokenizers.sentencepiece import SentencePieceTokenizer
from tests.unit.tokenizers.strings import ODD, documents, spec, strings, trained

KINDS: list[Literal["bpe", "unigram"]] = ["bpe", "unigram"]
ANY_TEXT = st.one_of(
    st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]), max_size=80),
    st.lists(st.sampled_from([text for text in ODD if text]), max_size=6).map("".join),
)
every_kind = pytest.mark.parametrize("kind", KINDS)


def _pieces(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> list[str]:
    tokenizer.save(tmp_path)
    processor = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    return [processor.id_to_piece(index) for index in range(processor.vocab_size())]


@every_kind
@settings(derandomize=True, max_examples=300, deadline=None)
@given(text=ANY_TEXT)
def test_every_text_comes_back_and_makes_no_special_token(kind: Literal["bpe", "unigram"], text: str) -> None:
    tokenizer = trained(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert min(ids, default=5) >= 5  # 0 to 3, and the extra symbol 4
    assert max(ids, default=0) < tokenizer.vocab_size


@every_kind
def test_a_literal_u2581_is_the_one_thing_that_changes(kind: Literal["bpe", "unigram"]) -> None:
    tokenizer = trained(kind)
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


@every_kind
def test_ids(kind: Literal["bpe", "unigram"]) -> None:
    tokenizer = trained(kind)
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 1024
    ids = tokenizer.encode("some text")
    assert tokenizer.decode([1, *ids, 2, 3, 3]) == "some text"


@every_kind
def test_long_texts_encode_as_short_ones(kind: Literal["bpe", "unigram"], tmp_path: Path) -> None:
    """The texts are cut for speed; the ids must be those of the library for the whole text."""
    tokenizer = trained(kind)
    tokenizer.save(tmp_path)
    processor = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    texts = [*strings(), "".join(documents()[:3]), " " * 5000 + "x" * 5000 + " y" * 3000 + "\n" * 3000]
    assert tokenizer.encode_batch(texts) == [processor.encode(text) for text in texts]
    assert [tokenizer.encode(text) for text in texts] == tokenizer.encode_batch(texts)
    assert tokenizer.encode_batch([]) == []


@every_kind
def test_no_space_is_put_before_a_text(kind: Literal["bpe", "unigram"]) -> None:
    tokenizer = trained(kind)
    assert tokenizer.encode("with") + tokenizer.encode(" some words") == tokenizer.encode("with some words")


@every_kind
def test_no_piece_spans_the_places_where_texts_are_cut(kind: Literal["bpe", "unigram"], tmp_path: Path) -> None:
    assert not [piece for piece in _pieces(trained(kind), tmp_path) if re.search("[^\u2581]\u2581", piece)]


@every_kind
def test_line_ends_and_indents_are_learned(kind: Literal["bpe", "unigram"], tmp_path: Path) -> None:
    pieces = _pieces(trained(kind), tmp_path)
    assert any(re.fullmatch(r"[^\n]+\n", piece) for piece in pieces)
    assert any(re.fullmatch("\u2581{3,}", piece) for piece in pieces)


@every_kind
def test_nothing_of_a_long_line_is_lost_in_training(kind: Literal["bpe", "unigram"], tmp_path: Path) -> None:
    line = (
        " ".join(documents()[:9]).replace("\n", " ") + "qzjxqzjx " * 300
    )  # far above the trainer's limit for one sentence
    assert len(line) > 30_000
    assert any("zjx" in piece for piece in _pieces(spec(kind, 500).train([line], tmp_path), tmp_path))
    wide = "漢字 語彙" * 1000  # three bytes a character
    assert any(
        "語彙" in piece for piece in _pieces(spec(kind, 500).train([*documents()[:9], wide], tmp_path), tmp_path)
    )


@pytest.mark.parametrize("odd", "\t\u2585\u2581\r\0\ufffd")
def test_texts_with_odd_characters_are_trained_on(odd: str, tmp_path: Path) -> None:
    """Some characters stand for something else inside the trainer; the words around them must count."""
    texts = [documents()[0], *[f"qzjxqzjx{odd}qzjxqzjx"] * 100]
    assert any("zjx" in piece for piece in _pieces(spec("bpe", 500).train(texts, tmp_path), tmp_path))


@every_kind
def test_same_texts_give_the_same_model(kind: Literal["bpe", "unigram"], tmp_path: Path) -> None:
    texts = documents()[:20]
    first, second = (spec(kind, 500).train(texts, tmp_path / name) for name in "ab")
    assert first.fingerprint == second.fingerprint
    assert spec(kind, 500).train(texts[1:], tmp_path / "c").fingerprint != first.fingerprint


def test_training_stops_at_its_share_of_the_text(tmp_path: Path) -> None:
    taken = []

    def texts() -> Iterator[str]:
        for text in documents():
            taken.append(len(text.encode()))
            yield text

    spec("bpe", 400, max_train_bytes=50_000).train(texts(), tmp_path)
    assert sum(taken[:-1]) < 50_000 <= sum(taken) < sum(len(text.encode()) for text in documents())


@every_kind
def test_vocabulary_too_large_for_the_text(kind: Literal["bpe", "unigram"], tmp_path: Path) -> None:
    texts = ["the quick brown fox jumps over the lazy dog\n" * 20]
    with pytest.raises(ConfigError, match="too small for a vocabulary of 5000") as caught:
        spec(kind, 5000).train(texts, tmp_path)
    assert caught.value.where == "tokenizer.vocab_size"
    largest = int(re.findall(r"at most (\d+)", caught.value.fix)[0])
    assert spec(kind, largest).train(texts, tmp_path).vocab_size == largest


@every_kind
def test_vocabulary_too_small_for_the_characters(kind: Literal["bpe", "unigram"], tmp_path: Path) -> None:
    texts = ["".join(map(chr, range(0x4E00, 0x4E00 + 300)))]
    with pytest.raises(ConfigError, match="does not hold the characters") as caught:
        spec(kind, 400, character_coverage=1).train(texts, tmp_path)
    least = int(re.findall(r"at least (\d+)", caught.value.fix)[0])
    assert 560 < least < 620


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_no_text_to_train_on(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        spec("bpe", 300).train(texts, tmp_path)


def test_open_a_model(tmp_path: Path) -> None:
    tokenizer = trained("bpe")
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        opened = spec("bpe", path=str(path)).open()
        assert opened is not None
        assert opened.fingerprint == tokenizer.fingerprint
        assert spec("bpe", path=str(path)).key() == {"sentencepiece": tokenizer.fingerprint}
    assert spec("bpe").open() is None


def test_key_follows_every_setting() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"vocab_size": 1025},
        {"character_coverage": 0.99},
        {"split_digits": False},
        {"extra_symbols": []},
        {"max_train_bytes": 2048},
    ]
    keys = [spec("bpe", **change).key() for change in changes] + [spec("unigram").key()]
    assert all(keys.count(key) == 1 for key in keys)


def _model(**options: Any) -> bytes:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn"] * 9),
        model_writer=model,
        minloglevel=2,
        model_type="bpe",
        **options,
    )
    return model.getvalue()


def test_models_that_others_made(tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(_model(vocab_size=30, bos_id=-1, pad_id=-1))
    assert tokenizer.bos_id is None
    assert tokenizer.pad_id == tokenizer.eos_id
    with pytest.raises(ConfigError, match="no end-of-text symbol") as caught:
        SentencePieceTokenizer(_model(vocab_size=30, eos_id=-1), "here")
    assert caught.value.where == "here"
    whole = _model(vocab_size=30)
    for damage in (b"", b"no model", whole[:99], whole[:100]):  # 100 is between two pieces
        (tmp_path / "tokenizer.model").write_bytes(damage)
        with pytest.raises(DataError, match="no SentencePiece model"):
            spec("bpe", path=str(tmp_path)).open()
    with pytest.raises(ConfigError, match="cannot be read"):
        spec("bpe", path=str(tmp_path / "missing")).open()


def test_half_a_surrogate_pair() -> None:
    with pytest.raises(DataError, match="surrogate"):
        trained("bpe").encode("a\ud800b")


@pytest.mark.parametrize(
    ("changes", "n"),
    [
        ({"extra_symbols": ["<a>", "<b>"]}, 0),
        ({"extra_symbols": ["</s>", "", "<a>", "<a>"]}, 3),
        ({"vocab_size": 262, "extra_symbols": ["<a>", "<b>"]}, 1),
    ],
)
def test_problems(changes: dict[str, Any], n: int) -> None:
    assert len(spec("bpe", **changes).problems()) == n
