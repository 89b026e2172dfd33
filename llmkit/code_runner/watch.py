"""What the processes below a process take, read from ``/proc``; nothing on systems that have none."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

_PROC = Path("/proc")
_LINE = re.compile(r"^(RssAnon|RssShmem|Threads):\s+(\d+)", re.MULTILINE)  # memory in KiB


def usage(root: int) -> tuple[int, int]:
    """(bytes of memory, threads) of the processes below ``root``.

    Mapped files, such as the libraries, are left out. A process that ends meanwhile counts as nothing.
    """
    n_bytes = n_threads = 0
    for process in _below(root):
        with contextlib.suppress(OSError):
            status = (_PROC / str(process) / "status").read_text()
            found = {name: int(value) for name, value in _LINE.findall(status)}
            n_bytes += 1024 * (found.get("RssAnon", 0) + found.get("RssShmem", 0))
            n_threads += found.get("Threads", 0)
    return n_bytes, n_threads


def _below(root: int) -> list[int]:
    found, open_ones = [], [root]
    while open_ones:
        process = open_ones.pop()
        with contextlib.suppress(OSError):
            for thread in os.listdir(_PROC / str(process) / "task"):
                children = [
                    int(child) for child in (_PROC / str(process) / "task" / thread / "children").read_text().split()
                ]
                found += children
                open_ones += children
    return found


def threads_of_user() -> int:
    """How many threads this user has on the machine; kernels before 5.14 count them into the jail's limit."""
    total = 0
    for folder in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.getuid():
                total += len(os.listdir(folder / "task"))
    return total
