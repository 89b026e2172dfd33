"""Seconds of short commands, and from the start of a command to its first training step.

    python -m tests.bench.startup --rounds 5

Best and median, after one run that is not counted. ``first step``: until the first line of ``metrics.jsonl`` is there,
with prepared data and measured choices in the cache; beside it the first start of all, which prepares them. The peers
are the imports that their own command lines make, where they are installed.
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
from importlib.util import find_spec
from pathlib import Path

COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "import torch": ("-c", "import torch"),
    "llmkit --help": ("-m", "llmkit", "--help"),
    "llmkit pretrain --help": ("-m", "llmkit", "pretrain", "--help"),
    "llmkit recipes": ("-m", "llmkit", "recipes"),
    "a mistake": ("-m", "llmkit", "pretrain", "engine.max_step=5"),
}
PEERS = {
    "accelerate launch --help": ("-m", "accelerate.commands.launch", "--help"),
    "from transformers import Trainer": ("-c", "from transformers import Trainer"),
}
STEP = ("pretrain", "recipe=gpt_tiny", "engine.max_steps=1", "schedule.warmup_steps=0", "engine.log_every=1",
        "engine.eval_every=null",        "callbacks=none", "tracking.wandb.mode=disabled")  # fmt: skip


def seconds_of(words: tuple[str, ...]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - started


def to_first_step(root: Path, name: str) -> float:
    """Until the line of the first step is written."""
    path = root / name / "metrics.jsonl"
    started = time.perf_counter()
    command = [sys.executable, "-m", "llmkit", *STEP, f"run.root={root}", f"run.name={name}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.002)
    seconds = time.perf_counter() - started
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors[-3000:])
    return seconds


def show(name: str, seconds: list[float]) -> None:
    best, median = round(min(seconds), 3), round(statistics.median(seconds), 3)
    print(json.dumps({"command": name, "best": best, "median": median}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    commands = COMMANDS | (PEERS if find_spec("transformers") else {})
    found: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(args.rounds + 1):
        for name, words in commands.items():
            seconds = seconds_of(words)
            if turn:
                found[name].append(seconds)
    for name, seconds_by_turn in found.items():
        show(name, seconds_by_turn)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLMKIT_CACHE"] = str(Path(folder) / "cache")
        root = Path(folder)
        show("first step, nothing in the cache", [to_first_step(root, "first")])
        show("first step", [to_first_step(root, f"run{turn}") for turn in range(args.rounds)])


if __name__ == "__main__":
    main()
