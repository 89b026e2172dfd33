"""A disk that is full, failing or read-only at any operation: a typed error, older checkpoints intact, no leftovers."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.engine import files
from llmkit.engine.run_folder import RunFolder
from llmkit.errors import CheckpointError
from tests.faults.tiny import At, assert_whole, hook, in_child, leftovers, make_store, save, valid_steps


def _refuse(number: int) -> None:
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_every_operation_refused_once(memory_path: Path, number: int) -> None:
    n_refused = 0
    for k in range(1, 1000):
        folder = memory_path / str(k)
        store = make_store(folder)
        save(store, 10)
        save(store, 20)
        at = At(k, lambda: _refuse(number))
        failure = None
        with hook(at):
            try:
                save(store, 30)
            except CheckpointError as error:
                failure = error
        if not at.operation:
            break
        found = valid_steps(folder)
        if failure is None:
            assert found[-1] == 30
            assert at.operation in ("rename", "unlink", "rmdir")
        else:
            n_refused += 1
            assert failure.exit_code == 4
            assert os.strerror(number) in str(failure)
            assert "needs about" in str(failure)
            assert "are free" in str(failure)
            assert set(found) >= {10, 20}
            assert leftovers(folder) == []
        assert assert_whole(make_store(folder).newest()) == found[-1]
        save(store, 40)  # the disk is well again
        assert valid_steps(folder)[-1] == 40
        assert leftovers(folder) == []
        shutil.rmtree(folder)
    assert n_refused > 15


def test_a_disk_that_stays_read_only(memory_path: Path) -> None:
    """Not even the temporary folder can be removed; the error is still the typed one, and the next start is clean."""
    store = make_store(memory_path)
    save(store, 10)
    for k in range(1, 20):
        with (
            hook(At(k, lambda: _refuse(errno.EROFS), for_good=True)),
            pytest.raises(CheckpointError, match="Read-only"),
        ):
            save(store, 20)
        assert assert_whole(make_store(memory_path).newest()) == 10
    save(make_store(memory_path), 20)
    assert valid_steps(memory_path) == [10, 20]
    assert leftovers(memory_path) == []


@pytest.mark.parametrize("limit", [0, 10, 60, 100, 300, 700, 1200])
def test_a_limit_on_the_size_of_files(memory_path: Path, limit: int) -> None:
    """The system itself cuts the write short, inside Python's writer and inside safetensors' one."""
    store = make_store(memory_path)
    save(store, 10)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save(store, 20)

    code = in_child(work)
    largest = max(path.stat().st_size for path in memory_path.rglob("*") if path.is_file())
    assert code == (4 if limit < largest else 0)
    assert valid_steps(memory_path) == ([10] if code else [10, 20])
    assert leftovers(memory_path) == []


FILL = """
import sys
from pathlib import Path
from llmkit.errors import CheckpointError
from tests.faults.tiny import leftovers, make_store, save, valid_steps
folder = Path(sys.argv[1])
store = make_store(folder, keep_last=1000)
for step in range(1, 1000):
    try:
        save(store, step)
    except CheckpointError as error:
        assert valid_steps(folder) == list(range(1, step)), step
        assert leftovers(folder) == []
        assert step > 2
        print(error)
        sys.exit(error.exit_code)
"""


def test_a_small_disk_runs_full(memory_path: Path) -> None:
    fill = f"exec {sys.executable} -c '{FILL}' {memory_path}/checkpoints"
    mount = f"mount -t tmpfs -o size=120k tmpfs {memory_path} && {fill}"
    probe = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*probe, f"mount -t tmpfs tmpfs {memory_path}"]).returncode:
        pytest.skip("no mount namespaces here: a small disk cannot be made")
    done = subprocess.run([*probe, mount], capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert "No space left on device" in done.stdout


def test_too_little_space_at_the_start(memory_path: Path) -> None:
    store = make_store(memory_path / "not" / "there" / "yet")
    store.check_space(1)
    with pytest.raises(CheckpointError, match=r"need 1000000\.0 TB, but only .* are free") as caught:
        store.check_space(10**18)
    assert caught.value.exit_code == 4


def test_an_error_of_the_model_writer_is_not_taken_for_the_disk(memory_path: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyError("weight")

    with pytest.raises(KeyError):
        make_store(memory_path).save(10, state={}, tensors={}, write_model=broken, best=False)
    assert list(memory_path.iterdir()) == []


def test_result_on_a_full_disk(memory_path: Path) -> None:
    folder = RunFolder(memory_path, "mine")
    files.make_folder(folder.path)
    folder.write_result("finished", 0, 5, {"val/loss": 1.0})
    before = (folder.path / "result.json").read_bytes()
    for k in range(1, 4):
        with hook(At(k, lambda: _refuse(errno.ENOSPC))), pytest.raises(CheckpointError, match="No space left"):
            folder.write_result("failed", 1, 6, {})
        assert (folder.path / "result.json").read_bytes() == before
        assert leftovers(folder.path) == []
