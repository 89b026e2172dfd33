"""Where a run's numbers go: ``metrics.jsonl`` first, then the trackers. Only rank 0 has one that writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmkit.interfaces import RunInfo, Tracker
from llmkit.tracking.composite import Trackers
from llmkit.tracking.curve import write_curve
from llmkit.tracking.jsonl import MetricsFile


class Recorder:
    """Called with (step, metrics) for each row. Without a ``path`` it keeps nothing but ``latest``."""

    def __init__(self, path: Path | None, trackers: Sequence[Tracker] = ()) -> None:
        self.file = None if path is None else MetricsFile(path)
        self.trackers = Trackers(trackers if path else [])
        self.latest: dict[str, float] = {}

    def rewind(self, latest: dict[str, float], offset: int) -> None:
        """Go back to a checkpoint, or to the start: rows after ``offset`` belong to steps that will be done again."""
        self.latest = dict(latest)
        if self.file is not None:
            self.file.truncate(offset)

    def start(self, run: RunInfo) -> None:
        self.trackers.start(run)

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        self.latest |= metrics
        if self.file is not None:
            self.file.append({"step": step, **metrics})
            self.trackers.log(step, metrics)

    def secured_offset(self) -> int:
        """Size of ``metrics.jsonl`` once its rows are on the disk, for the checkpoint."""
        if self.file is None:
            return 0
        self.file.sync()
        return self.file.offset()

    def finish(self, status: str) -> None:
        """Close the file, then let the trackers catch up, and draw the curve."""
        self.trackers.finish(status)
        if self.file is not None:
            self.file.close()
            write_curve(self.file.path, self.file.path.with_name("loss_curve.svg"))
