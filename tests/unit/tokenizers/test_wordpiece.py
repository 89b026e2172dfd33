"""WordPiece training: a function of the text, with BERT's ids, and a vocabulary that text can use."""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import ConfigError, DataError, SetupError
from llmkit.tokenizers.hf_json import HFTokenizer
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.report import tokenizer_report
from tests.unit.tokenizers.strings import ADVERSARIAL, BERT_ODD, ODD, documents, trained_wordpiece, wordpiece_spec

pytest.importorskip("tokenizers")


def _pieces(tokenizer: HFTokenizer, folder: Path) -> list[str]:
    tokenizer.save(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return sorted(vocabulary, key=vocabulary.__getitem__)


def test_ids_are_those_of_bert(tmp_path: Path) -> None:
    tokenizer = trained_wordpiece()
    ids = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.token_ids().mask_id)
    assert ids == (0, 1, 2, 3, 4)
    assert tokenizer.vocab_size == 1024
    pieces = _pieces(tokenizer, tmp_path)
    assert pieces[:6] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<extra_id_0>"]
    assert tokenizer.token_ids().sentinel_ids == (5,)
    alphabet = [piece for piece in pieces[6:] if len(piece) == 1]
    assert pieces[6 : 6 + len(alphabet)] == sorted(alphabet)
    assert {f"##{piece}" for piece in alphabet if piece.isalnum()} <= set(pieces)


def test_saved_folder_opens_again(tmp_path: Path) -> None:
    tokenizer = wordpiece_spec(300).train(documents()[:20], tmp_path)
    for opened in (load_tokenizer(tmp_path), wordpiece_spec(path=str(tmp_path)).open()):
        assert opened is not None
        assert opened.fingerprint == tokenizer.fingerprint
        assert opened.encode_batch([*ODD, *BERT_ODD]) == tokenizer.encode_batch([*ODD, *BERT_ODD])
    assert wordpiece_spec(path=str(tmp_path)).key() == {"hf_json": tokenizer.fingerprint}
    assert wordpiece_spec().open() is None


@settings(derandomize=True, max_examples=200, deadline=None)
@given(parts=st.lists(st.one_of(st.text(max_size=30), st.sampled_from(["[MASK]", "</s>", "<extra_id_0>", " "]))))
def test_no_text_makes_a_special_token(parts: list[str]) -> None:
    assert not {0, 2, 3, 4, 5} & set(trained_wordpiece().encode("".join(parts)))


def test_names_of_symbols_are_spelt_out() -> None:
    tokenizer = trained_wordpiece()
    ids = tokenizer.encode(ADVERSARIAL)
    assert not tokenizer.token_ids().special[[i for i in ids if i != tokenizer.unk_id]].any()
    assert tokenizer.decode(tokenizer.encode("a [MASK] b")).replace(" ", "") == "a[mask]b"
    assert tokenizer.decode([2, *tokenizer.encode("some text"), 4, 3, 0]) == "some text"


def _tied_text() -> str:
    """Many words of the same count, made of few characters."""
    choose = random.Random(3)
    words = ["".join(choose.choices("abcdef", k=choose.randint(1, 9))) for _ in range(60)]
    return " ".join(choose.choices(words, k=120))


_TRAIN = """
import sys
from pathlib import Path
from llmkit.tokenizers.wordpiece import WordPieceSpec
spec = WordPieceSpec(60, None, True, None, 0.9999, 2, ["<extra_id_0>"], 1 << 20)
print(spec.train([sys.argv[2]], Path(sys.argv[1])).fingerprint)
"""


def test_same_texts_give_the_same_file(tmp_path: Path) -> None:
    """The library's own order of equally frequent pairs differs from call to call."""
    texts = [_tied_text()]
    found = Counter(wordpiece_spec(60).train(texts, tmp_path).fingerprint for _ in range(10))
    assert len(found) == 1
    other = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3"}
    call = [sys.executable, "-c", _TRAIN, str(tmp_path), *texts]
    done = subprocess.run(call, capture_output=True, text=True, env=other)
    assert done.stdout.strip() in found, done.stderr
    halves = _tied_text().split(" ", 60)
    in_parts = [" ".join(halves[60:]), " ".join(halves[:60])]
    assert wordpiece_spec(60).train(in_parts, tmp_path).fingerprint in found
    assert wordpiece_spec(60).train([f"{_tied_text()} abcabc abcabc"], tmp_path).fingerprint not in found


def test_pairs_are_joined_by_frequency(tmp_path: Path) -> None:
    """By hand: ``ab`` 5 times, ``abc`` 3, ``xy`` 2; the pair seen once is never joined."""
    text = "ab ab abc abc abc xy xy q r qr"
    first = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcqrxy", *[f"##{letter}" for letter in "abcqrxy"]]
    spec = wordpiece_spec(22, extra_symbols=[], character_coverage=1)
    assert _pieces(spec.train([text], tmp_path), tmp_path) == [*first, "ab", "abc", "xy"]
    with pytest.raises(ConfigError, match="too small for a vocabulary of 23") as caught:
        wordpiece_spec(23, extra_symbols=[], character_coverage=1).train([text], tmp_path)
    assert "at most 22" in caught.value.fix
    once = wordpiece_spec(23, extra_symbols=[], character_coverage=1, min_frequency=1)
    assert _pieces(once.train([text], tmp_path), tmp_path) == [*first, "ab", "abc", "xy", "qr"]


