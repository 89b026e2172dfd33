"""A checkpoint of a few hundred bytes, and the proof that it is read back as it was written."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmkit.engine import files
from llmkit.engine.checkpoint import Checkpoint, CheckpointStore
from llmkit.engine.manifest import verify
from llmkit.errors import CheckpointError


def tensors_of(step: int) -> dict[str, Tensor]:
    """Every kind an optimizer or a generator keeps: 0-d, empty, bytes, bf16, not contiguous."""
    return {
        "exp_avg": torch.arange(12.0).reshape(3, 4).t() + step,
        "step": torch.tensor(float(step)),
        "empty": torch.zeros(0, 4),
        "rng": torch.arange(8, dtype=torch.uint8),
        "low": torch.full((5,), step, dtype=torch.bfloat16),
    }


def write_model(step: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "config.json").write_text(f'{{"step": {step}}}')
        save_file({"weight": torch.full((16,), float(step))}, folder / "model.safetensors")

    return write


def make_store(folder: Path, *, keep_last: int = 2, keep_best: bool = False) -> CheckpointStore:
    return CheckpointStore(folder, keep_last=keep_last, keep_best=keep_best)


def save(store: CheckpointStore, step: int, *, best: bool = False) -> Path:
    return store.save(step, state={"step": step}, tensors=tensors_of(step), write_model=write_model(step), best=best)


def valid_steps(folder: Path) -> list[int]:
    """Steps whose checkpoint is whole, by the hashes and by its content."""
    found = []
    for step in make_store(folder).steps():
        try:
            verify(folder / f"step_{step}")
        except CheckpointError:
            continue
        found.append(step)
    return found


def assert_whole(checkpoint: Checkpoint | None) -> int:
    """The step of a checkpoint whose every value is what ``save`` was given."""
    assert checkpoint is not None
    step = checkpoint.step
    assert checkpoint.state == {"step": step}
    read, wanted = checkpoint.tensors(), tensors_of(step)
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    assert load_file(checkpoint.model / "model.safetensors")["weight"].tolist() == [float(step)] * 16
    return step


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def in_child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked process; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            work()
            code = 0
        except CheckpointError as error:
            code = error.exit_code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class At:
    """A fail point that acts at the ``k``-th operation (from 1), or from there on; ``seen`` counts the operations."""

    def __init__(self, k: int, act: Callable[[], object], *, for_good: bool = False) -> None:
        self.k, self.act, self.for_good, self.seen = k, act, for_good, 0
        self.operation = ""

    def __call__(self, operation: str, *paths: Path) -> None:
        self.seen += 1
        if self.seen == self.k or (self.for_good and self.seen > self.k):
            self.operation = self.operation or operation
            self.act()


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def hook(fail_point: Callable[..., None]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "fail_point", fail_point)
        yield
