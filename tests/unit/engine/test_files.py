from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from llmkit.engine import files


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Name and last path component of every operation."""
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(files, "fail_point", lambda name, *paths: seen.append((name, paths[-1].name)))
    return seen


def test_make_folder_syncs_the_parent_of_every_new_folder(tmp_path: Path, operations: list[tuple[str, str]]) -> None:
    files.make_folder(tmp_path / "a" / "b")
    assert operations == [("mkdir", "a"), ("sync", tmp_path.name), ("mkdir", "b"), ("sync", "a")]
    files.make_folder(tmp_path / "a" / "b")
    assert len(operations) == 4


def test_write_atomic_replaces_in_the_order_that_survives_a_cut(
    tmp_path: Path, operations: list[tuple[str, str]]
) -> None:
    path = tmp_path / "x"
    files.write_atomic(path, b"old")
    files.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [name for name, _ in operations[:4]] == ["write", "sync", "rename", "sync"]
    assert operations[1][1].startswith(".tmp-x-")
    assert operations[3][1] == tmp_path.name
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_write_atomic_replaces_a_link_and_spares_its_target(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "x").symlink_to(tmp_path / "target")
    files.write_atomic(tmp_path / "x", b"new")
    assert (tmp_path / "target").read_text() == "precious"
    assert not (tmp_path / "x").is_symlink()


def test_sync_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    files.write(tmp_path / "x", b"1")
    files.sync(tmp_path)
    assert synced == [str(tmp_path / "x"), str(tmp_path)]


def test_write_refuses_to_overwrite(tmp_path: Path) -> None:
    files.write(tmp_path / "x", b"1")
    with pytest.raises(FileExistsError):
        files.write(tmp_path / "x", b"2")


def test_remove_tree_spares_what_links_point_to(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "file").write_text("x")
    (tree / "link").symlink_to(outside)
    files.remove_tree(tree)
    files.remove_tree(tree)  # gone already: fine
    assert not tree.exists()
    assert (outside / "precious").exists()


def test_every_kind_of_operation_passes_the_fail_point(tmp_path: Path, operations: list[tuple[str, str]]) -> None:
    files.make_folder(tmp_path / "a")
    files.write(tmp_path / "a" / "x", b"")
    files.rename(tmp_path / "a", tmp_path / "b")
    files.remove_tree(tmp_path / "b")
    assert {name for name, _ in operations} == {"mkdir", "write", "sync", "rename", "unlink", "rmdir"}


def test_errno_of_what_the_system_refused() -> None:
    assert files.errno_of(OSError(28, os.strerror(28))) == 28
    assert files.errno_of(SafetensorError("I/O error: No space left on device (os error 28)")) == 28
    assert files.errno_of(ValueError("28")) is None


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (7e15, "7000.0 TB")]
)
def test_size_text(n_bytes: float, text: str) -> None:
    assert files.size_text(n_bytes) == text
