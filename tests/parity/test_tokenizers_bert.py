"""WordPiece ids against ``transformers``' BertTokenizerFast, and symbols that objectives need in its eyes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.interfaces import Tokenizer
from llmkit.tokenizers.load import load_tokenizer
from tests.unit.tokenizers.strings import (
    ADVERSARIAL,
    BERT_ODD,
    documents,
    spec,
    strings,
    trained_wordpiece,
    wordpiece_spec,
)

pytest.importorskip("transformers")

TEXTS = [*BERT_ODD, ADVERSARIAL, *strings(), documents()[0][:20_000]]


def _agree(ours: Tokenizer, theirs: Any) -> None:
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), text
    ids = ours.token_ids()
    assert (theirs.cls_token_id, theirs.sep_token_id, theirs.pad_token_id) == (ids.bos_id, ids.eos_id, ids.pad_id)
    assert (theirs.mask_token_id, len(theirs)) == (ids.mask_id, ids.vocab_size)
    pair = theirs("some text", "and more")
    first, second = (ours.encode(text) for text in ("some text", "and more"))
    assert pair.input_ids == [ids.bos_id, *first, ids.eos_id, *second, ids.eos_id]
    assert pair.token_type_ids == [0] * (len(first) + 2) + [1] * (len(second) + 1)


@pytest.mark.parametrize("lowercase", [True, False])
def test_trained_wordpiece(lowercase: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerFast

    ours = trained_wordpiece(lowercase)
    ours.save(tmp_path)
    _agree(ours, BertTokenizerFast.from_pretrained(tmp_path))
    _agree(ours, PreTrainedTokenizerFast.from_pretrained(tmp_path))
    for model_type in ("bert", "electra"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        _agree(ours, AutoTokenizer.from_pretrained(tmp_path))


def test_accents_kept_in_lower_case(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    ours = wordpiece_spec(700, strip_accents=False, character_coverage=1).train(documents(), tmp_path)
    _agree(ours, BertTokenizerFast.from_pretrained(tmp_path))


@pytest.mark.parametrize("config", [{}, {"do_lower_case": False}, {"strip_accents": False}])
def test_vocabulary_alone(config: dict[str, Any], tmp_path: Path) -> None:
    """A folder with ``vocab.txt`` only, as older models have it, and the copy that is saved of it."""
    from transformers import BertTokenizerFast

    trained_wordpiece(lowercase=not config).save(tmp_path / "source")
    model = json.loads((tmp_path / "source" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    lines = sorted(model["vocab"], key=model["vocab"].__getitem__)
    (tmp_path / "vocab.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    _agree(ours, BertTokenizerFast.from_pretrained(tmp_path))
    ours.save(tmp_path / "copy")
    _agree(ours, BertTokenizerFast.from_pretrained(tmp_path / "copy"))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_symbols_of_a_sentencepiece_model(kind: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    symbols = ["<mask>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", *[f"<extra_id_{n}>" for n in range(100)]]
    ours = spec(kind, 700, extra_symbols=symbols).train(documents(), tmp_path)
    ids = ours.token_ids()
    for model_type in ("roberta", "t5", "bart"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        assert theirs.mask_token_id == ids.mask_id
        assert theirs.convert_tokens_to_ids(symbols) == [ids.mask_id, *(ids.infill_ids or ()), *ids.sentinel_ids]
        assert theirs.encode("".join(symbols), add_special_tokens=False) == theirs.convert_tokens_to_ids(symbols)
        assert theirs.decode(theirs.encode("a<mask>b<extra_id_7>"), skip_special_tokens=True) == "ab"
        for text in (ADVERSARIAL, "".join(symbols), *strings()[:200]):
            assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ours.encode(text), text
