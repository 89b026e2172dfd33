"""Links: what the user names is followed; what a folder brings may lead to the blobs of a hub cache, not elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.errors import CheckpointError, ConfigError
from llmkit.safe_files import followed
from llmkit.tokenizers.hf_json import HFTokenizerSpec
from llmkit.tokenizers.load import load_tokenizer
from tests.unit.tokenizers.strings import spec, trained, trained_byte_level, trained_wordpiece, wordpiece_spec

pytest.importorskip("tokenizers")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder elsewhere with a tokenizer of each kind."""
    trained("bpe").save(tmp_path / "kept" / "bpe")
    trained_wordpiece().save(tmp_path / "kept" / "words")
    trained_byte_level().save(tmp_path / "kept" / "bytes")
    return tmp_path / "kept"


def link(place: Path, target: Path) -> Path:
    place.parent.mkdir(exist_ok=True, parents=True)
    place.symlink_to(target)
    return place


def test_a_link_that_the_user_names_is_the_file_it_leads_to(kept: Path, tmp_path: Path) -> None:
    path = link(tmp_path / "mine" / "my.json", kept / "bytes" / "tokenizer.json")
    ours = HFTokenizerSpec(str(path)).open()
    assert ours.fingerprint == trained_byte_level().fingerprint
    path = link(tmp_path / "mine" / "again", link(tmp_path / "mine" / "my.model", kept / "bpe" / "tokenizer.model"))
    assert spec("bpe", path=str(path)).open().fingerprint == trained("bpe").fingerprint  # type: ignore[union-attr]
    path = link(tmp_path / "mine" / "tokenizer.json", kept / "words" / "tokenizer.json")
    opened = wordpiece_spec(path=str(path)).open()
    assert opened is not None
    assert opened.fingerprint == trained_wordpiece().fingerprint
    folder = link(tmp_path / "mine" / "folder", kept / "bytes")
    assert HFTokenizerSpec(str(folder)).open().fingerprint == trained_byte_level().fingerprint


@pytest.mark.parametrize("kind", ["bpe", "words", "bytes"])
def test_a_folder_whose_files_are_links_to_elsewhere_is_refused(kind: str, kept: Path, tmp_path: Path) -> None:
    for file in (kept / kind).iterdir():
        link(tmp_path / "bad" / file.name, file)
    with pytest.raises(CheckpointError, match="leaves the folder"):
        load_tokenizer(tmp_path / "bad")
    with pytest.raises(CheckpointError, match="leaves the folder"):
        HFTokenizerSpec(str(tmp_path / "bad")).open()


@pytest.mark.parametrize("kind", ["bpe", "words", "bytes"])
def test_a_hub_cache_can_be_opened_by_its_folder_and_by_its_files(kind: str, kept: Path, tmp_path: Path) -> None:
    """``snapshots/<revision>/<name>`` leads to ``../../blobs/<hash>``; the files beside a named one count."""
    cache = tmp_path / "hub" / "models--owner--tiny"
    (cache / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted((kept / kind).iterdir())):
        file.rename(cache / "blobs" / str(number))
        link(cache / "snapshots" / "0a1b" / file.name, Path("..") / ".." / "blobs" / str(number))
    snapshot = cache / "snapshots" / "0a1b"
    expected = {"bpe": trained("bpe"), "words": trained_wordpiece(), "bytes": trained_byte_level()}[kind]
    assert load_tokenizer(snapshot).encode("some text") == expected.encode("some text")
    named = snapshot / ("tokenizer.model" if kind == "bpe" else "tokenizer.json")
    assert followed(named) == named
    opened = spec("bpe", path=str(named)).open() if kind == "bpe" else HFTokenizerSpec(str(named)).open()
    assert opened is not None
    assert opened.eos_id == expected.eos_id
    assert opened.encode("some text") == expected.encode("some text")


def test_what_cannot_be_followed_is_left_to_the_reader(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", link(tmp_path / "dangling", tmp_path / "none")):
        assert followed(path) == path
    circle = link(tmp_path / "circle", tmp_path / "circle")
    assert followed(circle) == circle
    with pytest.raises(ConfigError, match="cannot be read"):
        HFTokenizerSpec(str(circle)).open()
