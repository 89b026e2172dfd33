from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from llmkit.engine.checkpoint import CheckpointStore, open_checkpoint
from llmkit.engine.manifest import FORMAT_VERSION, MANIFEST, Manifest, NewerFormatError, config_hash, verify
from llmkit.errors import CheckpointError
from tests.faults.tiny import assert_whole, leftovers, make_store, save, valid_steps

FORMAT_1 = Path(__file__).parents[2] / "faults" / "format_1" / "step_3"


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run" / "checkpoints")
    assert store.newest() is None
    assert save(store, 0) == tmp_path / "run" / "checkpoints" / "step_0"
    save(store, 10)
    assert assert_whole(store.newest()) == 10
    files = {path.relative_to(store.folder / "step_10").as_posix() for path in store.folder.glob("step_10/**/*.*")}
    assert files == {
        "manifest.json", "state.json", "optimizer.safetensors", "model/config.json", "model/model.safetensors"
    }  # fmt: skip


def test_floats_of_the_state_come_back_exactly(tmp_path: Path) -> None:
    state = {"loss": 0.1 + 0.2, "best": float("inf"), "scale": 65536.0, "text": "ü", "nested": {"list": [1, 2.5, None]}}
    store = make_store(tmp_path)
    store.save(1, state=state, tensors={}, write_model=lambda folder: None, best=False)
    checkpoint = make_store(tmp_path).newest()
    assert checkpoint is not None
    assert checkpoint.state == state
    assert checkpoint.tensors() == {}


def test_the_manifest_says_what_the_run_was(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2, keep_best=False, facts={"world_size": 2, "config": "ab"})
    save(store, 5, best=True)
    body = json.loads((tmp_path / "step_5" / MANIFEST).read_text())
    assert body["format_version"] == FORMAT_VERSION == 1
    assert body["step"] == 5
    assert body["best"] is True
    assert body["facts"] == {"world_size": 2, "config": "ab"}
    assert body["versions"]["torch"] == torch.__version__
    sizes = {path: record["bytes"] for path, record in body["files"].items()}
    assert sizes["state.json"] == (tmp_path / "step_5" / "state.json").stat().st_size
    assert verify(tmp_path / "step_5").n_bytes == sum(sizes.values())


def test_order_is_by_step_not_by_time_or_by_letters(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep_last=5)
    for step in (9, 10, 100):
        save(store, step)
    for step, clock in ((9, 3e9), (10, 2e9), (100, 1e9)):
        os.utime(tmp_path / f"step_{step}", (clock, clock))
    assert make_store(tmp_path).steps() == [9, 10, 100]
    assert assert_whole(make_store(tmp_path).newest()) == 100


def test_names_that_are_no_checkpoints_are_left_alone(tmp_path: Path) -> None:
    names = ["step_", "step_x", "step_-1", "step_01", "notes", "step_5.bak"]
    for name in names:
        (tmp_path / name).mkdir()
    store = make_store(tmp_path)
    assert store.steps() == []
    for step in (1, 2, 3, 4):
        save(store, step)
    assert {*names, "step_3", "step_4"} == {path.name for path in tmp_path.iterdir()}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep_last=3)
    for step in range(1, 8):
        save(store, step, best=step == 2)
    assert valid_steps(tmp_path) == [5, 6, 7]
    assert leftovers(tmp_path) == []


def test_the_best_is_kept_also_after_a_new_start(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep_best=True)
    for step in (1, 2, 3, 4):
        save(store, step, best=step in (1, 2))
    assert valid_steps(tmp_path) == [2, 3, 4]
    store = make_store(tmp_path, keep_best=True)
    store.newest()
    save(store, 5)
    assert valid_steps(tmp_path) == [2, 4, 5]
    save(store, 6, best=True)
    assert valid_steps(tmp_path) == [5, 6]


