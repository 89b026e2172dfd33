"""Tokenizer files of a folder that may come from anyone: links to elsewhere and huge files are refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llmkit.errors import CheckpointError
from llmkit.safe_files import MAX_BYTES
from llmkit.tokenizers.chat_template import ChatTemplate
from llmkit.tokenizers.hf_files import MAX_TEMPLATE_BYTES
from llmkit.tokenizers.load import load_tokenizer
from tests.unit.commands.exporting import trained

pytest.importorskip("tokenizers")
EXTRA = "additional_chat_templates/tool_use.jinja"
BESIDE = ("chat_template.jinja", EXTRA, "special_tokens_map.json", "config.json", "added_tokens.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return filled(tmp_path / "model")


def filled(folder: Path) -> Path:
    (folder / EXTRA).parent.mkdir(parents=True)
    trained("wordpiece").save(folder)
    for name in BESIDE:
        (folder / name).write_text("{}" if name.endswith(".json") else "{{ messages }}")
    return folder


def refused(folder: Path, what: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=what) as caught:
        load_tokenizer(folder)
    return caught.value


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", *BESIDE])
def test_a_link_that_leaves_the_folder(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "secret")
    (folder / name).symlink_to(folder.parent / "secret")
    error = refused(folder, f"{Path(name).name} is a link that leaves the folder")
    assert error.where == str(folder / name)
    if name.endswith(".jinja"):
        with pytest.raises(CheckpointError, match="leaves the folder"):
            ChatTemplate.load(folder)


def test_a_folder_of_templates_elsewhere(folder: Path) -> None:
    (folder / EXTRA).parent.rename(folder.parent / "elsewhere")
    (folder / EXTRA).parent.symlink_to("../elsewhere")
    refused(folder, "tool_use.jinja is a link that leaves the folder")


@pytest.mark.parametrize(
    ("there", "name"),
    [
        (("vocab.txt",), "vocab.txt"),
        (("tokenizer.model",), "tokenizer.model"),
        (("vocab.json", "merges.txt"), "vocab.json"),
        (("vocab.json", "merges.txt"), "merges.txt"),
    ],
)
def test_other_kinds(there: tuple[str, ...], name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for other in there:
        (folder / other).write_text(json.dumps({"a": 0}))
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to("../secret")
    refused(folder, f"{name} is a link that leaves the folder")
    (folder / name).unlink()
    (folder / name).touch()
    os.truncate(folder / name, MAX_BYTES + 1)
    refused(folder, f"{name} has more than {MAX_BYTES} bytes")


def test_a_hub_cache_is_read_through_its_links(tmp_path: Path) -> None:
    for cache in (tmp_path / "models--owner--name", tmp_path / "named"):
        revision, blobs = cache / "snapshots" / "abc123", cache / "blobs"
        filled(revision)
        blobs.mkdir()
        for number, path in enumerate(sorted(path for path in revision.rglob("*") if path.is_file())):
            path.rename(blobs / str(number))
            path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
        assert load_tokenizer(revision).encode("the cat") == trained("wordpiece").encode("the cat")
        template = ChatTemplate.load(revision)
        assert template is not None
        assert sorted(template.sources) == ["default", "tool_use"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", *BESIDE])
def test_a_huge_file_is_not_read(folder: Path, name: str) -> None:
    most = MAX_TEMPLATE_BYTES if name.endswith(".jinja") else MAX_BYTES
    os.truncate(folder / name, most + 1)
    error = refused(folder, f"{Path(name).name} has more than {most} bytes")
    assert error.where == str(folder / name)
