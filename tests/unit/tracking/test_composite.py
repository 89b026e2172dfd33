"""One tracker's failure is one warning; the others and the run go on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from llmkit.interfaces import RunInfo
from llmkit.tracking.composite import Trackers

RUN = RunInfo("mine", Path("runs/mine"), "pretrain", {}, 10, {})


class Spy:
    def __init__(self, fails_in: str = "") -> None:
        self.calls: list[str] = []
        self.fails_in = fails_in

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_in:
            raise RuntimeError("server says no")

    def start(self, run: RunInfo) -> None:
        self._call("start")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._call("log")

    def finish(self, status: str) -> None:
        self._call(status)


@pytest.mark.parametrize("fails_in", ["start", "log", "finished"])
def test_a_failing_tracker_is_reported_once_and_left_alone(fails_in: str, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = Spy(fails_in), Spy()
    trackers = Trackers([bad, good])
    logging.getLogger("llmkit").propagate = True
    with caplog.at_level(logging.WARNING, logger="llmkit"):
        trackers.start(RUN)
        trackers.log(1, {"a": 1.0})
        trackers.log(2, {"a": 1.0})
        trackers.finish("finished")
    assert good.calls == ["start", "log", "log", "finished"]
    assert bad.calls[-1] == fails_in
    assert bad.calls.count(fails_in) == 1
    assert [r.getMessage() for r in caplog.records] == [
        "Spy is off for the rest of this run: RuntimeError: server says no"
    ]


def test_an_interrupt_is_not_swallowed() -> None:
    class Interrupted(Spy):
        def _call(self, name: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trackers([Interrupted()]).finish("stopped")
