"""Fine-tuning on real data: llmkit in turn with a baseline, each in a fresh process, the clock outside.

    python -m tests.bench.finetune sst2 --data DIR --model FOLDER --seeds 1 2 3 --peer-seeds 1 2 [key=value ...]

``DIR`` holds the data sets, ``FOLDER`` the checkpoint that is fine-tuned. Jobs with a peer in
``tests.bench.finetune_peers`` train it on the same rows; the others score the checkpoint as it was. A line of JSON a
run, then the means. ``seconds``: from the start of the process to the end of training, validation included.
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
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

QUIET = "tracking.wandb.mode=disabled"


@dataclass(frozen=True)
class Job:
    """One data set: files below the data folder, what the two commands are told beyond them."""

    task: str
    train: str
    valid: str
    test: str
    finetune: tuple[str, ...] = ()
    evaluate: tuple[str, ...] = ()
    both: tuple[str, ...] = ()
    peer: bool = False
    targets: tuple[str, str, str] | None = None  # line-aligned files: the other side of train, valid and test


LORA = ("adapter=lora", "schedule.warmup_steps=10", "optim.lr=5e-4", "engine.micro_batch_size=4", "data.max_answers=1",
        "engine.max_epochs=1", "engine.eval_every=null")  # fmt: skip
JOBS = {
    "sst2": Job(
        "sentiment", "sentiment/sst2.train.jsonl", "sentiment/sst2.valid.jsonl", "sentiment/sst2.test.jsonl",
        ("engine.max_epochs=2", "engine.micro_batch_size=32", "optim.lr=1e-4", "loss.label_smoothing=0.1",
         "engine.eval_every=217"), peer=True,
    ),
    "policyqa": Job(
        "qa", "qa/policyqa.train.json", "qa/policyqa.valid.json", "qa/policyqa.valid.json",
        ("engine.max_epochs=1", "engine.micro_batch_size=16", "optim.lr=1e-4", "data.max_answers=1",
         "engine.eval_every=null"),
        both=("data.seq_len=384",), peer=True,
    ),
    "multi30k": Job(
        "translation", "translation/multi30k.train.en.txt", "translation/multi30k.valid.en.txt",
        "translation/multi30k.test.en.txt",
        ("model=bart", "model.n_layers=3", "model.max_seq_len=128", "model.norm_position=pre",
         "model.embedding_norm=false", "tokenizer=bpe", "tokenizer.vocab_size=8192", "loss.label_smoothing=0.1",
         "optim=muon", "optim.lr=1e-2", "optim.adamw_lr=3e-3", "schedule.warmup_steps=60", "model.dropout=0.0",
         "schedule.min_lr_ratio=0.02", "engine.max_epochs=4", "engine.micro_batch_size=64",
         "engine.eval_every=null", "data.max_answers=1"),
        ("generation.n_beams=4", "generation.max_new_tokens=80"),
        both=("task.source=en", "task.target=de"), peer=True,
        targets=(
            "translation/multi30k.train.de.txt", "translation/multi30k.valid.de.txt",
            "translation/multi30k.test.de.txt",
        ),
    ),
    "scitldr": Job(
        "summarization", "summarization/scitldr.train.jsonl", "summarization/scitldr.valid.jsonl",
        "summarization/scitldr.test.jsonl", (*LORA, "data.max_rows=160"),
        ("data.max_rows=100", "generation.max_new_tokens=48"), both=("data.seq_len=512",),
    ),
    "mbpp": Job(
        "code", "code/mbpp.train.jsonl", "code/mbpp.valid.jsonl", "code/mbpp.test.jsonl", (*LORA, "data.max_rows=240"),
        ("data.max_rows=100", "task.run_code=true", "generation.max_new_tokens=160"), both=("data.seq_len=512",),
    ),
    "dolly": Job(
        "chat", "chat/dolly.train.jsonl", "chat/dolly.valid.jsonl", "chat/dolly.valid.jsonl",
        (*LORA, "data.max_rows=160"), ("generation.max_new_tokens=96",), both=("data.seq_len=512",),
    ),
}  # fmt: skip


def llmkit(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "llmkit", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"llmkit {' '.join(words)}\n{done.stderr[-3000:]}")
    return done.stdout


def rows_of(job: Job, data: Path, parts: dict[str, int]) -> list[str]:
    """``data.path`` and its like: ``parts`` maps a key's beginning to the number of the file."""
    files = (job.train, job.valid, job.test)
    shown = [f"data.{key}path={data / files[i]}" for key, i in parts.items()]
    if job.targets is not None:
        shown += [f"data.{key}target_path={data / job.targets[i]}" for key, i in parts.items()]
    return shown


def score(job: Job, data: Path, init: str) -> dict[str, float]:
    """The metrics of the test rows."""
    shown = llmkit(
        "evaluate",
        f"task={job.task}",
        f"init={init}",
        *rows_of(job, data, {"": 2}),
        *job.both,
        *job.evaluate,
        "n_examples=0",
    )
    return {name: value for name, value in json.loads(shown).items() if isinstance(value, float)}


def run_ours(job: Job, args: argparse.Namespace, root: Path, seed: int) -> dict[str, float]:
    name, init = f"seed{seed}", [] if args.model is None else [f"init={args.model}"]
    started = time.perf_counter()
    llmkit(
        "finetune", f"task={job.task}", *init, *rows_of(job, args.data, {"": 0, "val_": 1}), f"run.root={root}",
        f"run.name={name}", f"run.seed={seed}", QUIET, *job.both, *job.finetune, *args.overrides,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    rows = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val/loss"] for row in rows if "val/loss" in row]
    first = {"val_loss_first": losses[0], "val_loss_last": losses[-1]} if losses else {}
    return {"seconds": seconds, **first, **score(job, args.data, str(root / name))}


def run_baseline(name: str, job: Job, args: argparse.Namespace, seed: int) -> dict[str, float]:
    if not job.peer:
        return score(job, args.data, str(args.model))
    words = [
        name,
        "--data",
        str(args.data),
        "--seed",
        str(seed),
        "--minutes",
        str(args.minutes),
        "--started",
        str(time.time()),
    ]
    words += [] if args.model is None else ["--model", str(args.model)]
    command = [sys.executable, "-m", "tests.bench.finetune_peers", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--peer-seeds", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--minutes", type=float, default=25, help="training time of multi30k, on either side")
    parser.add_argument("overrides", nargs="*", help="key=value for llmkit finetune")
    args = parser.parse_args()
    job, runs = JOBS[args.job], defaultdict(list)
    if args.job == "multi30k":
        args.overrides.append(f"engine.max_hours={args.minutes / 60:.5f}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLMKIT_CACHE"] = str(Path(folder) / "cache")
        for turn in range(max(len(args.seeds), len(args.peer_seeds))):
            for who, seeds in (("peer" if job.peer else "untouched", args.peer_seeds), ("llmkit", args.seeds)):
                if turn >= len(seeds) or (who == "untouched" and turn):
                    continue
                seed = seeds[turn]
                ours = who == "llmkit"
                found = run_ours(job, args, Path(folder), seed) if ours else run_baseline(args.job, job, args, seed)
                runs[who].append(found)
                print(json.dumps({"who": who, "seed": seed, **found}), flush=True)
    means = {
        who: {name: statistics.mean(run[name] for run in found) for name in found[0]} for who, found in runs.items()
    }
    print(json.dumps(means, indent=2))


if __name__ == "__main__":
    main()
