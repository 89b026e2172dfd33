"""The loss of every step: llmkit beside a plain PyTorch loop, from the same weights on the same tokens.

    python -m tests.bench.same_curve --steps 300 --seeds 1 2 3

The plain loop trains transformers' own GPT-2 in fp32: cross entropy over all logits, clipping, torch's AdamW. Both read
the folder that a first run of one step has written, and the windows of the embedded corpus (made one document) in the
order of llmkit's sampler. Every seed is an order of its own. Printed a seed: the largest and the mean difference over
the plain loop's loss, for llmkit in fp32 and in bf16; and, as a measure for the second, how far apart the seeds are:
their standard deviation over the last fifty steps' means.
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

from tests.bench.corpus import embedded

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SEQ_LEN, BATCH, RATE, N_LAST = 128, 8, 1e-3, 50
MODEL = ("model=gpt2", "model.d_model=192", "model.n_layers=4", "model.n_heads=4", f"model.max_seq_len={SEQ_LEN}",
         "model.dropout=0.0", "tokenizer.vocab_size=4096")  # fmt: skip
TRAINING = (f"engine.micro_batch_size={BATCH}", f"optim.lr={RATE}", "schedule=constant", "schedule.warmup_steps=0",
            "data.val_fraction=0", "data.max_document_bytes=4000000", "engine.log_every=1", "engine.eval_every=null",
            "engine.save_every=null", "callbacks=none", "tracking.wandb.mode=disabled")  # fmt: skip


def write_text(path: Path, n_bytes: int) -> None:
    """One document out of the embedded corpus."""
    text = "\n\n".join(embedded("python_docs"))
    path.write_bytes(text.encode()[:n_bytes].decode(errors="ignore").encode())


def run_llmkit(root: Path, name: str, steps: int, seed: int, *words: str) -> list[float]:
    """The loss of every step."""
    command = [sys.executable, "-m", "llmkit", "pretrain", f"data.path={root / 'text.txt'}", f"run.root={root}",
               f"run.name={name}", f"run.seed={seed}", f"engine.max_steps={steps}", *TRAINING, *words]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    rows = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def run_plain(first: Path, steps: int, seed: int) -> list[float]:
    """The same, by transformers' model in a loop as a tutorial writes it."""
    import torch
    import transformers

    from llmkit.data.cache import cache_root
    from llmkit.data.prepare import open_entry
    from llmkit.data.sampler import SampleOrder

    key = json.loads((first / "state.json").read_text())["data_key"]
    shards = open_entry(cache_root(None) / key, reused=True, reason="").train[0]
    n_rows = -(-(shards.n_tokens - 1) // SEQ_LEN)
    order = SampleOrder((n_rows,), None, seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(first / "model", dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    model.train()
    losses = []
    for step in range(steps):
        inputs = torch.zeros(BATCH, SEQ_LEN, dtype=torch.int64)
        labels = torch.full((BATCH, SEQ_LEN), -100)
        for b in range(BATCH):
            start = order.locate(step * BATCH + b)[1] * SEQ_LEN
            ids = torch.from_numpy(shards.window(start, min(start + SEQ_LEN + 1, shards.n_tokens)).astype("int64"))
            inputs[b, : len(ids) - 1], labels[b, : len(ids) - 1] = ids[:-1], ids[1:]
        logits = model(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def apart(ours: list[float], plain: list[float]) -> dict[str, float]:
    """Differences of two curves, as shares of the second."""
    shares = [abs(a - b) / b for a, b in zip(ours, plain, strict=True)]
    return {"largest": max(shares), "mean": statistics.fmean(shares)}


def end_of(losses: list[float]) -> float:
    return statistics.fmean(losses[-N_LAST:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--megabytes", type=float, default=1.0, help="size of the text")
    args = parser.parse_args()
    ends: dict[str, list[float]] = {"plain": [], "fp32": [], "bf16": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["LLMKIT_CACHE"] = str(root / "cache")
        write_text(root / "text.txt", int(args.megabytes * 1e6))
        run_llmkit(root, "first", 1, 0, *MODEL)
        first = root / "first" / "checkpoints" / "step_1"
        for seed in args.seeds:
            plain = run_plain(first, args.steps, seed)
            ends["plain"].append(end_of(plain))
            found: dict[str, object] = {"seed": seed, "first": plain[0], "last": ends["plain"][-1]}
            for precision in ("fp32", "bf16"):
                words = (f"init={first}", f"engine.precision={precision}")
                ours = run_llmkit(root, f"{precision}{seed}", args.steps, seed, *words)
                ends[precision].append(end_of(ours))
                found[precision] = apart(ours, plain) | {"last": ends[precision][-1]}
            print(json.dumps(found), flush=True)
    differences = [abs(a - b) for a, b in zip(ends["bf16"], ends["plain"], strict=True)]
    spread = statistics.stdev(ends["plain"]) if len(args.seeds) > 1 else None
    print(json.dumps({"spread_of_seeds": spread, "bf16_from_plain": differences}))


if __name__ == "__main__":
    main()
