"""How far a preparation is: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

log = logging.getLogger("llmkit.data")

_LINE_SECONDS = 10.0


class Meter:
    """Counts finished chunks and megabytes of text of one pass after the other; silent unless ``show``."""

    def __init__(self, show: bool) -> None:
        self._show = show
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Meter:
        if self._show and sys.stderr.isatty():
            self._bar = _bar()
            self._bar.start()
        return self

    def __exit__(self, error: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, what: str, n_chunks: int) -> None:
        """Begin a pass."""
        self._what, self._n_chunks = what, n_chunks
        self._n_done = self._n_bytes = 0
        self._began = self._last_line = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(what, total=n_chunks, speed="")

    def advance(self, n_bytes: int) -> None:
        """One chunk with ``n_bytes`` of text is done."""
        self._n_done += 1
        self._n_bytes += n_bytes
        now = time.monotonic()
        speed = f"{self._n_bytes / 1e6:.0f} MB, {self._n_bytes / 1e6 / max(now - self._began, 1e-3):.1f} MB/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, speed=speed)
        elif self._show and now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            log.info("%s: %d of %d pieces, %s", self._what, self._n_done, self._n_chunks, speed)


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}", "{task.fields[speed]}")
    parts = [TextColumn(column) if isinstance(column, str) else column for column in columns]
    return Progress(*parts, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
