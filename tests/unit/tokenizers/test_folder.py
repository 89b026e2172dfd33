"""Which file of a folder is read, what stands beside it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from llmkit.errors import ConfigError, DataError
from llmkit.tokenizers.folder import read_source, tokenizer_file
from llmkit.tokenizers.hf_json import HFTokenizer, HFTokenizerSpec
from llmkit.tokenizers.load import load_tokenizer
from tests.unit.tokenizers.strings import trained, trained_byte_level

pytest.importorskip("tokenizers")
VOCAB = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}


def _gpt2(folder: Path, vocab: Any = VOCAB, merges: str = "#version: 0.2\na b\n", **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(vocab if isinstance(vocab, str) else json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8", newline="")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_which_file_is_read(tmp_path: Path) -> None:
    assert tokenizer_file(tmp_path) is None
    (tmp_path / "vocab.json").write_text("{}")
    assert tokenizer_file(tmp_path) is None  # without merges it is some other kind
    for name in ("merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_text("")
        found = tokenizer_file(tmp_path)
        assert found is not None
        assert found.name == {"merges.txt": "vocab.json"}.get(name, name)


def test_a_small_gpt2_by_hand(tmp_path: Path) -> None:
    folder = _gpt2(tmp_path, merges="#version: 0.2\r\na b\r\n\r\n", added_tokens={"<x>": 4})
    for path in (folder, folder / "vocab.json"):
        tokenizer = HFTokenizer.load(path)
        assert tokenizer.encode("abba") == [2, 1, 0]
        assert tokenizer.encode("a<x>b") == [0, 4, 1]
        assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_id) == (5, 3, 3)
        assert tokenizer.bos_id is None  # GPT-2's class puts it nowhere
        assert HFTokenizerSpec(path=str(path)).key() == {"hf_json": tokenizer.fingerprint}


@pytest.mark.parametrize(
    ("vocab", "merges", "what"),
    [
        ("{", "a b", "no readable JSON"),
        ("[" * 100_000, "a b", "no readable JSON"),
        ("[]", "a b", "id for every piece"),
        ({"a": "0"}, "a b", "id for every piece"),
        ({"a": 0, "b": True}, "a b", "id for every piece"),
        ({"a": 0, "b": 2}, "a b", "without gaps"),
        ({"a": 0, "b": 0}, "a b", "without gaps"),
        ({"a": 0, "b": 10**30}, "a b", "without gaps"),
        (VOCAB, "a b\nab\n", "two pieces"),
        (VOCAB, "a b c\n", "two pieces"),
        (VOCAB, " a\n", "two pieces"),
        (VOCAB, "a zz\n", "no readable tokenizer"),
    ],
)
def test_damaged_gpt2_files(vocab: Any, merges: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=what) as caught:
        load_tokenizer(_gpt2(tmp_path, vocab, merges))
    assert str(tmp_path) in caught.value.where


def test_a_merge_that_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_tokenizer(_gpt2(tmp_path, merges="#version\na b\nab\n"))
    assert caught.value.where == f"{tmp_path / 'merges.txt'}:3"


def test_other_rules_than_gpt2s_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Qwen2Tokenizer") as caught:
        load_tokenizer(_gpt2(tmp_path, tokenizer_config={"tokenizer_class": "Qwen2TokenizerFast"}))
    assert "save_pretrained" in caught.value.fix


@pytest.mark.parametrize(
    ("added", "what"),
    [
        ({"<x>": 6}, "'<x>' has the id 6, but 4 is the next one"),
        ({"<x>": 4, "<y>": 4}, "share the id 4"),
        ({"<x>": 1}, "'b' and '<x>' share the id 1"),
        ({"ab": 4}, "'ab' has the ids 4 and 2"),
        ({"<x>": "four"}, "no id that is a number"),
        ({"<x>": None}, "no id that is a number"),
    ],
)
@pytest.mark.parametrize("kind", ["vocab.json", "tokenizer.json"])
def test_added_tokens_that_do_not_fit(added: dict[str, Any], what: str, kind: str, tmp_path: Path) -> None:
    _gpt2(tmp_path)
    if kind == "tokenizer.json":
        (tmp_path / kind).write_text(read_source(tmp_path).content, encoding="utf-8")
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(DataError, match=what) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in caught.value.where


def test_an_added_token_takes_over_an_unused_piece(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(_model())
    index = trained("bpe").id_of("<|user|>")
    config = {"added_tokens_decoder": {str(index): {"content": "<|tool|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, HFTokenizer)
    assert tokenizer.id_of("<|tool|>") == index
    assert tokenizer.id_of("<|user|>") is None
    assert tokenizer.vocab_size == 1024
    assert tokenizer.encode("some text") == trained("bpe").encode("some text")


def _model(kind: Literal["bpe", "unigram"] = "bpe") -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        trained(kind).save(Path(folder))
        return (Path(folder) / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("data", [b"", b"\n", b"not a model", b"IQ== 0\nIg== 1\n", b"\xff" * 99])
@pytest.mark.parametrize("beside", [True, False])
def test_damaged_sentencepiece_model(data: bytes, beside: bool, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(data)
    if beside:
        (tmp_path / "special_tokens_map.json").write_text("{}")
    with pytest.raises(DataError, match="no SentencePiece model") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.where == str(tmp_path / "spiece.model")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"model": 3}', '{"model": {"vocab": 3}}', '{"model": {"vocab": [3]}}']
)
def test_damaged_tokenizer_json_with_added_tokens(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "added_tokens.json").write_text('{"<x>": 4}')
    with pytest.raises(DataError, match=r"no readable tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_source(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_source(tmp_path / "tokenizer.model")
    with pytest.raises(DataError, match="no tokenizer in the folder") as caught:
        load_tokenizer(tmp_path)
    assert "spiece.model" in caught.value.fix


def test_flags_in_the_configuration_win_over_the_file(tmp_path: Path) -> None:
    trained_byte_level().save(tmp_path)
    before = HFTokenizer.load(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    decoder = {"4": {"content": "<mask>", "lstrip": True, "special": True}}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"added_tokens_decoder": decoder}))
    content = json.loads(read_source(tmp_path).content)
    (mask,) = (token for token in content["added_tokens"] if token["content"] == "<mask>")
    assert mask["lstrip"] is True
    assert HFTokenizer.load(tmp_path).encode("a <mask>") == before.encode("a <mask>")


@pytest.mark.parametrize("n", [10**12, -1, "many", True, 1.5])
def test_an_absurd_number_of_sentinels(n: Any, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(_model("unigram"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": n}))
    with pytest.raises(DataError, match="extra_ids must be a number up to 10000"):
        load_tokenizer(tmp_path)
