"""The text log: ``logging.getLogger("llmkit")`` to the terminal (stderr), and to ``train.log`` of the run.

Every line goes through one formatter that hides secrets and makes control characters visible, because text from data
ends up in logs. A log that cannot be written (closed stream, full disk) goes quiet; it never stops a run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from pathlib import Path

from rich.text import Text

from llmkit.redact import redact_text
from llmkit.tracking.terminal import terminal

LOGGER = "llmkit"
PROGRESS = "llmkit.progress"  # one line a logged step: left out of the terminal while a live view shows the same

# C0 and C1 controls but tab and newline, direction overrides, line separators, lone surrogates.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_STYLES = {logging.DEBUG: "dim", logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}


def visible(text: str) -> str:
    """``text`` with control characters spelt out, so that data cannot steer a terminal: ESC becomes ``\\x1b``."""
    return _CONTROLS.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def setup_logging(rank: int = 0, *, debug: bool = False) -> None:
    """Send llmkit's log to stderr: everything on rank 0, warnings with the rank in front elsewhere."""
    logger = logging.getLogger(LOGGER)
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    logger.propagate = False
    logger.setLevel(logging.DEBUG if debug else logging.INFO if rank == 0 else logging.WARNING)
    handler = TerminalHandler()
    handler.setFormatter(SafeFormatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    logger.addHandler(handler)


def log_to(path: Path) -> None:
    """Also write the log to ``path``, plain, each line with its time. One file at a time: a second call moves on."""
    logger = logging.getLogger(LOGGER)
    for old in [h for h in logger.handlers if isinstance(h, LogFile)]:
        logger.removeHandler(old)
        old.close()
    try:
        handler = LogFile(path)
    except OSError as error:
        logger.warning("no log file %s: %s", path, error.strerror)
        return
    handler.setFormatter(SafeFormatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(handler)


class SafeFormatter(logging.Formatter):
    """One record as text without secrets or control characters; lines after the first are indented."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        shown = logging.makeLogRecord(record.__dict__ | {"msg": level + record.getMessage(), "args": None})
        return visible(redact_text(super().format(shown))).replace("\n", "\n  ")


class TerminalHandler(logging.Handler):
    """Prints through rich's console, which keeps lines above a live view."""

    live = False  # while a live view shows the progress

    def emit(self, record: logging.LogRecord) -> None:
        if self.live and record.name == PROGRESS:
            return
        text = Text(self.format(record), style=_STYLES.get(record.levelno, ""))
        with terminal().forgiving():
            terminal().print(text, soft_wrap=True)


class LogFile(logging.Handler):
    """Appends lines without a buffer of its own, so that a line that does not fit on the disk is lost alone."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            os.write(self._fd, (self.format(record) + "\n").encode(errors="backslashreplace"))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        super().close()
