"""Damage to any file of the newest checkpoint is found, named, and answered by the one before it."""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llmkit.engine.manifest import verify
from llmkit.errors import CheckpointError
from tests.faults.tiny import assert_whole, make_store, save, valid_steps

FILES = ("manifest.json", "state.json", "optimizer.safetensors", "model/config.json", "model/model.safetensors")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _remove(path: Path) -> None:
    path.unlink()


def _extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def _swap_for_a_link(path: Path) -> None:
    other = path.parent / ".." / ".." / f"copy of {path.name}"
    shutil.move(path, other)
    path.symlink_to(other)


def _swap_for_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (_flip, _cut, _empty, _remove, _extend, _swap_for_a_link, _swap_for_a_folder)


@pytest.fixture
def checkpoints(memory_path: Path) -> Path:
    store = make_store(memory_path / "checkpoints")
    save(store, 10)
    save(store, 20)
    return store.folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_the_previous_one_taken(
    checkpoints: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(checkpoints / "step_20" / name)
    with caplog.at_level(logging.WARNING):
        assert assert_whole(make_store(checkpoints).newest()) == 10
    assert "step_20 is damaged" in caplog.text
    assert name in caplog.text


@pytest.mark.parametrize("name", ["extra.txt", "model/pytorch_model.bin", "more/deep/file", ".hidden"])
def test_a_file_too_many_is_damage(checkpoints: Path, name: str) -> None:
    path = checkpoints / "step_20" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    with pytest.raises(CheckpointError, match=f"{name} is not listed"):
        verify(checkpoints / "step_20")
    assert assert_whole(make_store(checkpoints).newest()) == 10


def test_a_thousand_flips_and_cuts_are_all_found(checkpoints: Path) -> None:
    rng = random.Random(0)
    folder = checkpoints / "step_20"
    originals = {name: (folder / name).read_bytes() for name in FILES}
    for _ in range(1000):
        name = rng.choice(FILES)
        content = bytearray(originals[name])
        if rng.random() < 0.5:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            del content[rng.randrange(len(content)) :]
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError):
            verify(folder)
        (folder / name).write_bytes(originals[name])
    assert verify(folder).step == 20


def test_none_left_is_an_error_that_lists_each(checkpoints: Path) -> None:
    _flip(checkpoints / "step_20" / "state.json")
    _remove(checkpoints / "step_10" / "optimizer.safetensors")
    with pytest.raises(CheckpointError) as caught:
        make_store(checkpoints).newest()
    assert caught.value.exit_code == 4
    assert "step_20: state.json does not match its SHA-256" in str(caught.value)
    assert "step_10: optimizer.safetensors is missing" in str(caught.value)


@pytest.mark.parametrize("kind", ["empty folder", "file", "link"])
def test_something_else_under_the_name_of_a_checkpoint(checkpoints: Path, kind: str) -> None:
    place = checkpoints / "step_30"
    if kind == "empty folder":
        place.mkdir()
    elif kind == "file":
        place.write_text("x")
    else:
        place.symlink_to(checkpoints / "step_20")
    store = make_store(checkpoints)
    assert assert_whole(store.newest()) == 20
    save(store, 30)
    assert valid_steps(checkpoints) == [20, 30]


def test_a_checkpoint_under_another_step_is_refused(checkpoints: Path) -> None:
    (checkpoints / "step_20").rename(checkpoints / "step_200")
    with pytest.raises(CheckpointError, match=r"manifest\.json is of step 20"):
        verify(checkpoints / "step_200")


def test_damaged_ones_do_not_count_for_retention(checkpoints: Path) -> None:
    """Two are kept: with the newest damaged, the two before it must survive the next save."""
    store = make_store(checkpoints, keep_last=3)
    store.newest()
    save(store, 30)
    _flip(checkpoints / "step_30" / "state.json")
    store = make_store(checkpoints)
    assert assert_whole(store.newest()) == 20
    save(store, 25)
    assert valid_steps(checkpoints) == [20, 25]
    save(store, 30)
    assert valid_steps(checkpoints) == [25, 30]
