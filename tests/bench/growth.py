"""How speed changes with the size of the model, the context and the corpus.

    python -m tests.bench.growth model context corpus --precision fp32

``model``: decoders of 1 to 120 million parameters, windows of 256 tokens. ``context``: one decoder, windows of 128 to
4,096 tokens, 4,096 tokens a step always. ``corpus``: one decoder, texts of 1 MB to 1 GB made from the embedded corpus;
beside the speed stand the seconds that preparation took and those of a second start. Tokens a second are the median of
the steps after the warm-up; GFLOP/s are model FLOPs (``tests.bench.speed``); ``data`` is the share of a step that was
spent waiting for a batch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.prepare_scale import write_corpus
from tests.bench.speed import DECODER, Case, Work, flops_per_token, run_llmkit

SIZES = ((128, 2, 2, 2048), (192, 4, 3, 4096), (256, 6, 4, 8192), (384, 8, 6, 8192), (512, 12, 8, 8192),
         (768, 16, 12, 8192))  # d_model, layers, heads, ids  # fmt: skip
CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
MEGABYTES = (1, 10, 100, 1000)
TOKENS_A_STEP = 4096


def decoder(d_model: int, n_layers: int, n_heads: int, vocab: int, seq_len: int, tokens: int, *words: str) -> Work:
    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "seq_len": seq_len, "vocab": vocab}
    command = (
        *DECODER, f"model.d_model={d_model}", f"model.n_layers={n_layers}", f"model.n_heads={n_heads}",
        f"model.max_seq_len={seq_len}", f"data.seq_len={seq_len}", f"engine.micro_batch_size={tokens // seq_len}",
        f"tokenizer.vocab_size={vocab}", *(words or ("data=python_docs",)),
    )  # fmt: skip
    return Work(sizes, command, ())


def measure(work: Work, args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """The medians of the runs, and the seconds of the first and the last, start included."""
    seconds, rates, waits, memory = [], [], [], []
    for _ in range(args.rounds):
        started = time.perf_counter()
        found = run_llmkit(work, Case("llmkit"), args, root)
        seconds.append(time.perf_counter() - started)
        rows = map(json.loads, (Path(found["folder"]) / "metrics.jsonl").read_text().splitlines())
        waits += [row["perf/data_wait_fraction"] for row in list(rows)[args.warmup :] if "train/loss" in row]
        rates.append(found["tokens_per_second"])
        memory.append(found["peak_gib"])
    rate, sizes = statistics.median(rates), work.sizes
    n_params = 12 * sizes["n_layers"] * sizes["d_model"] ** 2 + sizes["vocab"] * sizes["d_model"]
    return {
        "parameters_millions": round(n_params / 1e6, 1),
        "tokens_per_second": round(rate),
        "spread": round((max(rates) - min(rates)) / rate, 3),
        "gflops": round(rate * flops_per_token(sizes) / 1e9, 1),
        "data_wait": round(statistics.median(waits), 4),
        "peak_gib": round(statistics.median(memory), 2),
        "seconds_first_and_last": [round(seconds[0], 1), round(seconds[-1], 1)],
    }


def by_model(args: argparse.Namespace, root: Path) -> None:
    for d_model, n_layers, n_heads, vocab in SIZES:
        work = decoder(d_model, n_layers, n_heads, vocab, 256, TOKENS_A_STEP)
        print(json.dumps({"growth": "model", "d_model": d_model, "n_layers": n_layers, **measure(work, args, root)}))


def by_context(args: argparse.Namespace, root: Path) -> None:
    for seq_len in CONTEXTS:
        work = decoder(256, 4, 4, 4096, seq_len, TOKENS_A_STEP)
        print(json.dumps({"growth": "context", "seq_len": seq_len, **measure(work, args, root)}), flush=True)


def by_corpus(args: argparse.Namespace, root: Path) -> None:
    for megabytes in args.megabytes:
        text = root / f"{megabytes}mb.txt"
        write_corpus(text, megabytes)
        work = decoder(256, 4, 4, 4096, 256, TOKENS_A_STEP, "data=files", f"data.path={text}")
        print(json.dumps({"growth": "corpus", "megabytes": megabytes, **measure(work, args, root)}), flush=True)
        text.unlink()


GROWTH = {"model": by_model, "context": by_context, "corpus": by_corpus}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("growth", nargs="*", choices=GROWTH, default=list(GROWTH))
    parser.add_argument("--precision", choices=("default", "fp32", "bf16"), default="default")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--megabytes", type=int, nargs="+", default=MEGABYTES)
    args = parser.parse_args()
    args.device = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLMKIT_CACHE"] = str(Path(folder) / "cache")
        for growth in args.growth:
            GROWTH[growth](args, Path(folder))


if __name__ == "__main__":
    main()
