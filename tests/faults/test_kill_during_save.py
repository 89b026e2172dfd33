"""SIGKILL before every single file operation of a save, also while old checkpoints are removed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.tiny import At, assert_whole, hook, in_child, kill_me, leftovers, make_store, save, valid_steps


def _first(folder: Path) -> None:
    """No checkpoint yet, and no folder either."""


def _full(folder: Path) -> None:
    """As many as are kept: this save removes one."""
    store = make_store(folder)
    save(store, 10)
    save(store, 20)


def _damaged(folder: Path) -> None:
    """A damaged checkpoint of the very step that is saved."""
    _full(folder)
    save(make_store(folder), 30)
    (folder / "step_30" / "state.json").write_text("{}")


def _dirty(folder: Path) -> None:
    """Leftovers of an earlier kill, also of a process with the same id."""
    _full(folder)
    shutil.copytree(folder / "step_20", folder / f".tmp-step_30-{1}")
    shutil.copytree(folder / "step_10", folder / f".old-step_5-{1}")


@pytest.mark.parametrize("prepare", [_first, _full, _damaged, _dirty])
def test_kill_at_every_operation(memory_path: Path, prepare: Callable[[Path], None]) -> None:
    prepare(memory_path / "start" / "checkpoints")
    start = memory_path / "start" / "checkpoints"
    before = valid_steps(start)
    for k in range(1, 1000):
        folder = memory_path / str(k) / "checkpoints"
        if start.exists():
            shutil.copytree(start, folder)

        def work(k: int = k, folder: Path = folder) -> None:
            with hook(At(k, kill_me)):
                store = make_store(folder)
                store.newest()
                save(store, 30)

        code = in_child(work)
        _check(folder, before, done=code == 0)
        shutil.rmtree(memory_path / str(k), ignore_errors=True)
        if code == 0:
            assert k > 15, "a save has more operations than that: the fail points are not reached"
            return
        assert code == -9
    pytest.fail("the save never came to its end")


def _check(folder: Path, before: list[int], *, done: bool) -> None:
    after = valid_steps(folder)
    assert set(make_store(folder).steps()) - {30} <= set(after), "a half removed checkpoint is in sight"
    assert len(after) >= min(len(before), 2)
    assert set(after) <= {*before, 30}
    assert not before or max(after) >= max(before)
    assert not done or max(after) == 30
    store = make_store(folder)
    newest = store.newest()
    if newest is not None:
        assert assert_whole(newest) == max(after)
    save(store, 40)  # the next start goes on, and cleans up
    assert assert_whole(make_store(folder).newest()) == 40
    assert leftovers(folder) == []
