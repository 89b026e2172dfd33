"""How much is learnt in the same time: llmkit beside nanoGPT's published CPU example on tinyshakespeare.

    python -m tests.bench.learning --nanogpt DIR --text .../tinyshakespeare.txt --seeds 1 2 3

``DIR`` is a checkout of nanoGPT; its example is run as its README gives it. Both train on the first 90 % and are
scored on the last 10 % of the file. The two take turns, each in a fresh process; wall time is the whole process's.
nanoGPT reports nats a character from 20 random batches; llmkit's ``val/bpb`` covers all of the held-out text once,
and since the file is ASCII, a byte is a character.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NANOGPT = "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 "
NANOGPT += "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
TRAIN_SHARE = 0.9


def run_nanogpt(folder: Path) -> dict[str, float]:
    """Its last validation loss, in bits a character, and the seconds it took."""
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *NANOGPT.split()]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    losses = re.findall(r"val loss ([0-9.]+)", done.stdout)
    return {"bits_per_character": float(losses[-1]) / math.log(2), "seconds": seconds}


def run_llmkit(root: Path, seed: int, overrides: list[str]) -> dict[str, float]:
    name = f"seed{seed}"
    command = [sys.executable, "-m", "llmkit", "pretrain", "recipe=shakespeare", f"data.path={root / 'train.txt'}"]
    command += [f"data.val_path={root / 'val.txt'}", f"run.root={root}", f"run.name={name}", f"run.seed={seed}"]
    command += ["tracking.wandb.mode=disabled", *overrides]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - started
    metrics = json.loads((root / name / "result.json").read_text())["metrics"]
    return {"bits_per_character": metrics["val/bpb"], "seconds": seconds}


def split_text(text: Path, folder: Path) -> None:
    """The first 90 % and the last 10 % of the characters."""
    content = text.read_text("ascii")
    cut = int(len(content) * TRAIN_SHARE)
    (folder / "train.txt").write_text(content[:cut])
    (folder / "val.txt").write_text(content[cut:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("overrides", nargs="*", help="key=value for llmkit")
    args = parser.parse_args()
    data = args.nanogpt / "data" / "shakespeare_char"
    (data / "input.txt").write_bytes(args.text.read_bytes())
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, capture_output=True)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLMKIT_CACHE"] = str(Path(folder) / "cache")
        split_text(args.text, Path(folder))
        for seed in args.seeds:
            theirs.append(run_nanogpt(args.nanogpt.resolve()))
            ours.append(run_llmkit(Path(folder), seed, args.overrides))
            print(json.dumps({"seed": seed, "nanogpt": theirs[-1], "llmkit": ours[-1]}), flush=True)
    summary = {
        f"{who}_{name}": statistics.median(run[name] for run in runs)
        for who, runs in (("nanogpt", theirs), ("llmkit", ours))
        for name in ("bits_per_character", "seconds")
    }
    summary["fewer_bits"] = 1 - summary["llmkit_bits_per_character"] / summary["nanogpt_bits_per_character"]
    summary["time_ratio"] = summary["llmkit_seconds"] / summary["nanogpt_seconds"]
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
