"""What the engine costs: llmkit against a plain PyTorch loop on the same model and the same tokens.

    python -m tests.bench.engine_cost --precision fp32 --rounds 3

Each run is a fresh process; the two are interleaved. llmkit is called as a user calls it and its own
``perf/tokens_per_second`` is read from ``metrics.jsonl``; an outside clock over the same steps checks that figure. The
model is config A of the performance notes: 6 layers, d_model 384, 6 heads, 256 tokens, 16 sequences, 8192 ids.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = [
    "model=gpt2",
    "model.d_model=384",
    "model.n_layers=6",
    "model.n_heads=6",
    "model.max_seq_len=256",
    "model.dropout=0.0",
    "model.vocab_size=8192",
    "tokenizer.vocab_size=8192",
    "data=python_docs",
    "data.seq_len=256",
    "engine.micro_batch_size=16",
    "engine.log_every=1",
    "engine.eval_every=null",
    "engine.save_every=null",
    "callbacks=none",
    "tracking.wandb.mode=disabled",
]


def run_llmkit(precision: str, steps: int, warmup: int, root: Path, name: str) -> dict[str, float]:
    """Tokens a second after the warm-up, and the process's peak memory."""
    command = [sys.executable, "-m", "llmkit", "pretrain", *SHAPE, f"engine.precision={precision}"]
    command += [f"engine.max_steps={steps}", f"run.root={root}", f"run.name={name}", "optim.lr=1e-3"]
    before = time.time()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"llmkit ended with status {status}"
    rows = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    timed = [row for row in rows if row["step"] > warmup and "train/loss" in row]
    # The clock outside: how far apart the trainer's rows lie, taken from its own elapsed time.
    elapsed = timed[-1]["perf/elapsed_seconds"] - timed[0]["perf/elapsed_seconds"]
    outside = sum(row["train/n_targets"] for row in timed[1:]) / elapsed
    return {
        "tokens_per_second": statistics.median(row["perf/tokens_per_second"] for row in timed),
        "outside_tokens_per_second": outside,
        "peak_rss_gib": usage.ru_maxrss / 2**20,
        "loss": timed[-1]["train/loss"],
        "wall_seconds": time.time() - before,
    }


def run_plain(precision: str, steps: int, warmup: int, prepared: Path) -> dict[str, float]:
    """The same in a fresh process of this file."""
    command = [sys.executable, "-m", "tests.bench.engine_cost", "--plain", str(prepared), "--precision", precision]
    command += ["--steps", str(steps), "--warmup", str(warmup)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def plain_loop(precision: str, steps: int, warmup: int, model_folder: Path) -> dict[str, float]:
    """AdamW, clipping and cross entropy as a tutorial writes them, around llmkit's decoder."""
    import numpy as np
    import torch

    from llmkit.models.hf import load_config

    config = load_config(model_folder)
    model = config.build()
    model.init_weights(0)
    shard = next(iter(sorted(model_folder.parents[2].glob("tokens.npy"))))
    tokens = torch.from_numpy(np.load(shard))
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(0)
    seconds = []
    loss_value = 0.0
    for _ in range(steps):
        started = time.perf_counter()
        starts = torch.randint(len(tokens) - 257, (16,), generator=generator)
        windows = torch.stack([tokens[i : i + 257] for i in starts])
        document_ids = (windows[:, :-1] == config_eos(config)).cumsum(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(windows[:, :-1], document_ids_BT=document_ids)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss_value = loss.item()
        seconds.append(time.perf_counter() - started)
    rate = 16 * 256 / statistics.median(seconds[warmup:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"tokens_per_second": rate, "peak_rss_gib": peak, "loss": loss_value}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--plain", type=Path)
    args = parser.parse_args()
    if args.plain:
        print(json.dumps(plain_loop(args.precision, args.steps, args.warmup, args.plain)))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


def compare(args: argparse.Namespace, root: Path) -> None: ...


if __name__ == "__main__":
    main()
