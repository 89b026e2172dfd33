"""What a person sees: plain lines without a terminal, a live view with one, and nothing that can stop a run."""

from __future__ import annotations

import io
import logging
import os
import pty
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from llmkit.interfaces import RunInfo
from llmkit.tracking.console import ConsoleTracker, clock, eta_seconds, short_count, shown
from llmkit.tracking.logs import log_to, setup_logging

TRAIN = {
    "train/loss": 3.14159,
    "optim/lr": 0.0006,
    "optim/grad_norm": 0.8142,
    "perf/tokens_per_second": 12345.6,
    "perf/mfu": 0.3125,
    "perf/peak_memory_gib": 1.2,
    "data/first_sample_id": 17,
}


@pytest.fixture(autouse=True)
def _clean_logger() -> Iterator[None]:
    root = logging.getLogger("llmkit")
    before = (root.level, root.propagate, list(root.handlers))
    yield
    root.level, root.propagate, root.handlers = before


def info(folder: Path, max_steps: int = 1000) -> RunInfo:
    return RunInfo("mine", folder, "pretrain", {}, max_steps, {})


def test_without_a_terminal_each_row_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(0)
    log_to(tmp_path / "train.log")
    tracker = ConsoleTracker(live=True)
    tracker.start(info(tmp_path))
    tracker.log(100, TRAIN | {"perf/elapsed_seconds": 10.0})
    tracker.log(100, {"val/loss": 3.0, "val/bpb": 1.25, "perf/elapsed_seconds": 12.0})
    tracker.log(200, TRAIN | {"perf/elapsed_seconds": 20.0})
    tracker.finish("finished")
    train = "loss 3.1416  lr 6.00e-04  grad 0.81  tok/s 12.3k  mfu 31.2%  mem 1.20 GiB"
    expected = [
        f"step 100/1,000  {train}",
        "step 100/1,000  val/loss 3.0000  val/bpb 1.2500",
        f"step 200/1,000  {train}  eta 0:01:20",
    ]
    assert capsys.readouterr().err.splitlines() == expected
    assert [line[20:] for line in (tmp_path / "train.log").read_text().splitlines()] == expected


def test_the_live_view_shows_the_newest_values_and_keeps_the_last_evaluation(tmp_path: Path) -> None:
    tracker = ConsoleTracker(live=False)
    tracker.start(info(tmp_path))
    tracker.log(100, {"val/loss": 3.0, "val/bpb": 1.25, "perf/elapsed_seconds": 5.0})
    tracker.log(500, TRAIN | {"perf/elapsed_seconds": 25.0})
    out = Console(file=io.StringIO(), width=140)
    out.print(tracker._view.render())
    text = out.file.getvalue()  # type: ignore[attr-defined]
    for part in ("mine", "step 500/1,000", "50%", "eta 0:00:25", "loss 3.1416", "val/bpb 1.2500", "at step 100"):
        assert part in text


LIVE = """
import sys
from pathlib import Path
from llmkit.interfaces import RunInfo
from llmkit.tracking.console import ConsoleTracker
from llmkit.tracking.logs import log_to, setup_logging
import logging
setup_logging(0)
log_to(Path(sys.argv[1]) / "train.log")
tracker = ConsoleTracker(live=True)
tracker.start(RunInfo("[red]mine", Path(sys.argv[1]), "pretrain", {}, 10, {}))
for step in range(1, 11):
    tracker.log(step, {"train/loss": 1 / step, "perf/elapsed_seconds": float(step)})
    if step == 5:
        logging.getLogger("llmkit.x").warning("look \\x1b]0;title\\x07 here")
tracker.finish("finished")
print("result")
"""


def on_a_terminal(tmp_path: Path, **more: str) -> str:
    leader, follower = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "CI")} | {"TERM": "xterm"} | more
    command = [sys.executable, "-c", LIVE, str(tmp_path)]
    process = subprocess.Popen(command, stderr=follower, stdout=subprocess.PIPE, env=environment)
    os.close(follower)
    shown_bytes = b""
    while True:
        ready, _, _ = select.select([leader], [], [], 20)
        try:
            data = os.read(leader, 65536) if ready else b""
        except OSError:
            break
        if not data:
            break
        shown_bytes += data
    os.close(leader)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert out == b"result\n"
    return shown_bytes.decode()


def test_on_a_terminal_one_view_is_redrawn_and_the_lines_go_to_the_file_alone(tmp_path: Path) -> None:
    text = on_a_terminal(tmp_path)
    assert "\x1b[1A" in text  # the cursor goes up to redraw
    assert "[red]mine" in text
    assert "step 10/10" in text
    assert "loss 0.1000" in text
    assert "look \\x1b]0;title\\x07 here" in text
    assert "\x1b]0;" not in text
    assert text.count("step 3/10  loss 0.3333") == 0
    log = (tmp_path / "train.log").read_text()
    assert log.count("  loss ") == 10
    assert "\x1b" not in log


@pytest.mark.parametrize("variable", [{"NO_COLOR": "1"}, {"CI": "1"}, {"TERM": "dumb"}])
def test_a_terminal_that_should_not_be_redrawn_gets_lines(tmp_path: Path, variable: dict[str, str]) -> None:
    text = on_a_terminal(tmp_path, **variable)
    assert "\x1b[1A" not in text
    assert text.count("  loss ") == 10


def test_a_terminal_that_hangs_up_ends_the_view_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        broken = False

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            if self.broken:
                raise OSError(5, "Input/output error")
            return super().write(text)

    stream = Gone()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("CI", raising=False)
    setup_logging(0)
    log_to(tmp_path / "train.log")
    tracker = ConsoleTracker(live=True)
    tracker.start(info(tmp_path))
    assert tracker._view._live is not None
    stream.broken = True
    tracker.log(1, TRAIN)
    tracker.log(2, TRAIN)
    tracker.finish("finished")
    assert (tmp_path / "train.log").read_text().count("loss 3.1416") == 2
    stream.broken = False
    before = stream.getvalue()
    logging.getLogger("llmkit.x").info("back")
    assert stream.getvalue() == before + "back\n"  # what could not be written is gone, not piled up


def test_only_known_values_and_results_are_shown() -> None:
    row = {"data/x": 1.0, "task/qa/f1": 0.5, "optim/lr": 1e-3, "val/n_targets": 17}
    assert shown(row) == ["lr 1.00e-03", "task/qa/f1 0.5000"]


def test_eta_is_the_mean_pace_times_what_is_left() -> None:
    assert eta_seconds(10, 25.0, 4) == 10.0
    assert eta_seconds(10, 25.0, 0) == 0.0
    assert eta_seconds(0, 0.0, 4) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (200_000, "2d 7:33:20")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (950, "950"), (999.7, "1k"), (12345, "12.3k"), (999_960, "1M"), (2.5e9, "2.5G")]
)
def test_short_count(value: float, text: str) -> None:
    assert short_count(value) == text
