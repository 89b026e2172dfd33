"""What the W&B mirror costs a training step: a server that never answers against no mirror at all.

    python -m tests.bench.tracker_cost --rounds 5              # a loop of matrix products, a row each step
    python -m tests.bench.tracker_cost --rounds 5 --pretrain   # llmkit pretrain, a row each step

Runs of both kinds are interleaved, each in a fresh process; which goes first changes with every round. Prints the
median step time of each run, and the ratio of the medians over all steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.wandb_server import BadServer

REPO = Path(__file__).resolve().parents[2]
KINDS = ("disabled", "online")
PRETRAIN = [
    "data=python_docs",
    "callbacks=none",
    "engine.log_every=1",
    "engine.eval_every=null",
    "engine.save_every=null",
]


def environment(kind: str, url: str, home: str) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("WANDB")}
    login = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40, "WANDB_MODE": kind, "WANDB_CONFIG_DIR": home}
    return kept | login | {"PYTHONPATH": str(REPO)}


def loop(folder: Path, n_steps: int) -> None:
    """The dummy: about 30 ms of matrix products a step on two cores, logged as the engine does."""
    import torch

    from llmkit.interfaces import RunInfo
    from llmkit.tracking.composite import Trackers
    from llmkit.tracking.jsonl import MetricsFile
    from llmkit.tracking.wandb import WandbTracker

    metrics = MetricsFile(folder / "metrics.jsonl")
    trackers = Trackers([WandbTracker("auto", None, None, None, [], 1.0, 20.0, 8.0)])
    trackers.start(RunInfo("bench", folder, "pretrain", {}, n_steps, {}))
    matrix = torch.randn(1024, 1024)
    last = time.perf_counter()
    for step in range(1, n_steps + 1):
        for _ in range(2):
            matrix = torch.tanh(matrix @ matrix)
        now = time.perf_counter()
        row = {"train/loss": float(matrix[0, 0]), "perf/step_seconds": now - last}
        last = now
        metrics.append({"step": step, **row})
        trackers.log(step, row)
    trackers.finish("finished")


def run(kind: str, given: argparse.Namespace, url: str) -> list[float]:
    """Seconds of each step of one run, without the first tenth."""
    with tempfile.TemporaryDirectory() as home:
        if given.pretrain:
            command = ["-m", "llmkit", "pretrain", *PRETRAIN, f"engine.max_steps={given.steps}"]
            command += [f"run.root={home}", "run.name=bench", "tracking.wandb.mode=auto", *given.override]
        else:
            Path(home, "bench").mkdir()
            command = ["-m", "tests.bench.tracker_cost", "--loop", f"{home}/bench", "--steps", str(given.steps)]
        subprocess.run(
            [sys.executable, *command],
            cwd=REPO,
            env=environment(kind, url, home),
            check=True,
            stdout=subprocess.DEVNULL,
        )
        rows = [json.loads(line) for line in Path(home, "bench", "metrics.jsonl").read_text().splitlines()]
    times = [row["perf/step_seconds"] for row in rows if "perf/step_seconds" in row]
    return times[len(times) // 10 :]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--pretrain", action="store_true")
    parser.add_argument("--override", action="append", default=[], help="a config override for llmkit pretrain")
    parser.add_argument("--loop", type=Path, help="be the dummy run in this folder")
    given = parser.parse_args()
    if given.loop is not None:
        loop(given.loop, given.steps)
        return
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with BadServer("silent") as server:
        for number in range(given.rounds):
            for kind in KINDS if number % 2 == 0 else reversed(KINDS):
                seconds = run(kind, given, server.url)
                times[kind] += seconds
                print(f"round {number + 1}  {kind:9}  median {statistics.median(seconds) * 1e3:.3f} ms", flush=True)
    medians = {kind: statistics.median(times[kind]) for kind in KINDS}
    means = {kind: statistics.fmean(times[kind]) for kind in KINDS}
    print(f"connections taken by the silent server: {server.n_connections}")
    print(f"median step online / disabled: {medians['online'] / medians['disabled']:.4f}")
    print(f"mean step online / disabled:   {means['online'] / means['disabled']:.4f}")


if __name__ == "__main__":
    main()
