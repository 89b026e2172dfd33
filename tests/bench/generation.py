"""Tokens a second written greedily: llmkit beside ``transformers.generate``, in turns, each in a fresh process.

    python -m tests.bench.generation --model FOLDER_OR_GGUF --batch 1 16 --new 64 --rounds 3

Both open the same Hugging Face folder (a .gguf is exported to one first), read the same prompts of equal length and
write exactly ``--new`` tokens each; end tokens do not end a text. Timed is the call that writes, prompt included; the
first call warms up. The texts that the two write are compared.
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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmkit.commands.open_model import open_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def prompts(args: argparse.Namespace, vocab_size: int) -> list[list[int]]:
    """Rows of ids, the same in both processes: any will do."""
    import numpy as np

    draw = np.random.default_rng(0)
    return [draw.integers(vocab_size // 2, vocab_size, args.prompt).tolist() for _ in range(args.batch[0])]


def timed(write: Callable[[], list[Any]], calls: int) -> tuple[float, list[Any]]:
    """Median seconds of ``calls`` after the first, and what was written."""
    seconds, found = [], write()
    for _ in range(calls):
        started = time.perf_counter()
        found = write()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), found


def ours(args: argparse.Namespace) -> tuple[float, list[str]]:
    """What ``llmkit generate`` and ``predict`` call, text included; no token ends a text."""
    import torch

    from llmkit.commands.open_model import open_model
    from llmkit.generation.write import Job, _collect
    from tests.unit.generation_settings import GREEDY

    model = open_model(Path(args.model), device="cpu", dtype=torch.float32)
    rows = prompts(args, model.config.vocab_rows)
    settings = replace(GREEDY, max_new_tokens=args.new)
    job = Job(model, open_tokenizer(Path(args.model)), rows, [[0] for _ in rows], (), settings, "cpu")
    return timed(lambda: _collect(job, len(rows)), args.calls)


def theirs(args: argparse.Namespace) -> tuple[float, list[str]]:
    """``generate``, whose ids are decoded outside of the timed call."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    ids = torch.tensor(prompts(args, model.config.vocab_size))
    wanted = {"do_sample": False, "max_new_tokens": args.new, "min_new_tokens": args.new, "pad_token_id": 0}

    def write() -> list[list[int]]:
        with torch.inference_mode():
            written = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **wanted)
        return written[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]

    seconds, written = timed(write, args.calls)
    return seconds, [open_tokenizer(Path(args.model)).decode(row) for row in written]


def folder_of(model: str, root: Path) -> str:
    """``model`` as a folder that both can open."""
    if not model.endswith(".gguf"):
        return model
    out = root / "model"
    command = [sys.executable, "-m", "llmkit", "export", f"init={model}", f"out={out}", "format=hf", "dtype=float32"]
    subprocess.run(command, check=True, capture_output=True)
    return str(out)


def compare(args: argparse.Namespace, model: str) -> None:
    for batch in args.batch:
        rates: dict[str, list[float]] = defaultdict(list)
        written: dict[str, Any] = {}
        for _ in range(args.rounds):
            for who in ("transformers", "llmkit"):
                command = [sys.executable, "-m", "tests.bench.generation", "--who", who, "--model", model, "--batch",
                           str(batch), "--new", str(args.new), "--prompt", str(args.prompt), "--calls",
                           str(args.calls), "--threads", str(args.threads)]  # fmt: skip
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                found = json.loads(done.stdout.splitlines()[-1])
                rates[who].append(found["tokens_per_second"])
                written[who] = found["texts"]
        same = sum(a == b for a, b in zip(written["llmkit"], written["transformers"], strict=True))
        medians = {who: round(statistics.median(found), 1) for who, found in rates.items()}
        spread = {who: round((max(f) - min(f)) / statistics.median(f), 3) for who, f in rates.items()}
        ratio = round(medians["llmkit"] / medians["transformers"], 3)
        print(json.dumps({"batch": batch, "tokens_per_second": medians, "spread": spread, "ratio": ratio,
                          "rows_equal": f"{same} of {batch}"}), flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--who", choices=("llmkit", "transformers"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.who is None:
        with tempfile.TemporaryDirectory() as folder:
            compare(args, folder_of(args.model, Path(folder)))
        return
    import torch

    torch.set_num_threads(args.threads)
    seconds, texts = (ours if args.who == "llmkit" else theirs)(args)
    print(json.dumps({"tokens_per_second": args.batch[0] * args.new / seconds, "texts": texts}))


if __name__ == "__main__":
    main()
