"""What the engine costs: llmkit against a plain PyTorch loop on the same model and the same tokens.

    python -m tests.bench.engine_cost --precision fp32 --rounds 3

Every run is a fresh process; the two take turns. llmkit is called as a user calls it, and its own
``perf/tokens_per_second`` is read from ``metrics.jsonl``; a second figure from its elapsed time checks that one. The
plain loop is given its batches ready made. Config A of the performance notes: 6 layers, d_model 384, 6 heads, 8192
ids, windows of 256 tokens, 16 of them a step (``--sequences`` for machines on which bf16 is slow).
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

SEQ_LEN = 256
MODEL = ["model=gpt2", "model.d_model=384", "model.n_layers=6", "model.n_heads=6", f"model.max_seq_len={SEQ_LEN}"]
TEXT = ["data=python_docs", f"data.seq_len={SEQ_LEN}", "tokenizer.vocab_size=8192"]
LOOP = ["engine.log_every=1", "engine.eval_every=null", "engine.save_every=null", "schedule=constant"]
QUIET = ["callbacks=none", "tracking.wandb.mode=disabled", "data.val_fraction=0"]


def run_llmkit(args: argparse.Namespace, root: Path, name: str) -> dict[str, float]:
    """Tokens a second after the warm-up, and the process's peak memory."""
    options = [*MODEL, *TEXT, *LOOP, *QUIET, "model.dropout=0.0", "optim.lr=1e-3", "schedule.warmup_steps=0"]
    options += [f"engine.precision={args.precision}", f"engine.micro_batch_size={args.sequences}"]
    options += [f"engine.max_steps={args.steps}", f"run.root={root}", f"run.name={name}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "llmkit", "pretrain", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0, f"llmkit ended with status {status}"
    rows = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    timed = rows[args.warmup :]
    n_tokens = timed[-1]["data/tokens"] - timed[0]["data/tokens"]
    elapsed = timed[-1]["perf/elapsed_seconds"] - timed[0]["perf/elapsed_seconds"]
    shown = statistics.fmean(row["perf/step_seconds"] for row in timed[1:]) * (len(timed) - 1)
    return {
        "tokens_per_second": statistics.median(row["perf/tokens_per_second"] for row in timed),
        "clock_disagreement": abs(n_tokens / shown - n_tokens / elapsed) / (n_tokens / elapsed),
        "peak_rss_gib": usage.ru_maxrss / 2**20,
        "loss": timed[-1]["train/loss"],
    }


def run_plain(args: argparse.Namespace, run: Path) -> dict[str, float]:
    """The same in a fresh process of this file, on the tokens that the first llmkit run prepared."""
    command = [sys.executable, "-m", "tests.bench.engine_cost", "--plain", str(run), "--precision", args.precision]
    command += ["--steps", str(args.steps), "--warmup", str(args.warmup), "--sequences", str(args.sequences)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0, f"the plain loop ended with status {status}"
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result | {"peak_rss_gib": usage.ru_maxrss / 2**20}


def plain_loop(args: argparse.Namespace) -> dict[str, float]:
    """AdamW, clipping and cross entropy as a tutorial writes them, around llmkit's decoder."""
    import torch

    from llmkit.data.cache import cache_root
    from llmkit.data.prepare import open_entry
    from llmkit.data.token_shards import WindowDataset
    from llmkit.models.hf import load_config
    from llmkit.objectives.causal_lm import CausalLM
    from llmkit.tokenizers.load import load_tokenizer

    checkpoint = args.plain / "checkpoints" / f"step_{args.steps}"
    key = json.loads((checkpoint / "state.json").read_text())["data_key"]
    shards = open_entry(cache_root(None) / key, reused=True, reason="").train[0]
    windows = WindowDataset(shards, SEQ_LEN, 1)
    collate = CausalLM(0.0, 0.0, None).collate
    ids = load_tokenizer(checkpoint / "model").token_ids()
    size = args.sequences
    batches = [
        collate(
            [windows.row((s * size + i) % (windows.n_sequences - 1), (), None) for i in range(size)],
            seq_len=SEQ_LEN,
            ids=ids,
        )
        for s in range(args.steps)
    ]
    model = load_config(checkpoint / "model").build()
    model.init_weights(0)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    seconds = []
    for batch in batches:
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            logits = model(batch.input_ids, batch.position_ids, batch.document_ids)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - started)
    rate = size * SEQ_LEN / statistics.median(seconds[args.warmup :])
    return {"tokens_per_second": rate, "loss": loss.item()}


def compare(args: argparse.Namespace, root: Path) -> None:
    """Turns of both, then medians and their ratio as one JSON line."""
    ours, theirs = [], []
    for turn in range(args.rounds):
        ours.append(run_llmkit(args, root, f"turn{turn}"))
        theirs.append(run_plain(args, root / "turn0"))
        print(json.dumps({"turn": turn, "llmkit": ours[-1], "plain": theirs[-1]}), flush=True)

    def median(runs: list[dict[str, float]], name: str) -> float:
        return statistics.median(run[name] for run in runs)

    ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(ours, theirs, strict=True)]
    summary = {
        "precision": args.precision,
        "speed_ratio": median(ours, "tokens_per_second") / median(theirs, "tokens_per_second"),
        "speed_ratio_by_turn": [round(ratio, 3) for ratio in ratios],
        "memory_ratio": median(ours, "peak_rss_gib") / median(theirs, "peak_rss_gib"),
        "llmkit_tokens_per_second": median(ours, "tokens_per_second"),
        "clock_disagreement": max(run["clock_disagreement"] for run in ours),
    }
    print(json.dumps(summary, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        print(json.dumps(plain_loop(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


if __name__ == "__main__":
    main()
