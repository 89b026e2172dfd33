"""A training process without the training: ``python -m tests.faults.tracked_run FOLDER FIRST LAST [--kill] ...``.

Writes a row a step (and an evaluation every fifth) to ``metrics.jsonl`` as the engine does, with the W&B tracker on.
A start with FIRST > 1 resumes: the file is cut back to the steps before FIRST. Prints times in seconds as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from llmkit.interfaces import RunInfo
from llmkit.tracking.composite import Trackers
from llmkit.tracking.jsonl import MetricsFile, decode_row
from llmkit.tracking.logs import log_to, setup_logging
from llmkit.tracking.wandb import WandbTracker


def cut_back(metrics: MetricsFile, first: int) -> None:
    offset = 0
    for line in metrics.path.read_bytes().splitlines(keepends=True):
        if decode_row(line)["step"] >= first:
            break
        offset += len(line)
    metrics.truncate(offset)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--kill", action="store_true", help="SIGKILL itself instead of finishing")
    parser.add_argument("--wait-rows", type=int, default=0, help="wait until the mirror has sent so many rows")
    parser.add_argument("--wait-for", default="", help="go on when this file of the run folder exists")
    parser.add_argument("--finish-timeout", type=float, default=8.0)
    parser.add_argument("--init-timeout", type=float, default=20.0)
    parser.add_argument("--config", default="{}")
    given = parser.parse_args()
    setup_logging()
    given.folder.mkdir(parents=True, exist_ok=True)
    log_to(given.folder / "train.log")
    metrics = MetricsFile(given.folder / "metrics.jsonl")
    cut_back(metrics, given.first)
    node = WandbTracker(
        mode=given.mode,
        project=None,
        entity=None,
        group=None,
        tags=[],
        poll_seconds=0.1,
        init_timeout_seconds=given.init_timeout,
        finish_timeout_seconds=given.finish_timeout,
    )
    trackers = Trackers([node])
    run = RunInfo("mine", given.folder, "pretrain", json.loads(given.config), given.last, {"n_params": 7})
    times = {}
    started = time.monotonic()
    trackers.start(run)
    times["start"] = time.monotonic() - started
    for step in range(given.first, given.last + 1):
        started = time.monotonic()
        rows = [{"train/loss": 1 / step, "optim/lr": 1e-3}] + ([{"val/loss": 2 / step}] if step % 5 == 0 else [])
        for row in rows:
            metrics.append({"step": step, **row})
            trackers.log(step, row)
        times["log"] = max(times.get("log", 0.0), time.monotonic() - started)
    wait_until(lambda: count_of(given.folder / "wandb" / "sent.json") >= given.wait_rows)
    wait_until((given.folder / given.wait_for).exists)
    if given.kill:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    trackers.finish("finished")
    times["finish"] = time.monotonic() - started
    times["imported_wandb"] = float("wandb" in sys.modules)
    print(json.dumps(times))


def count_of(path: Path) -> int:
    """Rows that the mirror says it has sent."""
    return int(json.loads(path.read_text())["count"]) if path.exists() else 0


def wait_until(happened: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.02)


if __name__ == "__main__":
    main()