def test_a_damaged_best_is_no_best(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep_last=4, keep_best=True)
    for step in (1, 2, 3, 4):
        save(store, step, best=step in (1, 2))
    (tmp_path / "step_2" / "state.json").write_text("")
    store = make_store(tmp_path, keep_best=True)
    store.newest()
    save(store, 5)
    assert store.steps() == [1, 4, 5]


def test_fewer_than_two_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last=1"):
        make_store(tmp_path, keep_last=1)


def test_a_step_already_saved_is_left_as_it_is(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    save(store, 10)
    before = (tmp_path / "step_10").stat().st_ino
    save(store, 10)
    store = make_store(tmp_path)
    store.newest()
    save(store, 10)
    assert (tmp_path / "step_10").stat().st_ino == before


@pytest.mark.parametrize("step", [5, 10])
def test_checkpoints_of_another_run_are_not_mixed_with_ones_own(tmp_path: Path, step: int) -> None:
    save(make_store(tmp_path), 10)
    with pytest.raises(CheckpointError, match="step_10 of another run"):
        save(make_store(tmp_path), step)
    assert valid_steps(tmp_path) == [10]


def test_leftovers_go_with_the_first_save_or_on_demand(tmp_path: Path) -> None:
    for name in (".tmp-step_7-1", ".old-step_3-1"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "x").write_text("x")
    (tmp_path / ".keep").write_text("not ours")
    store = make_store(tmp_path)
    assert store.newest() is None  # a reader removes nothing: the writer may be at work
    assert len(leftovers(tmp_path)) == 3
    store.clean()
    assert leftovers(tmp_path) == [".keep"]


def test_a_newer_format_is_refused_and_never_skipped(tmp_path: Path) -> None:
    save(make_store(tmp_path), 10)
    save(make_store(tmp_path), 20)
    known = verify(tmp_path / "step_20")
    newer = Manifest(20, False, {}, known.versions, known.files, format_version=FORMAT_VERSION + 1)
    (tmp_path / "step_20" / MANIFEST).write_bytes(newer.render())
    with pytest.raises(NewerFormatError, match="format 2 is newer than this llmkit reads") as caught:
        make_store(tmp_path).newest()
    assert caught.value.exit_code == 4


def test_a_manifest_with_other_fields_is_damage(tmp_path: Path) -> None:
    from llmkit.engine import manifest

    save(make_store(tmp_path), 10)
    for body in ({"format_version": 1}, {"format_version": "1"}):
        (tmp_path / "step_10" / MANIFEST).write_bytes(manifest._render(body))
        with pytest.raises(CheckpointError, match="fields of format 1"):
            verify(tmp_path / "step_10")
    (tmp_path / "step_10" / MANIFEST).write_text("[1]")
    with pytest.raises(CheckpointError, match="its own SHA-256"):
        verify(tmp_path / "step_10")


def test_format_1_is_read_for_ever() -> None:
    """Files as the first release wrote them."""
    assert assert_whole(open_checkpoint(FORMAT_1)) == 3


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_file_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    earlier = os.umask(umask)
    try:
        save(make_store(tmp_path), 1)
    finally:
        os.umask(earlier)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "step_1").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}


def test_nothing_saved_needs_pickle(tmp_path: Path) -> None:
    save(make_store(tmp_path), 1)
    names = {path.suffix for path in (tmp_path / "step_1").rglob("*") if path.is_file()}
    assert names == {".json", ".safetensors"}


def test_tensors_that_require_gradients_or_share_no_layout(tmp_path: Path) -> None:
    tensors = {"p": torch.nn.Parameter(torch.ones(2, 3)), "t": torch.arange(6.0).view(2, 3).t()}
    make_store(tmp_path).save(1, state={}, tensors=tensors, write_model=lambda folder: None, best=False)
    read = open_checkpoint(tmp_path / "step_1").tensors()
    assert torch.equal(read["p"], torch.ones(2, 3))
    assert torch.equal(read["t"], tensors["t"])


def test_config_hash_ignores_the_order_of_keys() -> None:
    assert config_hash({"a": 1, "b": {"c": 2, "d": 3}}) == config_hash({"b": {"d": 3, "c": 2}, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})
