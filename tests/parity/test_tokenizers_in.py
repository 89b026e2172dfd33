"""Tokenizer folders of others, one kind of file at a time, against what ``transformers`` makes of them.

The names of special tokens are text in a text here, so ``split_special_tokens=True`` is asked of the other side.
"""

from __future__ import annotations

import io
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llmkit.errors import DataError
from llmkit.tasks.encoding import begin
from llmkit.tokenizers.hf_json import HFTokenizer
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.sentencepiece import SentencePieceTokenizer
from tests.unit.tokenizers.strings import documents, many_strings, trained_wordpiece

pytest.importorskip("transformers")


def _ids(theirs: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = theirs(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    return ids


def _agree(folder: Path, *, but: tuple[str, ...] = ()) -> HFTokenizer:
    """Ids, texts, size and special tokens of a folder and its saved copy. Texts with a part in ``but`` are spared."""
    from transformers import AutoTokenizer

    ours = load_tokenizer(folder)
    assert isinstance(ours, HFTokenizer)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours.save(folder / "copy")
    copy = AutoTokenizer.from_pretrained(folder / "copy")
    assert load_tokenizer(folder / "copy").fingerprint == ours.fingerprint
    texts = [text for text in many_strings() if not any(part in text for part in but)]
    assert len(texts) >= 2000
    ids = ours.encode_batch(texts)
    shown = [ours.decode(row) for row in ids]
    for other in (theirs, copy):
        assert _differing(texts, ids, _ids(other, texts)) == []
        assert _differing(texts, shown, other.batch_decode(ids, skip_special_tokens=True)) == []
    assert len(theirs) == ours.vocab_size == len(copy)
    ends = (theirs.bos_token_id, theirs.eos_token_id)
    roles = (theirs.cls_token_id, theirs.sep_token_id) if ends == (None, None) else ends
    assert (ours.bos_token_id, ours.eos_id) == roles
    row = [*begin(ours), *ours.encode("some text")]
    assert theirs("some text").input_ids[: len(row)] == row
    assert theirs.pad_token_id in (None, ours.pad_id)
    assert theirs("some text").input_ids == copy("some text").input_ids
    marked = f"a {theirs.eos_token or theirs.sep_token}b c"
    assert theirs.encode(marked, add_special_tokens=False) == ours.encode_symbols(marked)
    return ours


def _differing(texts: list[str], ours: list[Any], theirs: list[Any]) -> list[tuple[str, Any, Any]]:
    assert len(ours) == len(theirs)
    return [row for row in zip(texts, ours, theirs, strict=True) if row[1] != row[2]][:5]


def _write(folder: Path, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


# -- SentencePiece --------------------------------------------------------------------------------------------------


@cache
def _trained(kind: str, **settings: Any) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    lines = [line for text in documents()[:60] for line in text.splitlines() if line]
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=kind,
        vocab_size=700,
        num_threads=4,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


def _llama() -> bytes:
    """Llama 2's settings: byte fallback, no normalisation, a space before every text."""
    return _trained("bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False)


def _t5(**settings: Any) -> bytes:
    return _trained("unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, **settings)


ADDED = {
    "700": {"content": "<|im_start|>", "special": True},
    "701": {"content": "<think>", "special": False, "normalized": False},
    "702": {"content": "<pad>", "special": True, "lstrip": False},
}


@pytest.mark.parametrize("settings", [{}, {"legacy": True}, {"add_prefix_space": False}, {"add_eos_token": True}])
def test_a_sentencepiece_model_with_llamas_class(settings: dict[str, Any], tmp_path: Path) -> None:
    config = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": ADDED, "pad_token": "<pad>"}
    config |= {"add_bos_token": True, "add_eos_token": False, **settings}
    (tmp_path / "tokenizer.model").write_bytes(_llama())
    ours = _agree(_write(tmp_path, tokenizer_config=config, config={"model_type": "llama"}))
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id) == (703, 1, 2, 702, 0)
    assert ours.encode("a<think>")[-1] == 701
    assert 700 not in ours.encode("<|im_start|>")
    assert ours.encode_symbols("<|im_start|>a")[0] == 700


def test_llamas_own_vocabulary_and_an_older_list_of_added_tokens(data_dir: Path, tmp_path: Path) -> None:
    shutil.copy(data_dir / "models" / "stories260K" / "tokenizer.model", tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", "pad_token": "[PAD]", "add_bos_token": True}
    _write(tmp_path, tokenizer_config=config, added_tokens={"[PAD]": 512, "<extra>": 513})
    ours = _agree(tmp_path)
    assert (ours.vocab_size, ours.pad_id) == (514, 512)
    assert 513 in ours.encode("a <extra> b")  # not named as special


def test_a_sentencepiece_model_alone_gives_the_ids_of_the_library(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    for name, model in (("tokenizer.model", _llama()), ("spiece.model", _t5()), ("tokenizer.model", _trained("bpe"))):
        folder = _write(tmp_path / str(len(list(tmp_path.iterdir()))))
        (folder / name).write_bytes(model)
        ours = load_tokenizer(folder)
        assert isinstance(ours, SentencePieceTokenizer)
        library = SentencePieceProcessor(model_proto=model)
        assert ours.encode_batch(many_strings()) == library.encode(list(many_strings()))


def test_a_sentencepiece_model_alone_and_llamas_class(tmp_path: Path) -> None:
    """The library puts a space before every text; Llama's class not before one that begins with one."""
    from transformers import LlamaTokenizer

    (tmp_path / "tokenizer.model").write_bytes(_llama())
    ours, texts = load_tokenizer(tmp_path), list(many_strings())
    theirs = _ids(LlamaTokenizer.from_pretrained(tmp_path), texts)
    differing = [text for text, a, b in zip(texts, ours.encode_batch(texts), theirs, strict=True) if a != b]
    assert differing == [text for text in texts if text[:1] == " "]


def test_a_sentencepiece_model_whose_folder_names_no_class(tmp_path: Path) -> None:
    """The settings in the model are the rules; transformers leaves out the space before a text in this case."""
    (tmp_path / "tokenizer.model").write_bytes(_llama())
    ours = load_tokenizer(_write(tmp_path, special_tokens_map={"pad_token": "</s>"}, config={"model_type": "mistral"}))
    assert isinstance(ours, HFTokenizer)
    alone = SentencePieceTokenizer(_llama())
    assert ours.encode_batch(many_strings()) == alone.encode_batch(many_strings())
    assert ours.pad_id == 2


@pytest.mark.parametrize("files", [{"tokenizer_config": {"tokenizer_class": "T5Tokenizer"}}, {}, {"few": 10}])
def test_a_sentencepiece_model_of_t5(files: dict[str, Any], tmp_path: Path) -> None:
    n = files.get("few", 100)
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": n} if "few" in files else files.get("tokenizer_config")
    (tmp_path / "spiece.model").write_bytes(_t5())
    _write(tmp_path, config={"model_type": "t5"}, **({"tokenizer_config": config} if config else {}))
    # in theirs the names of control symbols and sentinels are pieces that text is cut into, by mistake
    ours = _agree(tmp_path, but=("<pad>", "</s>", "<unk>", "<extra_id_"))
    ids = ours.token_ids()
    assert (ours.vocab_size, ids.pad_id, ids.eos_id, ids.bos_id, ours.unk_id) == (700 + n, 0, 1, None, 2)
    assert ids.sentinel_ids == tuple(range(699 + n, 699, -1))
    for name in ("</s>", "<extra_id_0>", "a <pad>"):
        assert not set(ours.encode(name)) & {0, 1, *ids.sentinel_ids}


def test_t5_rules_with_byte_fallback_spell_what_the_pieces_lack(tmp_path: Path) -> None:
    """As mT5's model does; transformers makes unknown tokens of it."""
    from sentencepiece import SentencePieceProcessor

    (tmp_path / "spiece.model").write_bytes(_t5(byte_fallback=True))
    ours = load_tokenizer(_write(tmp_path, config={"model_type": "mt5"}))
    library = SentencePieceProcessor(model_proto=_t5(byte_fallback=True))
    for text in ("漢字", "a 😀 b", "жизнь"):
        assert ours.encode(text) == library.encode(text)
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("declared", ["XLMRobertaTokenizer", "PegasusTokenizer", None])
def test_a_class_that_moves_the_ids_is_refused(declared: str | None, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(_t5())
    _write(tmp_path, config={"model_type": "xlm-roberta"}, **({"tokenizer_config": {"tokenizer_class": declared}}))
    with pytest.raises(DataError, match=declared or "XLMRobertaTokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "save_pretrained" in caught.value.fix


# -- GPT-2, RoBERTa, BART -------------------------------------------------------------------------------------------


def test_gpt2s_own_vocabulary(data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(data_dir / "tokenizers" / "gpt2", tmp_path, dirs_exist_ok=True)
    ours = _agree(_write(tmp_path, config={"model_type": "gpt2"}))
    assert (ours.vocab_size, ours.eos_id) == (50257, 50256)
    assert [ours.decode(ids) for ids in ours.encode_batch(many_strings())] == list(many_strings())


def _byte_level(folder: Path) -> Path:
    from tokenizers import ByteLevelBPETokenizer

    symbols = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(documents()[:40], vocab_size=800, show_progress=False, special_tokens=symbols)
    backend.save_model(str(folder))
    return folder


MASK = {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "normalized": False, "special": True}


def test_gpt2s_class_with_a_token_before_every_text(tmp_path: Path) -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": True, **names}
    ours = _agree(_write(_byte_level(tmp_path), tokenizer_config=config, config={"model_type": "opt"}))
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (0, 2, 3)


@pytest.mark.parametrize("model_type", ["roberta", "bart"])
@pytest.mark.parametrize("config", [{}, {"add_prefix_space": True, "mask_token": MASK}])
def test_roberta_and_bart(config: dict[str, Any], model_type: str, tmp_path: Path) -> None:
    _write(_byte_level(tmp_path), config={"model_type": model_type}, added_tokens={"<new>": 800})
    if config:
        _write(tmp_path, tokenizer_config=config)
    ours = _agree(tmp_path)
    ids = ours.token_ids()
    assert (ours.vocab_size, ids.bos_id, ids.pad_id, ids.eos_id, ids.mask_id) == (801, 0, 1, 2, 4)
    assert ours.encode("<new>")[-1] == 800


# -- WordPiece and tokenizer.json -----------------------------------------------------------------------------------


def test_wordpiece_with_added_tokens(tmp_path: Path) -> None:
    trained_wordpiece().save(tmp_path / "source")
    vocab = json.loads((tmp_path / "source" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    (tmp_path / "vocab.txt").write_text("".join(f"{line}\n" for line in vocab), encoding="utf-8")
    added = {"1024": {"content": "[NEW]", "special": True}, "1025": {"content": "newword", "special": False}}
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    config = {"tokenizer_class": "BertTokenizer", "added_tokens_decoder": added, **names, "unk_token": "[UNK]"}
    ours = _agree(_write(tmp_path, tokenizer_config=config))
    assert ours.vocab_size == 1026
    assert 1025 in ours.encode("a newword here")


def test_a_tokenizer_json_with_tokens_that_only_its_config_knows(tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer

    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(documents()[:40], vocab_size=800, show_progress=False, special_tokens=["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    added = {"0": {"content": "<|endoftext|>", "special": True}, "800": {"content": "<|im_end|>", "special": True}}
    names = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added, **names}
    ours = _agree(_write(tmp_path, tokenizer_config=config))
    assert (ours.vocab_size, ours.eos_id, ours.bos_token_id, ours.bos_id) == (801, 800, 0, None)
