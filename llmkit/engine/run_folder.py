"""The folder of one run, ``root/name``: who may write there, and the small files that say what the run was and did.

``config.yaml``, ``command.txt`` and ``environment.json`` are of the latest start; secrets are masked in all of them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import platform
import re
import shlex
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from llmkit.engine import files
from llmkit.engine.manifest import library_versions
from llmkit.errors import CheckpointError, ConfigError
from llmkit.redact import redact

NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,128}")
LOCK = ".lock"
NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # some cluster file systems
WAIT_FOR_HOLDER_S = 1.0  # the winner of a race writes its name within this time
VARIABLES = re.compile(
    r"(CUDA_VISIBLE_DEVICES|(OMP|MKL)_NUM_THREADS|(LOCAL_)?(RANK|WORLD_SIZE)|SLURM_(JOB_ID|NTASKS|JOB_NODELIST)"
    r"|HF_HUB_OFFLINE|WANDB_MODE|PYTHONHASHSEED|PYTORCH_\w+|NCCL_\w+)"
)

log = logging.getLogger("llmkit.run")
_open_locks: set[int] = set()


class RunFolder:
    """``root/name``. Errors: ``ConfigError`` for a name that is no plain folder name or leads out of ``root``."""

    def __init__(self, root: str | Path, name: str) -> None:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r:.80} cannot be the name of a folder",
                where="run.name",
                fix="use 1 to 128 letters, digits, dots, underscores and hyphens",
            )
        self.path = Path(root).expanduser() / name
        if self.path.resolve() != self.path.parent.resolve() / name:
            raise ConfigError(
                f"{self.path} is a link to {self.path.resolve()}",
                where="run.name",
                fix="name the folder itself with run.root and run.name",
            )

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process. The system frees it when the process ends, however it ends.

        Errors: ``ConfigError`` naming the process that holds it; ``CheckpointError`` when nothing can be written there.
        """
        with _disk_errors(self.path):
            files.make_folder(self.path)
            descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        _open_locks.add(descriptor)
        try:
            with _disk_errors(self.path):
                self._take(descriptor)
            try:
                yield
            finally:
                os.ftruncate(descriptor, 0)
        finally:
            _open_locks.discard(descriptor)
            os.close(descriptor)

    def create(self, config: Mapping[str, Any], command: Sequence[str]) -> None:
        """Write ``config.yaml`` (resolved), ``command.txt`` and ``environment.json``; the caller holds the lock."""
        dumped: str = yaml.safe_dump(redact(config), sort_keys=False, allow_unicode=True)
        contents = {
            "config.yaml": dumped,
            "command.txt": shlex.join(redact(list(command))) + "\n",
            "environment.json": json.dumps(redact(environment()), indent=2) + "\n",
        }
        with _disk_errors(self.path):
            files.make_folder(self.path)
            for name, content in contents.items():
                files.write_atomic(self.path / name, content.encode())

    def write_result(
        self, status: str, exit_code: int, step: int, metrics: Mapping[str, float], error: str = ""
    ) -> None:
        """Write ``result.json``. A metric that is not finite becomes null, which every JSON reader accepts.

        ``error`` is the message that ended the run; the key is left out when there is none.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        result = {"status": status, "exit_code": exit_code, "step": step, "metrics": finite}
        if error:
            result["error"] = redact(error)
        with _disk_errors(self.path):
            files.write_atomic(self.path / "result.json", (json.dumps(result, indent=2) + "\n").encode())

    def _take(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{self.path} is in use by {_holder(descriptor)}",
                where="run.name",
                fix="wait for that run, stop it, or choose another run.name",
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS_HERE:
                raise
            log.warning("%s: this file system has no locks; do not start the same run twice", self.path)
        if os.fstat(descriptor).st_size:
            log.info("%s was left by %s, which ended without a goodbye", self.path, _holder(descriptor))
        me = {"pid": os.getpid(), "host": socket.gethostname(), "started": _now()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(me).encode(), 0)


def environment() -> dict[str, Any]:
    """Versions and facts of the host that explain a run's numbers. No user name, no paths, few variables."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "started": _now(),
        "versions": library_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "n_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpus": gpus,
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "variables": {name: text for name, text in sorted(os.environ.items()) if VARIABLES.fullmatch(name)},
    }


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """What the disk refuses becomes a ``CheckpointError``."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the run folder cannot be written: {error.strerror}",
            where=str(error.filename or path),
            fix="make room or mend the permissions, or set run.root to another place",
        ) from error


def _holder(descriptor: int) -> str:
    """Who wrote its name into the lock file; waits a moment for a winner that has not done so yet."""
    give_up = time.monotonic() + WAIT_FOR_HOLDER_S
    while True:
        try:
            holder = json.loads(os.pread(descriptor, 4096, 0))
            return f"process {holder['pid']} on {holder['host']}, started {holder['started']}"
        except (ValueError, TypeError, KeyError):
            if time.monotonic() > give_up:
                return "another process"
            time.sleep(0.02)


def _close_in_child() -> None:
    """A forked worker that outlives its parent must not keep the parent's lock."""
    for descriptor in _open_locks:
        os.close(descriptor)
    _open_locks.clear()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


os.register_at_fork(after_in_child=_close_in_child)
