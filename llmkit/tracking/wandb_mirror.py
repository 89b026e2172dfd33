"""The process that copies ``metrics.jsonl`` of a run to W&B: ``python -m llmkit.tracking.wandb_mirror RUN_FOLDER``.

Nothing here can disturb the training: own session, lowest priority, every wait bounded. It ends when stdin says how the
run ended, or when stdin or the trainer is gone.

Rows keep their number: the n-th row ever sent is W&B's ``_step`` n. A resumed run repeats the rows after its
checkpoint; ``wandb/sent.json`` says which (step, names) were sent, and W&B itself refuses a ``_step`` it has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from llmkit.tracking.jsonl import decode_row
from llmkit.tracking.wandb import RUN_FILE, sync_command

EXIT_CODES = {"finished": 0, "stopped": 75}  # W&B shows any other than 0 as failed; 75 is llmkit's own for "stopped"


class Tail:
    """New rows of a growing file. A file that was cut back or replaced is read again from its start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._last = b""  # the last line read: what must still lie before the offset

    def rows(self) -> Iterator[dict[str, Any]]:
        """Whole lines since the last call; lines that are no rows are left out, the trainer reports those."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset - len(self._last))
                if file.read(len(self._last)) != self._last:
                    self._offset, self._last = 0, b""
                    file.seek(0)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    self._last = line
                    with contextlib.suppress(ValueError):
                        yield decode_row(line)
        except OSError:
            return


class Sent:
    """What W&B has: ``count`` rows, all steps before ``step``, and of that step the metrics ``names``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count, self.step = 0, -1
        self.names: set[str] = set()
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(path.read_text())
            self.count, self.step, self.names = int(state["count"]), int(state["step"]), set(state["names"])

    def news(self, row: dict[str, Any]) -> dict[str, Any]:
        """The part of ``row`` that was not sent, with its step; empty when all was."""
        step = row.get("step")
        if not isinstance(step, int) or step < self.step:
            return {}
        known = self.names if step == self.step else set()
        fresh = {name: value for name, value in row.items() if name != "step" and name not in known}
        return {"step": step, **fresh} if fresh else {}

    def add(self, news: dict[str, Any]) -> None:
        if news["step"] != self.step:
            self.step, self.names = news["step"], set()
        self.names |= news.keys() - {"step"}
        self.count += 1

    def believe_server(self, step: Any, count: int) -> None:
        """A server that has less than we sent lost the rest: send it again."""
        if isinstance(step, int | float) and 0 <= count < self.count and step < self.step:
            self.count, self.step, self.names = count, int(step) + 1, set()

    def save(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        state = {"count": self.count, "step": self.step, "names": sorted(self.names)}
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(state))
            os.replace(temporary, self.path)


class Mirror:
    """One start of a run: opens it at W&B, copies rows until the end, closes it."""

    def __init__(self, folder: Path, trainer: int, *, offline: bool, ending: str) -> None:
        self.folder, self.trainer, self.offline = folder, trainer, offline
        content = json.loads((folder / RUN_FILE).read_text())
        self.run_id, self.settings, self.config = content["id"], content["settings"], content["config"]
        self.offline = offline or self.settings["mode"] == "offline"
        self.ending = ending  # how the run ended; empty while it goes on
        self.ended = threading.Event()
        self.opened = threading.Event()
        self.sent = Sent(folder / "wandb" / "sent.json")
        self.tail = Tail(folder / "metrics.jsonl")

    def main(self) -> None:
        threading.Thread(target=self._watch_trainer, daemon=True).start()
        try:
            run = self._open()
        except Exception as error:  # wandb raises many kinds, and a failed mirror must say so in one line
            if not self.offline:
                self._go_offline(f"{type(error).__name__}: {error}")
            say("warning", f"no copy is recorded: {type(error).__name__}: {error}")
            os._exit(1)
        self.opened.set()
        if not self.offline:
            say("info", f"{run.url}")
            self.sent.believe_server(run.summary.get("step"), run.step)
        while not self.ended.is_set():
            self._copy(run)
            self.ended.wait(self.settings["poll_seconds"])
        self._copy(run)
        self._close(run)
