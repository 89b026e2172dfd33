"""Which file of a folder is the tokenizer, and the figures of the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmkit.errors import DataError
from llmkit.tokenizers.hf_json import HFTokenizer
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.report import tokenizer_report
from llmkit.tokenizers.sentencepiece import SentencePieceTokenizer
from tests.unit.tokenizers.strings import trained


def test_own_folder_is_read_from_its_model(tmp_path: Path) -> None:
    trained("bpe").save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, SentencePieceTokenizer)
    assert loaded.fingerprint == trained("bpe").fingerprint


def test_folder_of_others_is_read_from_its_json(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    trained("bpe").save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("llmkit_format")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert isinstance(load_tokenizer(tmp_path), HFTokenizer)
    (tmp_path / "tokenizer.json").unlink()
    assert isinstance(load_tokenizer(tmp_path), HFTokenizer)  # the files beside the model have their say
    (tmp_path / "tokenizer_config.json").unlink()
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(DataError, match="no tokenizer in the folder") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.where == str(tmp_path)


def test_damaged_config(tmp_path: Path) -> None:
    trained("bpe").save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="no readable JSON"):
        load_tokenizer(tmp_path)


class _Letters:
    """A tokenizer whose figures can be counted by hand: a letter a token, capitals unknown."""

    vocab_size, bos_id, eos_id, pad_id, unk_id, fingerprint = 128, None, 1, 1, 0, ""

    def encode(self, text: str) -> list[int]:
        return [0 if letter.isupper() else ord(letter) for letter in text]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def save(self, folder: Path) -> None: ...


def test_report_by_hand() -> None:
    assert tokenizer_report(_Letters(), ["ab c", "Äb", "x y z"]) == {
        "bytes_per_token": 12 / 11,
        "tokens_per_word": 11 / 6,
        "unknown_fraction": 1 / 11,
        "round_trip_failures": 1,
        "lossy": 0,
        "n_documents": 3,
    }


def test_report_of_nothing() -> None:
    assert set(tokenizer_report(_Letters(), []).values()) == {0}


def test_report_counts_the_texts_that_do_not_come_back() -> None:
    report = tokenizer_report(trained("bpe"), ["fine", "a\u2581b", "漢字\n\n  \x01"])
    assert report["round_trip_failures"] == 1
    assert report["unknown_fraction"] == 0