def test_vocabulary_too_large_for_the_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too small for a vocabulary of 5000") as caught:
        wordpiece_spec(5000).train(documents()[:3], tmp_path)
    assert caught.value.where == "tokenizer.vocab_size"
    largest = int(re.findall(r"at most (\d+)", caught.value.fix)[0])
    assert wordpiece_spec(largest).train(documents()[:3], tmp_path).vocab_size == largest


def test_vocabulary_too_small_for_the_characters(tmp_path: Path) -> None:
    texts = ["".join(map(chr, range(0x4E00, 0x4E00 + 300)))]  # each a word of its own
    with pytest.raises(ConfigError, match="does not hold the characters") as caught:
        wordpiece_spec(200, character_coverage=1).train(texts, tmp_path)
    assert "at least 306" in caught.value.fix
    assert wordpiece_spec(306, character_coverage=1).train(texts, tmp_path).vocab_size == 306


def test_rare_characters_are_left_out(tmp_path: Path) -> None:
    texts = ["the quick fox " * 2000 + "a b d " * 100 + "abœcd " * 5]
    tokenizer = wordpiece_spec(44, character_coverage=0.9997).train(texts, tmp_path)
    pieces = _pieces(tokenizer, tmp_path)
    assert not [piece for piece in pieces if "œ" in piece]
    assert {"ab", "cd"} <= set(pieces)  # what stands on its two sides is not joined
    assert tokenizer.encode("the œ fox") == [*tokenizer.encode("the"), 1, *tokenizer.encode("fox")]


@pytest.mark.parametrize(
    ("changes", "text", "expected"),
    [
        ({}, "Naïve CAFÉ", "naive cafe"),
        ({"lowercase": False}, "Naïve CAFÉ", "Naïve CAFÉ"),
        ({"lowercase": False, "strip_accents": True}, "Naïve CAFÉ", "Naive CAFE"),
        ({"strip_accents": False}, "Naïve CAFÉ", "naïve café"),
    ],
)
def test_case_and_accents(changes: dict[str, Any], text: str, expected: str, tmp_path: Path) -> None:
    tokenizer = wordpiece_spec(27, character_coverage=1, **changes).train([f"{text} " * 5], tmp_path)
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    assert load_tokenizer(tmp_path).encode(text) == tokenizer.encode(text)


def test_words_that_are_too_long_are_unknown_and_not_trained_on(tmp_path: Path) -> None:
    texts = ["a word " * 50 + "qzjx" * 100_000 + " ab.qz" + "jx" * 60 + ".ba"]  # also fast: the trainer is quadratic
    tokenizer = wordpiece_spec(22).train(texts, tmp_path)
    assert not [piece for piece in _pieces(tokenizer, tmp_path) if "q" in piece]
    assert tokenizer.encode("a" * 101) == [1]
    assert tokenizer.unk_id not in tokenizer.encode("a" * 100)


def test_training_stops_at_its_share_of_the_text(tmp_path: Path) -> None:
    taken = [0]

    def texts() -> Any:
        for text in documents():
            taken.append(len(text.encode()))
            yield text

    wordpiece_spec(300, max_train_bytes=50_000).train(texts(), tmp_path)
    assert sum(taken[:-1]) < 50_000 <= sum(taken)


@pytest.mark.parametrize("texts", [[], [""], [" \n", "\x00"]])
def test_no_text_to_train_on(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        wordpiece_spec().train(texts, tmp_path)


def test_report_says_that_the_round_trip_is_lossy() -> None:
    report = tokenizer_report(trained_wordpiece(), ["fine", "Capital", "two  spaces", "漢"])
    assert (report["round_trip_failures"], report["lossy"], report["n_documents"]) == (3, 1, 4)
    assert report["unknown_fraction"] > 0


@pytest.mark.parametrize(
    ("changes", "n"),
    [
        ({"extra_symbols": ["<a>", "[B]"]}, 0),
        ({"extra_symbols": ["[MASK]", "<a>", "<a>"]}, 2),
        ({"extra_symbols": ["word", "", "<", "naïve"]}, 4),
        ({"vocab_size": 7, "extra_symbols": ["<a>"]}, 1),
    ],
)
def test_problems(changes: dict[str, Any], n: int) -> None:
    assert len(wordpiece_spec(**changes).problems()) == n


def test_key_follows_every_setting_and_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"vocab_size": 1025},
        {"lowercase": False},
        {"strip_accents": True},
        {"character_coverage": 1.0},
        {"min_frequency": 3},
        {"extra_symbols": []},
        {"max_train_bytes": 2048},
    ]
    keys = [wordpiece_spec(**change).key() for change in changes]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9")
    keys.append(wordpiece_spec().key())
    assert all(keys.count(key) == 1 for key in keys)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert wordpiece_spec().problems() == []
    assert wordpiece_spec().key()["trainer"] is None
    with pytest.raises(SetupError) as caught:
        wordpiece_spec().train(["a"], tmp_path)
    assert caught.value.fix == "pip install 'llmkit[hf]'"
