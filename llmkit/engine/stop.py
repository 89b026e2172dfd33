"""Stop signals. A handler only sets a flag; the training loop looks at it between steps and between evaluation batches.

SIGTERM comes from schedulers, SIGUSR1 from Slurm's early warning, SIGINT from the keyboard.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from llmkit.errors import EXIT_STOPPED_WITHOUT_CHECKPOINT, Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """A context in which stop signals are noted instead of obeyed. The first one's name is kept in ``name``.

    A second SIGINT leaves at once with 130: no checkpoint is written, the last one stays valid.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._earlier: dict[int, Any] = {}
        self._interrupts = 0

    @property
    def requested(self) -> bool:
        return self.name is not None

    def __enter__(self) -> StopSignal:
        self._earlier = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _restore(self._earlier)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os.write(2, b"\nleaving at once; the last checkpoint is valid\n")
            os._exit(EXIT_STOPPED_WITHOUT_CHECKPOINT["SIGINT"])


@contextmanager
def leave_on_signal() -> Iterator[None]:
    """For the time before the first step, with nothing to save: a stop signal raises ``Stopped`` (130 or 143).

    It is raised again at the end of the block where the code inside took it for a failure of its own and went on.
    """
    raised: list[Stopped] = []

    def leave(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        code = EXIT_STOPPED_WITHOUT_CHECKPOINT[name]
        raised.append(Stopped(f"stopped by {name} before the first step; nothing was saved", exit_code=code))
        raise raised[-1]

    earlier = {number: signal.signal(number, leave) for number in SIGNALS}
    try:
        yield
    finally:
        _restore(earlier)
    if raised:
        raise raised[0]


def _restore(handlers: Mapping[Any, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
