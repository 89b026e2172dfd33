"""The process that copies ``metrics.jsonl`` of a run to W&B: ``python -m llmkit.tracking.wandb_mirror RUN_FOLDER``.

The trainer starts it (``WandbTracker``). A person can run it with ``--send`` after the training: it asks the server
what it has and sends the rest.

Nothing here can disturb the training: own session, low priority, every wait bounded. It ends when stdin says how the
run ended, or when stdin or the trainer is gone.

Rows keep their number: the n-th row ever sent is W&B's ``_step`` n. A resumed run repeats the rows after its
checkpoint; ``wandb/sent.json`` says which (step, names) were sent, and W&B itself refuses a ``_step`` it has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn

from llmkit.tracking.jsonl import decode_row
from llmkit.tracking.wandb import RUN_FILE, sync_command

EXIT_CODES = {"finished": 0, "stopped": 75}  # W&B shows any other than 0 as failed; 75 is llmkit's own for "stopped"
EXIT_LATE = 3  # W&B did not take everything in time


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

    def believe_server(self, step: Any, count: int) -> bool:
        """A server that has fewer rows than were sent (the rest lies in an offline copy, or was lost) gets them again.

        ``step`` is that of its newest row, None when it has no row. True when that was so.
        """
        if count >= self.count:
            return False
        self.count, self.names = count, set()
        self.step = int(step) + 1 if count and isinstance(step, int | float) else -1
        return True

    def save(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        state = {"count": self.count, "step": self.step, "names": sorted(self.names)}
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(state))
            os.replace(temporary, self.path)


class Mirror:
    """One start of a run: opens it at W&B, copies rows until the end, closes it."""

    def __init__(self, given: argparse.Namespace) -> None:
        content = json.loads((given.folder / RUN_FILE).read_text())
        self.run_id, self.settings, self.config = content["id"], content["settings"], content["config"]
        self.folder: Path = given.folder
        self.trainer: int = given.trainer
        self.sending: bool = given.send
        self.offline: bool = not given.send and (given.offline or self.settings["mode"] == "offline")
        self.ending: str = given.ending  # how the run ended; empty while it goes on
        self.deadline: float = given.deadline  # on the monotonic clock, once the run has ended
        self.restarts: int = given.restarts  # how often the copying may still fail
        self.ended, self.opened = threading.Event(), threading.Event()
        self.sent = Sent(self.folder / "wandb" / "sent.json")
        self.tail = Tail(self.folder / "metrics.jsonl")

    def main(self) -> None:
        if self.sending:
            self.ending = _recorded_ending(self.folder)
            self.ended.set()
        else:
            threading.Thread(target=self._watch_trainer, daemon=True).start()
        try:
            run = self._open()
        except Exception as error:  # wandb raises many kinds; each means that there is no run to log to
            if self.offline or self.sending:
                say("warning", f"no run to copy to: {_one_line(error)}")
                raise
            self._go_offline(_one_line(error))
        self.opened.set()
        try:
            while not self.ended.is_set():
                self._copy(run)
                self.ended.wait(self.settings["poll_seconds"])
            self._copy(run)
        except Exception:  # wandb's own service process died
            traceback.print_exc()
            if self.restarts == 0 or self.sending:
                raise
            self._start_over("--restarts", str(self.restarts - 1))
        run.finish(exit_code=EXIT_CODES.get(self.ending, 1))

    def _open(self) -> Any:
        import wandb

        run = wandb.init(
            mode="offline" if self.offline else "online",
            dir=str(self.folder),
            id=self.run_id,
            resume="allow",
            config=self.config,
            settings=wandb.Settings(**self._wandb_settings(wandb.Settings.model_fields)),
            **{name: self.settings[name] for name in ("project", "entity", "group", "tags", "name", "job_type")},
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        if not self.offline:
            say("info", str(run.url))
            if self.sent.believe_server(run.summary.get("step"), run.step):
                self._retire_older_parts(run.id)
        return run

    def _retire_older_parts(self, run_id: str) -> None:
        """All rows go to the server from here: mark offline parts, so that ``wandb sync`` does not add them again."""
        for part in (self.folder / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"):
            part.with_name(part.name + ".synced").touch()

    def _wandb_settings(self, known: Collection[str]) -> dict[str, Any]:
        """Nothing is uploaded but rows, config and machine load; wandb's own waits are shorter than ours. Settings that
        this version of wandb does not have are left out."""
        finish = self.settings["finish_timeout_seconds"]
        settings = {
            "console": "off",
            "silent": True,
            "disable_git": True,
            "disable_code": True,
            "save_code": False,
            "disable_job_creation": True,
            "program": "llmkit",
            "init_timeout": self.settings["init_timeout_seconds"],
            "finish_timeout": 0.0 if self.sending else 0.7 * finish,  # 0: until all is there
            "finish_timeout_raises": True,
            "x_save_requirements": False,
            "x_stats_pid": self.trainer,
            "x_transaction_log_flush_interval": 1.0,
        }
        return {name: value for name, value in settings.items() if name in known}

    def _copy(self, run: Any) -> None:
        before = self.sent.count
        for row in self.tail.rows():
            news = self.sent.news(row)
            if news:
                run.log(news, step=self.sent.count, commit=True)
                self.sent.add(news)
        if self.sent.count != before:
            self.sent.save()

    def _watch_trainer(self) -> None:
        """In a thread: learn of the end of the run, then see to it that this process ends in time."""
        limit = self.settings["finish_timeout_seconds"]
        if not self.ending:
            self.ending = self._wait_for_ending()
            self.deadline = time.monotonic() + limit
        self.ended.set()
        if not self.opened.wait(0.4 * limit) and not self.offline:
            self._go_offline("no answer before the run ended")
        time.sleep(max(0.0, self.deadline - 0.3 - time.monotonic()))
        os._exit(EXIT_LATE)

    def _wait_for_ending(self) -> str:
        while True:
            readable, _, _ = select.select([0], [], [], 1.0)
            if readable:
                return os.read(0, 64).decode() or "failed"
            if os.getppid() != self.trainer:  # a worker that the trainer forked may still hold the pipe open
                return "failed"

    def _go_offline(self, reason: str) -> NoReturn:
        say("warning", f"recording offline: {reason}. Send it later with: {sync_command(self.folder)}")
        self._start_over("--offline")

    def _start_over(self, *options: str) -> NoReturn:
        """A fresh image of this process in its place: what wandb half opened goes with the old one."""
        state = ["--ending", self.ending, "--deadline", str(self.deadline)]
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *options, *state])


def say(level: str, text: str) -> None:
    """One line for the trainer's log. The trainer may be gone."""
    with contextlib.suppress(OSError):
        os.write(1, f"{level} {text}\n".encode())


def _one_line(error: Exception) -> str:
    """Kind and first words of an error; wandb's messages run over many lines and may quote what a server sent."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _recorded_ending(folder: Path) -> str:
    """How the run ended, as its ``result.json`` says."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((folder / "result.json").read_text())["status"])
    return "finished"


def _forward_stop(trainer: int) -> None:
    """W&B's "stop run" button interrupts this process: hand it to the trainer, which saves and ends."""
    if os.getppid() == trainer:
        os.kill(trainer, signal.SIGTERM)


def _settle(trainer: int) -> None:
    """Low priority, deaf to signals meant for the trainer, and a wandb service of our own."""
    os.nice(10)
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGINT, lambda *_: _forward_stop(trainer))
    os.environ.pop("WANDB_SERVICE", None)
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("GOMAXPROCS", "1")  # wandb's service would take a thread per core


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m llmkit.tracking.wandb_mirror", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trainer", type=int, default=os.getppid())
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--ending", default="")
    parser.add_argument("--deadline", type=float, default=0.0)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--send", action="store_true")
    given = parser.parse_args(arguments)
    if not given.send:
        _settle(given.trainer)
    Mirror(given).main()


if __name__ == "__main__":
    main()
