"""The one console of the process: rich on stderr, shared by the log and the live view so that they do not overwrite
each other."""

from __future__ import annotations

import os
import sys
from functools import cache

from rich.console import Console


class Terminal(Console):
    """Goes quiet when its reader is gone; rich's own would end the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


@cache
def terminal() -> Terminal:
    """Writes to whatever ``sys.stderr`` is at the time."""
    return Terminal(stderr=True, highlight=False, markup=False, emoji=False)


def can_redraw() -> bool:
    """True for a person's terminal: not for a file, a pipe, a CI job or a terminal that only appends."""
    if any(os.environ.get(name) for name in ("NO_COLOR", "CI")) or os.environ.get("TERM", "dumb") == "dumb":
        return False
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # a closed stream
        return False
