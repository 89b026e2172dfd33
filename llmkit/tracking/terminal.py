"""The one console of the process: rich on stderr, shared by the log and the live view so that they do not overwrite
each other."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console


class Terminal(Console):
    """Goes quiet when its reader is gone; rich's own would end the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True

    @contextmanager
    def forgiving(self) -> Iterator[None]:
        """What cannot be written (a terminal that hung up, a full disk, a closed stream) is dropped, not kept."""
        try:
            yield
        except (OSError, ValueError):
            quiet, self.quiet = self.quiet, True
            self.print()  # a quiet console empties its buffer
            self.quiet = quiet


@cache
def terminal() -> Terminal:
    """Writes to whatever ``sys.stderr`` is at the time."""
    return Terminal(stderr=True, highlight=False, markup=False, emoji=False)


def can_redraw() -> bool:
    """True for a person's terminal: not for a file, a pipe, a CI job or a terminal that only appends."""
    if any(os.environ.get(name) for name in ("NO_COLOR", "CI")) or os.environ.get("TERM", "") in ("", "dumb"):
        return False
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # a closed stream
        return False
