"""The cache: reused when nothing changed, rebuilt with the reason when something did, never half there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmkit.data import cache as entries
from llmkit.errors import CheckpointError
from tests.unit.data.helpers import ByteSpec, ByteTokenizer, config, run, texts_of, write_jsonl

TEXTS = [f"document {n}" for n in range(40)]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", TEXTS)


def test_the_same_inputs_are_found_again(cache: Path, corpus: Path) -> None:
    first, second = run(config(corpus, cache)), run(config(corpus, cache))
    assert not first.reused
    assert first.reason == "built: these files were not prepared before"
    assert second.reused
    assert second.reason == "reused: inputs unchanged"
    assert (first.folder, first.report) == (second.folder, second.report)
    assert texts_of(second.train[0]) == TEXTS


@pytest.mark.parametrize(
    "change", [{"seq_len": 32}, {"n_workers": 2}, {"weights": [2.0]}, {"max_bad_fraction": 0.5}], ids=str
)
def test_what_does_not_change_the_tokens_is_no_reason(cache: Path, corpus: Path, change: dict[str, Any]) -> None:
    first = run(config(corpus, cache))
    again = run(config(corpus, cache, **change))
    assert again.reused
    assert again.folder == first.folder


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"val_fraction": 0.25}, "rebuilt: data.val_fraction 0.0 -> 0.25"),
        ({"deduplicate": True}, "rebuilt: data.deduplicate False -> True"),
        ({"max_document_bytes": 64}, "rebuilt: data.max_document_bytes 1048576 -> 64"),
        ({"max_line_bytes": 2048}, "rebuilt: data.max_line_bytes 1048576 -> 2048"),
    ],
    ids=str,
)
def test_what_changes_the_tokens_is_named(cache: Path, corpus: Path, change: dict[str, Any], reason: str) -> None:
    first = run(config(corpus, cache))
    again = run(config(corpus, cache, **change))
    assert not again.reused
    assert again.reason == reason
    assert run(config(corpus, cache)).folder == first.folder  # the older one is still there


def test_another_tokenizer_is_named(cache: Path, corpus: Path) -> None:
    run(config(corpus, cache))
    assert run(config(corpus, cache), ByteSpec(300)).reason == "rebuilt: tokenizer.vocab_size 258 -> 300"


def test_changed_files_are_named(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(f"text of {name}")
    run(config(folder, cache))
    (folder / "a.txt").write_text("another text")
    changed = run(config(folder, cache))
    assert changed.reason == f"rebuilt: {folder / 'a.txt'} changed"
    assert texts_of(changed.train[0]) == ["another text", "text of b.txt"]
    (folder / "b.txt").rename(folder / "c.txt")
    assert run(config(folder, cache)).reason == f"rebuilt: {folder / 'b.txt'} is gone, {folder / 'c.txt'} is new"


def test_a_file_that_this_command_does_not_name_is_not_called_gone(cache: Path, tmp_path: Path) -> None:
    path, val = write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), write_jsonl(tmp_path / "val.jsonl", ["c"])
    run(config(path, cache, val_path=str(val)))
    assert run(config(path, cache)).reason == f"rebuilt: {val} is not named this time"
    before = {"files\nval\nbuiltin:python_docs": "its mark"}
    assert entries._change(*before, before, {}) == "builtin:python_docs is not named this time"


def flip(path: Path, *, keep_time: bool = False) -> None:
    raw, stat = bytearray(path.read_bytes()), path.stat()
    raw[-1] ^= 1
    path.write_bytes(raw)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def of_another_format(path: Path) -> None:
    entries.write_json(path, entries.sealed({"format": 99}))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("train-00-000000.bin", flip, "the content of train-00-000000.bin is damaged"),
        ("train-00-000000.bin", cut, "train-00-000000.bin has"),
        ("train-00-000000.bin", Path.unlink, "train-00-000000.bin cannot be read"),
        ("tokenizer/bytes.json", flip, "the content of bytes.json is damaged"),
        ("report.json", cut, "report.json has"),
        ("manifest.json", cut, "manifest.json of prepared data cannot be read"),
        ("manifest.json", Path.unlink, "manifest.json of prepared data cannot be read"),
        ("manifest.json", lambda path: path.write_text("[]"), "manifest.json is damaged"),
        (
            "manifest.json",
            lambda path: path.write_text(path.read_text().replace("258", "259")),
            "manifest.json is damaged",
        ),
        ("manifest.json", of_another_format, "prepared data is in format 99"),
    ],
)
def test_a_damaged_entry_is_rebuilt(
    cache: Path, corpus: Path, name: str, damage: Callable[[Path], object], reason: str
) -> None:
    folder = run(config(corpus, cache)).folder
    damage(folder / name)
    again = run(config(corpus, cache))
    assert not again.reused
    assert again.reason.startswith(f"rebuilt: {reason}")
    assert texts_of(again.train[0]) == TEXTS
    assert run(config(corpus, cache)).reused
    assert not list(cache.glob(".tmp*"))


def test_damage_that_leaves_no_trace_is_found_by_reading_everything(cache: Path, corpus: Path) -> None:
    folder = run(config(corpus, cache)).folder
    flip(folder / "train-00-000000.bin", keep_time=True)
    assert run(config(corpus, cache)).reused
    assert "is damaged" in run(config(corpus, cache), verify=True).reason


def test_a_copied_entry_is_still_good(cache: Path, corpus: Path, tmp_path: Path) -> None:
    """Other modification times, the same bytes."""
    run(config(corpus, cache))
    shutil.copytree(cache, tmp_path / "copy", copy_function=shutil.copyfile)
    assert run(config(corpus, tmp_path / "copy")).reused


class Broken(ByteSpec):
    error: BaseException = RuntimeError("bug")

    def train(self, texts: Iterable[str], folder: Path) -> ByteTokenizer:
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()], ids=repr)
def test_a_failed_preparation_leaves_nothing(cache: Path, corpus: Path, error: BaseException) -> None:
    class Failing(Broken):
        pass

    Failing.error = error
    with pytest.raises(type(error)):
        run(config(corpus, cache), Failing())
    assert [path.name for path in cache.iterdir()] == [".locks"]
    assert not run(config(corpus, cache)).reused


def test_leftovers_of_killed_processes_are_removed(cache: Path, corpus: Path) -> None:
    """Those of this entry, and of others unless somebody is building them."""
    folder = run(config(corpus, cache)).folder
    shutil.rmtree(folder)
    for entry in (folder.name, "other-0123", "busy-4567"):
        (cache / f".tmp-{entry}-abc").mkdir()
    with entries.locked(cache, "busy-4567"):
        run(config(corpus, cache))
        assert [path.name for path in cache.glob(".tmp*")] == [".tmp-busy-4567-abc"]


def test_of_many_that_start_together_one_builds(cache: Path, corpus: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: run(config(corpus, cache)), range(8)))
    assert sum(not result.reused for result in results) == 1
    assert len({result.folder for result in results}) == 1


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        run(config(corpus, tmp_path / "file"))
    assert caught.value.exit_code == 4


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("LLMKIT_CACHE", raising=False)
    assert entries.cache_root(None) == Path("/x/llmkit")
    monkeypatch.setenv("LLMKIT_CACHE", "~/own")
    assert entries.cache_root(None) == Path.home() / "own"
    assert entries.cache_root("/set") == Path("/set")


@pytest.mark.parametrize(
    ("path", "name"),
    [("/a/b c/my notes.v2.txt", "my_notes"), ("builtin:python_docs", "python_docs"), ("/", "data"), ("/*.txt", "data")],
)
def test_names_of_entries(path: str, name: str) -> None:
    assert entries.entry_name([path], {}).rpartition("-")[0] == name
