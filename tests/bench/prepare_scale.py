"""How fast, and in how much memory, text is prepared; and the memory of the sample order.

    python -m tests.bench.prepare_scale                      # 250 and 1000 MB, 1 and 2 workers: about 10 minutes
    python -m tests.bench.prepare_scale --megabytes 10 30    # a quick look

The text is made of the embedded corpus: documents put together from paragraphs drawn at random, every one different.
Each preparation runs in a process of its own with an empty cache. ``peak`` is the largest sum of the resident memory of
all its processes, looked at 50 times a second; ``sum of peaks`` adds up what each process says of itself, at whatever
time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

from llmkit.config.build import build
from llmkit.config.compose import compose
from llmkit.data.prepare import prepare
from llmkit.data.sampler import SampleOrder
from llmkit.settings import DataConfig
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.report import tokenizer_report
from tests.bench.corpus import embedded

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def settings(path: Path, cache: Path, n_workers: int) -> tuple[DataConfig, dict[str, object]]:
    """The data section and tokenizer node of the default recipe."""
    overrides = ["data=files", f"data.path={path}", f"data.cache_dir={cache}", f"data.n_workers={n_workers}"]
    plain = compose("prepare", overrides, None).plain
    return DataConfig(**plain["data"]), plain["tokenizer"]


def documents(n_bytes: int) -> Iterator[str]:
    """Documents of two to twelve paragraphs of the embedded corpus, about ``n_bytes`` of them."""
    paragraphs = [part for text in embedded("python_docs") for part in text.split("\n\n") if len(part) > 20]
    draw = random.Random(0)
    written = 0
    while written < n_bytes:
        text = "\n\n".join(draw.choices(paragraphs, k=draw.randint(2, 12)))
        written += len(text.encode())
        yield text


def write_corpus(path: Path, megabytes: int) -> None:
    with path.open("w") as file:
        for text in documents(megabytes * 1_000_000):
            file.write(json.dumps({"text": text}) + "\n" if path.suffix == ".jsonl" else text + "\n\n")


def prepare_once(path: Path, cache: Path, n_workers: int) -> None:
    """The measured process: prints the report's figures as JSON."""
    data, node = settings(path, cache, n_workers)
    prepared = prepare(data, build(node), tokenizer=None, load=load_tokenizer, report=tokenizer_report, progress=False)
    print(json.dumps({**prepared.report["speed"], **prepared.report["train"]}))


def tree_memory(root: int) -> int:
    """Bytes of resident memory of a process and all below it, now."""
    parents, sizes = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                sizes[int(entry.name)] = int((entry / "statm").read_text().split()[1]) * PAGE_BYTES
            except OSError:
                continue  # it ended meanwhile
    tree = {root}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return sum(sizes.get(pid, 0) for pid in tree)


def measure(path: Path, n_workers: int) -> dict[str, float]:
    """One preparation with an empty cache, watched from outside."""
    with tempfile.TemporaryDirectory(dir=path.parent) as cache:
        command = [sys.executable, "-m", "tests.bench.prepare_scale", "--prepare", str(path), cache, str(n_workers)]
        began, peak = time.monotonic(), 0
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                peak = max(peak, tree_memory(process.pid))
                time.sleep(0.02)
            assert process.stdout is not None
            figures: dict[str, float] = json.loads(process.stdout.read())
    return {**figures, "wall_seconds": time.monotonic() - began, "tree_peak_bytes": peak}


def sampler_memory(n: int) -> int:
    """Peak bytes of Python memory while an order over ``n`` sequences is walked."""
    tracemalloc.start()
    order = SampleOrder((n,), None, seed=1)
    for position in range(1000):
        order.locate(position * (n // 1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[250, 1000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--suffix", choices=["txt", "jsonl"], default="txt")
    parser.add_argument("--folder", help="where the text and the caches go (twice the text's size)")
    parser.add_argument("--prepare", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare:
        prepare_once(Path(args.prepare[0]), Path(args.prepare[1]), int(args.prepare[2]))
        return
    print("| text MB | workers | wall s | MB/s | peak MiB | sum of peaks MiB | tokens |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for megabytes in args.megabytes:
            path = Path(folder, f"corpus.{args.suffix}")
            write_corpus(path, megabytes)
            for n_workers in args.workers:
                found = measure(path, n_workers)
                print(
                    f"| {megabytes} | {n_workers} | {found['wall_seconds']:.1f} | {found['megabytes_per_second']:.1f} "
                    f"| {found['tree_peak_bytes'] / 2**20:.0f} | {found['peak_memory_bytes'] / 2**20:.0f} "
                    f"| {found['n_tokens']:,} |",
                    flush=True,
                )
    for n in (10**3, 10**6, 10**12):
        print(f"sample order over {n:,} sequences: {sampler_memory(n) / 1024:.1f} KiB")


if __name__ == "__main__":
    main()
