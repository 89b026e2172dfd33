"""Runs a function over tasks in processes, a bounded number at a time, results in the order of the tasks."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from llmkit.errors import MemoryBudgetError

Task = TypeVar("Task")
Result = TypeVar("Result")


def n_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory_bytes() -> int:
    """Highest resident memory of this process so far.

    On Linux from ``/proc``: the value of ``getrusage`` is handed down from the parent to a process it starts.
    """
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Workers:
    """A pool of ``n`` processes; with one, the work is done in this process and none is started.

    Leaving the block by an error or a signal ends the processes within a moment; they also end when their parent dies.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._peaks: dict[int, int] = {}

    def __enter__(self) -> Workers:
        if self.n > 1:
            context = multiprocessing.get_context("spawn")
            self._life_in, self._life_out = context.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(self.n, context, initializer=_start, initargs=(self._life_in,))
        return self

    def __exit__(self, error: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        if self.n > 1:
            if error is not None:
                self._life_out.close()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._life_out.close()
            self._life_in.close()

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """``function`` of every task; at most ``2 n`` tasks are in flight. An error of one is raised in its turn."""
        if self.n == 1:
            yield from map(function, tasks)
            return
        flying: deque[Future[tuple[Result, int, int]]] = deque()
        for task in tasks:
            flying.append(self._pool.submit(_measured, function, task))
            if len(flying) >= 2 * self.n:
                yield self._finished(flying.popleft())
        while flying:
            yield self._finished(flying.popleft())

    def _finished(self, future: Future[tuple[Result, int, int]]) -> Result:
        try:
            result, process, peak = future.result()
        except BrokenProcessPool as error:
            raise MemoryBudgetError(
                "a process that prepared data was killed, most often because memory ran out",
                fix="set data.n_workers=1, or a smaller data.max_document_bytes",
            ) from error
        self._peaks[process] = peak
        return result

    def peak_memory_bytes(self) -> int:
        """Sum over this process and the workers of the highest resident memory of each: a bound of the whole."""
        return peak_memory_bytes() + sum(self._peaks.values())


def _measured(function: Callable[[Task], Result], task: Task) -> tuple[Result, int, int]:
    return function(task), os.getpid(), peak_memory_bytes()


def _start(life: Connection) -> None:
    """Set up a worker: signals are the parent's business, and it ends when the parent closes ``life`` or is gone."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    threading.Thread(target=_watch, args=(life,), daemon=True).start()


def _watch(life: Connection) -> None:
    """Nothing is ever sent: what arrives is the end, and a pipe ends even when its writer was killed."""
    life.poll(None)
    os._exit(1)
