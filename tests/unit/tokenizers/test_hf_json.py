"""tokenizer.json files: special tokens found, none made from text, nothing cut."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import ConfigError, DataError, SetupError
from llmkit.tokenizers.hf_json import HFTokenizer, HFTokenizerSpec
from tests.unit.tokenizers.strings import documents, spec, strings, trained

pytest.importorskip("tokenizers")


def _byte_level(folder: Path, specials: tuple[str, ...] = ("<|endoftext|>",), **config: Any) -> Path:
    from tokenizers import ByteLevelBPETokenizer

    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(documents()[:20], vocab_size=600, show_progress=False, special_tokens=list(specials))
    backend.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _byte_level(tmp_path_factory.mktemp("byte_level"))


def _changed(folder: Path, to: Path, **changes: Any) -> Path:
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (to / "tokenizer.json").write_text(json.dumps({**content, **changes}), encoding="utf-8")
    return to


@settings(derandomize=True, max_examples=200, deadline=None)
@given(text=st.one_of(st.text(max_size=60), st.sampled_from(strings())))
def test_byte_level_bpe_gives_back_every_text(folder: Path, text: str) -> None:
    tokenizer = HFTokenizer.load(folder)
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.eos_id, *ids, tokenizer.eos_id]) == text
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


def test_special_tokens_by_their_usual_names(folder: Path) -> None:
    tokenizer = HFTokenizer.load(folder)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (0, None, None)
    assert tokenizer.pad_id == tokenizer.eos_id  # none of its own
    assert tokenizer.vocab_size == 600


def test_special_tokens_that_a_file_names(tmp_path: Path) -> None:
    names = {"eos_token": {"content": "[END]"}, "bos_token": "[GO]", "pad_token": None}
    tokenizer = HFTokenizer.load(_byte_level(tmp_path, ("[END]", "[GO]", "[PAD]"), **names))
    assert (tokenizer.eos_id, tokenizer.bos_token_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.bos_id is None  # no post-processor puts it before a text
    assert 1 not in tokenizer.encode("[GO] home")
    copy = tmp_path / "copy"
    tokenizer.save(copy)
    assert HFTokenizer.load(copy).fingerprint == tokenizer.fingerprint
    assert (copy / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_no_end_of_text_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no end-of-text token") as caught:
        HFTokenizer.load(_byte_level(tmp_path, ("[X]",), eos_token="<not there>"))
    assert "eos_token in tokenizer_config.json" in caught.value.fix
    assert caught.value.where == str(tmp_path / "tokenizer.json")


def test_length_limit_and_padding_in_the_file_are_not_obeyed(folder: Path, tmp_path: Path) -> None:
    limit = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    texts = ["a", "many more words than the limit of this file"]
    expected = HFTokenizer.load(folder).encode_batch(texts)
    assert (
        HFTokenizer.load(_changed(folder, tmp_path, truncation=limit, padding=padding)).encode_batch(texts) == expected
    )


def test_unmarked_end_token_is_left_out_of_text(folder: Path, tmp_path: Path) -> None:
    tokenizer = HFTokenizer.load(_changed(folder, tmp_path, added_tokens=[]))
    assert tokenizer.decode([*tokenizer.encode("a b"), tokenizer.eos_id]) == "a b"


def test_chat_template_and_length_stay_with_the_copy(folder: Path, tmp_path: Path) -> None:
    source = _changed(folder, tmp_path)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "tokenizer_config.json").write_text('{"model_max_length": 77, "tokenizer_class": "Odd", "extra": 1}')
    HFTokenizer.load(source).save(tmp_path / "copy")
    assert (tmp_path / "copy" / "chat_template.jinja").read_text() == "{{ messages }}"
    config = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 77
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["eos_token"] == "<|endoftext|>"


def test_spec(folder: Path, tmp_path: Path) -> None:
    spec = HFTokenizerSpec(path=str(folder))
    assert spec.problems() == []
    assert spec.open().vocab_size == 600
    assert spec.key() == {"hf_json": spec.open().fingerprint}
    assert HFTokenizerSpec(path=str(folder / "tokenizer.json")).key() == spec.key()
    assert [field for field, _ in HFTokenizerSpec(path=None).problems()] == ["path"]
    for wrong in (lambda: HFTokenizerSpec(path=None).open(), lambda: spec.train(["a"], tmp_path)):
        with pytest.raises(ConfigError) as caught:
            wrong()
        assert caught.value.fix


@pytest.mark.parametrize("content", ["", "{}", "[1]", "not json", '{"version": "1.0"}'])
def test_damaged_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"no readable tokenizer\.json") as caught:
        HFTokenizer.load(tmp_path)
    assert caught.value.where == str(tmp_path / "tokenizer.json")


def test_damaged_settings(folder: Path, tmp_path: Path) -> None:
    source = _changed(folder, tmp_path)
    (source / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="no readable JSON"):
        HFTokenizer.load(source)


def test_missing_file_or_package(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        HFTokenizer.load(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(SetupError) as caught:
        HFTokenizer.load(folder)
    assert caught.value.fix == "pip install 'llmkit[hf]'"


def test_half_a_surrogate_pair(folder: Path) -> None:
    with pytest.raises(DataError, match="surrogate"):
        HFTokenizer.load(folder).encode("a\ud800b")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_what_a_sentencepiece_tokenizer_saves_gives_the_same_ids(kind: Any, tmp_path: Path) -> None:
    tokenizer = trained(kind)
    tokenizer.save(tmp_path)
    other = HFTokenizer.load(tmp_path)
    assert other.encode_batch(strings()) == tokenizer.encode_batch(strings())
    assert (other.vocab_size, other.bos_id, other.eos_id, other.pad_id, other.unk_id) == (1024, 1, 2, 3, 0)
    assert [other.decode(ids) for ids in other.encode_batch(strings())] == list(strings())


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_names_of_symbols_are_spelt_out_though_the_training_text_lacks_their_characters(
    kind: Any, tmp_path: Path
) -> None:
    training = [text.translate(dict.fromkeys(map(ord, "<>/|"))) for text in documents()[:15]]
    tokenizer = spec(kind, 400).train(training, tmp_path)
    texts = ["</s>", "a<s>b", "<|user|>", "<0x0A>", "<pad><unk>"]
    assert HFTokenizer.load(tmp_path).encode_batch(texts) == tokenizer.encode_batch(texts)
