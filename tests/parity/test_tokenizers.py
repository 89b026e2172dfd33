"""Ids of a saved tokenizer against ``transformers.AutoTokenizer``, and of published ones against their own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from llmkit.interfaces import Tokenizer
from llmkit.tasks.encoding import begin
from llmkit.tokenizers.hf_json import HFTokenizer
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.sentencepiece import SentencePieceTokenizer
from tests.unit.tokenizers.strings import documents, strings, trained

pytest.importorskip("transformers")
if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


def _agree(ours: Tokenizer, folder: Path, model_type: str | None) -> None:
    """Ids, decoded text and special tokens of a folder as ``transformers`` reads it."""
    from transformers import AutoTokenizer

    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert len(strings()) >= 500
    for text in [*strings(), documents()[0][:20_000]]:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), text
    assert theirs.eos_token_id == ours.eos_id
    assert theirs.bos_token_id == ours.bos_token_id
    assert len(theirs) == ours.vocab_size
    assert theirs("some text").input_ids == [*begin(ours), *ours.encode("some text")]


@pytest.mark.parametrize("model_type", [None, "llama", "gpt2", "mistral", "qwen3"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_trained_tokenizers(kind: Literal["bpe", "unigram"], model_type: str | None, tmp_path: Path) -> None:
    trained(kind).save(tmp_path)
    _agree(trained(kind), tmp_path, model_type)


def test_a_trained_folder_starts_prompts_with_bos_and_knows_its_symbols(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    trained("bpe").save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("a b").input_ids == [1, *trained("bpe").encode("a b")]
    assert theirs.encode("</s><|user|><pad>", add_special_tokens=False) == [2, 4, 3]  # their users expect this
    assert (theirs.pad_token_id, theirs.unk_token_id) == (3, 0)


def test_a_unigram_of_others(tmp_path: Path) -> None:
    trained("unigram").save(tmp_path)
    tokenizer = HFTokenizer.load(tmp_path)
    tokenizer.save(tmp_path / "copy")
    _agree(tokenizer, tmp_path / "copy", "llama")


def test_stories260k_from_its_json(data_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = data_dir / "models" / "stories260K"
    tokenizer = load_tokenizer(source)
    assert isinstance(tokenizer, HFTokenizer)
    original = AutoTokenizer.from_pretrained(source)
    for text in strings():
        assert original.encode(text, add_special_tokens=False, split_special_tokens=True) == tokenizer.encode(text), (
            text
        )
    tokenizer.save(tmp_path)
    _agree(tokenizer, tmp_path, "llama")


def test_stories260k_from_its_sentencepiece_model(data_dir: Path, tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer.load(data_dir / "models" / "stories260K" / "tokenizer.model")
    tokenizer.save(tmp_path)
    _agree(tokenizer, tmp_path, "llama")


@pytest.mark.parametrize("marked", [True, False])
def test_gpt2_from_its_vocabulary_and_merges(data_dir: Path, tmp_path: Path, marked: bool) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2TokenizerFast

    source = data_dir / "tokenizers" / "gpt2"
    backend: Backend = ByteLevelBPETokenizer.from_file(str(source / "vocab.json"), str(source / "merges.txt"))
    if marked:
        backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HFTokenizer.load(tmp_path)
    original = GPT2TokenizerFast.from_pretrained(source)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (50257, 50256, None)
    for text in strings():
        ids = tokenizer.encode(text)
        assert original.encode(text, split_special_tokens=True) == ids, text
        assert tokenizer.decode(ids) == text
    tokenizer.save(tmp_path / "saved")
    _agree(tokenizer, tmp_path / "saved", "gpt2")
