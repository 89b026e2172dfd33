"""What every test may rely on: no network, no tracker, one thread, a cache of its own."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import absl.logging
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# rouge-score logs through absl, whose handler closes its stream when Hydra resets the logging in a sweep: that stream
# would be pytest's capture file. The interpreter's own stderr is left open.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _isolated_environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["LLMKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["PYTHONPATH"] = f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with real data sets, named by LLMKIT_DATA; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("LLMKIT_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set LLMKIT_DATA")
    return folder


@pytest.fixture(autouse=True)
def _fresh_log() -> Iterator[None]:
    """A command run inside a test sets up llmkit's log; the next test finds it as a new process would."""
    yield
    logger = logging.getLogger("llmkit")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
    logging.disable(logging.NOTSET)
    logging.root.setLevel(logging.WARNING)  # Hydra raises it in sweeps
    for name, other in logging.root.manager.loggerDict.items():  # a library's logging setup may have switched them off
        if name.startswith("llmkit") and isinstance(other, logging.Logger):
            other.disabled = False
