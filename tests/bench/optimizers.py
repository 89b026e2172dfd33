"""Time and steps to one validation loss: Muon and its schedules beside AdamW with a cosine.

    python -m tests.bench.optimizers --seeds 1 2 3

The model and text of the recipe gpt_tiny. Every contender first tries three peak rates on a seed of its own, a factor
of two apart; its best goes on. The loss to reach is the mean of what AdamW ends on, seed by seed. ``seconds`` are those
of training, evaluations left out. Contenders take turns, each run is a fresh process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

COMMON = ("model=gpt2", "data=python_docs", "model.d_model=192", "model.n_heads=4", "model.max_seq_len=256",
          "data.seq_len=256", "tokenizer.vocab_size=2048", "engine.micro_batch_size=8", "engine.eval_every=10",
          "engine.log_every=10", "engine.save_every=null", "callbacks=none",
          "tracking.wandb.mode=disabled")  # fmt: skip
BASE = "adamw cosine"
CONTENDERS = {
    BASE: ("optim=adamw", "schedule=cosine"),
    "muon cosine": ("optim=muon", "schedule=cosine"),
    "muon wsd": ("optim=muon", "schedule=wsd"),
}
RATES = {"adamw": (1e-3, 2e-3, 4e-3), "muon": (2e-3, 4e-3, 8e-3)}
TRIAL_SEED = 1000
Curve = list[tuple[int, float, float]]  # step, seconds of training, validation loss


def run(root: Path, contender: str, rate: float, seed: int, steps: int) -> Curve:
    name = f"{contender.replace(' ', '_')}_{rate}_{seed}"
    rates = (f"optim.lr={rate}", *((f"optim.adamw_lr={rate}",) if contender.startswith("muon") else ()))
    command = [sys.executable, "-m", "llmkit", "pretrain", *COMMON, *CONTENDERS[contender], *rates,
               f"engine.max_steps={steps}", f"run.root={root}", f"run.name={name}", f"run.seed={seed}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: Curve = []
    seconds = 0.0
    for row in map(json.loads, (root / name / "metrics.jsonl").read_text().splitlines()):
        seconds += 10 * row.get("perf/step_seconds", 0.0)  # the mean of ten steps
        if "val/loss" in row:
            found.append((row["step"], seconds, row["val/loss"]))
    return found


def reached(curve: Curve, loss: float) -> tuple[int, float] | None:
    return next(((step, seconds) for step, seconds, value in curve if value <= loss), None)


def best_rate(root: Path, contender: str, steps: int) -> float:
    tried = {rate: run(root, contender, rate, TRIAL_SEED, steps)[-1][2] for rate in RATES[contender.split()[0]]}
    print(json.dumps({"contender": contender, "trials": tried}), flush=True)
    return min(tried, key=lambda rate: tried[rate])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    curves: dict[str, list[Curve]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["LLMKIT_CACHE"] = str(root / "cache")
        rates = {name: best_rate(root, name, args.steps) for name in CONTENDERS}
        for seed in args.seeds:
            for name in CONTENDERS:
                curves[name].append(run(root, name, rates[name], seed, args.steps))
                step, seconds, loss = curves[name][-1][-1]
                shown: dict[str, Any] = {"contender": name, "seed": seed, "steps": step, "seconds": seconds}
                print(json.dumps(shown | {"val_loss": loss}), flush=True)
    goal = statistics.fmean(curve[-1][2] for curve in curves[BASE])
    print(json.dumps({"loss_to_reach": goal, "rates": rates}))
    for name, runs in curves.items():
        ends = [reached(curve, goal) for curve in runs]
        print(json.dumps({"contender": name, "reached_at": ends, "last": [curve[-1][2] for curve in runs]}))


if __name__ == "__main__":
    main()
