"""Peak memory of the decoder B of ``tests.bench.speed``: fast and low, and with accumulated gradients.

    python -m tests.bench.memory --precision bf16

The peak is that of the whole process as the system counts it, start and preparation of the text left out: that is done
by a run before. ``over the first`` compares with the first line of the same precision; accumulation of whole
micro-batches is to add nothing to it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from tests.bench.speed import Case, run_llmkit, works

CASES = {
    "fast": (),
    "low": ("engine.memory=low",),
    "fast, 4 micro-batches": ("engine.grad_accum_steps=4",),
    "low, 4 micro-batches": ("engine.memory=low", "engine.grad_accum_steps=4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    work = works(Path())["B"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLMKIT_CACHE"] = str(Path(folder) / "cache")
        for precision in chosen.precision:
            settings = vars(chosen) | {"precision": precision, "warmup": 1, "device": "cpu"}
            first = None
            for name in chosen.cases:
                args = argparse.Namespace(**settings)
                if first is None:
                    run_llmkit(
                        work, Case("llmkit", CASES[name]), argparse.Namespace(**settings | {"steps": 2}), Path(folder)
                    )
                found = run_llmkit(work, Case("llmkit", CASES[name]), args, Path(folder))
                first = first or found["peak_gib"]
                shown = {"precision": precision, "case": name, "peak_gib": round(found["peak_gib"], 3)}
                shown |= {"over_the_first": round(found["peak_gib"] / first, 3)}
                print(json.dumps(shown | {"tokens_per_second": round(found["tokens_per_second"])}), flush=True)


if __name__ == "__main__":
    main()
