"""A power cut at every moment: what was not synced may be lost, and may be lost out of order.

The saves run for real while their operations are recorded. From the record, disks are built that a cut could have left:
entries of a folder that was not synced since are there or not, in any combination; content that was not synced is empty
or garbage. Every such disk must give a valid checkpoint, and none older than the last one whose ``save`` had returned.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llmkit.engine import files
from llmkit.errors import CheckpointError
from tests.faults.tiny import assert_whole, hook, make_store, save


@dataclass
class Change:
    """One change of a folder's entries: ``name`` appears as ``node``, or is gone; a rename is both in one."""

    folder: int
    gone: str | None
    name: str | None
    node: int
    synced: bool = False


@dataclass
class Record:
    """Node 0 is the root. ``content`` holds what a file has for certain; None while it was never synced."""

    root: Path
    changes: list[Change] = field(default_factory=list)
    nodes: dict[Path, int] = field(default_factory=dict)
    content: dict[int, bytes | None] = field(default_factory=dict)
    committed: int | None = None
    disks: list[tuple[list[Change], dict[int, bytes | None], int | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.nodes[self.root] = 0

    def __call__(self, operation: str, *paths: Path) -> None:
        self.note()
        getattr(self, f"_{operation}")(*paths)

    def note(self) -> None:
        """Keep the state a cut at this moment would start from."""
        changes = [Change(**vars(change)) for change in self.changes]
        self.disks.append((changes, dict(self.content), self.committed))

    def _new(self, path: Path, *, is_file: bool) -> int:
        node = self.nodes[path] = len(self.nodes) + len(self.changes) + 1
        if is_file:
            self.content[node] = None
        self.changes.append(Change(self.nodes[path.parent], None, path.name, node))
        return node

    def _mkdir(self, path: Path) -> None:
        self._new(path, is_file=False)

    def _write(self, path: Path) -> None:
        if path.name != "model":
            self._new(path, is_file=True)

    def _sync(self, path: Path) -> None:
        if path.is_file():
            node = self.nodes.get(path) or self._new(path, is_file=True)
            self.content[node] = path.read_bytes()
            return
        for change in self.changes:
            change.synced = change.synced or change.folder == self.nodes[path]

    def _rename(self, source: Path, target: Path) -> None:
        node = self.nodes[source]
        self.changes.append(Change(self.nodes[source.parent], source.name, target.name, node))
        for path in [path for path in self.nodes if path == source or source in path.parents]:
            self.nodes[target / path.relative_to(source)] = self.nodes.pop(path)

    def _unlink(self, path: Path) -> None:
        if path in self.nodes:
            self.changes.append(Change(self.nodes[path.parent], path.name, None, self.nodes.pop(path)))

    _rmdir = _unlink


def _build(place: Path, changes: list[Change], content: dict[int, bytes | None], rng: random.Random) -> None:
    """Write the disk that ``changes`` leave."""
    tree: dict[int, dict[str, int]] = {0: {}}
    for change in changes:
        entries = tree.setdefault(change.folder, {})
        if change.gone is not None and entries.get(change.gone) == change.node:
            del entries[change.gone]
        if change.name is not None:
            entries[change.name] = change.node

    def lay(node: int, path: Path) -> None:
        if node in content:
            certain = content[node]
            unsynced = rng.choice([b"", b"{}", rng.randbytes(50)])
            path.write_bytes(unsynced if certain is None else certain)
            return
        path.mkdir()
        for name, child in tree.get(node, {}).items():
            lay(child, path / name)

    lay(0, place)


def _cuts(record: Record, n_random: int) -> Iterator[tuple[list[Change], dict[int, bytes | None], int | None, int]]:
    for seed, (changes, content, committed) in enumerate(record.disks):
        rng = random.Random(seed)
        for variant in range(2 + n_random):
            chance = (0.0, 1.0)[variant] if variant < 2 else rng.random()
            survived = [change for change in changes if change.synced or rng.random() < chance]
            yield survived, content, committed, seed * 100 + variant


def _record(place: Path) -> Record:
    """Four saves: the first makes the folders, the last two drop a checkpoint; then a damaged one is replaced."""
    place.mkdir()
    record = Record(place)
    folder = place / "runs" / "mine" / "checkpoints"
    with hook(record):
        store = make_store(folder)
        for step in (10, 20, 30, 40):
            save(store, step)
            record.committed = step
        record.note()
    return record


def _worst(memory_path: Path, n_random: int) -> tuple[int, list[str]]:
    """How many disks were built, and what was wrong with those that give no checkpoint, or too old a one."""
    record = _record(memory_path / "real")
    wrong = []
    n_disks = 0
    for changes, content, committed, seed in _cuts(record, n_random):
        n_disks += 1
        place = memory_path / "cut"
        _build(place, changes, content, random.Random(seed))
        try:
            newest = make_store(place / "runs" / "mine" / "checkpoints").newest()
            step = None if newest is None else assert_whole(newest)
        except CheckpointError as error:
            wrong.append(f"{committed}: {error.what}")
        else:
            if committed is not None and (step is None or step < committed):
                wrong.append(f"{committed} was lost, found {step}")
        shutil.rmtree(place)
    return n_disks, wrong


@pytest.mark.parametrize("n_random", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_every_cut_leaves_a_valid_checkpoint(memory_path: Path, n_random: int) -> None:
    n_disks, wrong = _worst(memory_path, n_random)
    assert wrong == []
    assert n_disks >= 90 * (2 + n_random)


@pytest.mark.parametrize("forgotten", ["files", "folders"])
def test_a_forgotten_sync_is_noticed(memory_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    """The simulation itself: without one kind of sync it finds disks that lost a committed checkpoint."""
    sync = files.sync

    def forgetful(path: Path) -> None:
        if path.is_dir() == (forgotten == "files"):
            sync(path)

    monkeypatch.setattr(files, "sync", forgetful)
    _, wrong = _worst(memory_path, n_random=2)
    assert wrong
