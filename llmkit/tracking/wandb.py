"""Weights & Biases as a mirror of ``metrics.jsonl``, kept by a process of its own (``wandb_mirror``).

The training process neither imports wandb nor talks to a server: it starts the mirror, and at the end gives it a few
seconds to catch up. The mirror reads the metrics file, so a slow or dead server, a killed mirror and a killed trainer
cost nothing but the copy.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import llmkit
from llmkit.interfaces import RunInfo
from llmkit.redact import redact
from llmkit.settings import Range
from llmkit.tracking.wandb_mode import Mode, decide_mode

logger = logging.getLogger(__name__)

RUN_FILE = "wandb_run.json"  # in the run folder: the id kept over resumes, and what the mirror needs to know
MIRROR = "llmkit.tracking.wandb_mirror"
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING}


@dataclass(frozen=True)
class WandbTracker:
    """The ``tracking.wandb`` node. ``start`` returns at once, ``log`` does nothing, ``finish`` is bounded."""

    mode: Literal["auto", "online", "offline", "disabled"]
    project: str | None
    entity: str | None
    group: str | None
    tags: list[str]
    poll_seconds: Annotated[float, Range(0.05, 60)]
    init_timeout_seconds: Annotated[float, Range(1, 600)]
    finish_timeout_seconds: Annotated[float, Range(1, 3600)]

    def start(self, run: RunInfo) -> None:
        """Decide the mode and start the mirror. A failure is one warning."""
        mode, note = decide_mode(self.mode, os.environ, Path.home(), Path.cwd())
        if mode == "disabled":
            return
        try:
            write_run_file(run, self._settings(run, mode))
            self._mirror.start(run.folder)
        except OSError as error:
            logger.warning("W&B is off for this run: %s", error)
            return
        if mode == "offline":
            because = f" ({note})" if note else ""
            logger.info("W&B: recording offline%s. Send it later with: %s", because, sync_command(run.folder))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing: the mirror reads ``metrics.jsonl``."""

    def finish(self, status: str) -> None:
        """Wait at most ``finish_timeout_seconds`` for the mirror to catch up, then end it."""
        self._mirror.finish(status, self.finish_timeout_seconds)

    @cached_property
    def _mirror(self) -> _Mirror:
        return _Mirror()

    def _settings(self, run: RunInfo, mode: Mode) -> dict[str, Any]:
        """What the mirror hands to wandb, and its own times in seconds."""
        return {
            "mode": mode,
            "project": self.project or os.environ.get("WANDB_PROJECT") or "llmkit",
            "entity": self.entity,
            "group": self.group,
            "tags": list(self.tags),
            "name": run.name,
            "job_type": run.command,
            "poll_seconds": self.poll_seconds,
            "init_timeout_seconds": self.init_timeout_seconds,
            "finish_timeout_seconds": self.finish_timeout_seconds,
        }


class _Mirror:
    """The child process. Its stdin tells it how the run ended (end of file: the trainer is gone); its stdout has
    lines ``level text`` for the log."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: threading.Thread | None = None
        self._folder = Path()

    def start(self, folder: Path) -> None:
        (folder / "wandb").mkdir(exist_ok=True)
        package = str(Path(llmkit.__file__).resolve().parents[1])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        # -P: a folder called wandb, or a json.py, in the working directory must not be imported instead.
        module = ["-P", "-m", MIRROR]
        with open(folder / "wandb" / "mirror.log", "ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, *module, str(folder), "--trainer", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # the terminal's Ctrl-C is for the trainer
            )
        self._folder = folder
        self._listener = threading.Thread(target=_repeat_to_log, args=(self._process.stdout,), daemon=True)
        self._listener.start()

    def finish(self, status: str, timeout_seconds: float) -> None:
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return
        try:
            process.stdin.write(status.encode())
            process.stdin.close()
        except OSError:  # the mirror ended before us; its exit status says why
            pass
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            _kill_group(process)
            code = process.wait()
        if self._listener is not None:
            self._listener.join(timeout=1)
        if code != 0:
            logger.warning("W&B may lack the end of this run. Send it with: %s", send_command(self._folder))


def write_run_file(run: RunInfo, settings: dict[str, Any]) -> str:
    """Write ``wandb_run.json``, without secrets; the id of an earlier start is kept. Returns the id."""
    path = run.folder / RUN_FILE
    try:
        run_id = str(json.loads(path.read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        run_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    config = redact({**run.config, "facts": run.facts, "command": run.command})
    content = {"id": run_id, "settings": settings, "config": config}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, default=str))
    os.replace(temporary, path)
    return run_id


def sync_command(folder: Path) -> str:
    """The command that uploads what was recorded offline."""
    return f"wandb sync {shlex.quote(str(folder / 'wandb'))}/offline-run-*"


def send_command(folder: Path) -> str:
    """The command that sends what an interrupted upload lacks. ``wandb sync`` would send all of it once more."""
    return f"python -m {MIRROR} {shlex.quote(str(folder))} --send"


def _repeat_to_log(lines: IO[bytes]) -> None:
    """Log what the mirror says, until it ends."""
    for line in lines:
        level, _, text = line.decode(errors="replace").strip().partition(" ")
        if level in _LEVELS:
            logger.log(_LEVELS[level], "W&B: %s", text)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        process.kill()
