"""All trackers of a run as one. A tracker that fails is reported once and not called again; training goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from llmkit.interfaces import RunInfo, Tracker

logger = logging.getLogger(__name__)


class Trackers:
    """Hands every call to each tracker, in order. Only the main process should make one that is not empty."""

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self._working = list(trackers)

    def start(self, run: RunInfo) -> None:
        self._each(lambda tracker: tracker.start(run))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, metrics))

    def finish(self, status: str) -> None:
        """``status`` is ``finished``, ``stopped`` or ``failed``."""
        self._each(lambda tracker: tracker.finish(status))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._working):
            try:
                call(tracker)
            except Exception as error:  # whatever a tracker does wrong is its own affair, not the run's
                self._working.remove(tracker)
                reason = f"{type(error).__name__}: {error}"
                logger.warning("%s is off for the rest of this run: %s", type(tracker).__name__, reason)
