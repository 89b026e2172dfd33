"""Training speed: llmkit beside its peers on the same work, in turns, each in a fresh process.

    python -m tests.bench.speed --out bench --data DIR A B encoder seq2seq --precision fp32 --rounds 3
    python -m tests.bench.speed --device cuda --data DIR 124M 350M 1B bert_base t5_base --precision bf16

``A`` and ``B`` are decoders of 14 and 29 million parameters on the embedded corpus; ``encoder`` is masked LM on the
sentences of SST-2, ``seq2seq`` translation on Multi30k, at their real lengths (both below ``--data``). The others are
for a GPU: three decoders, and masked LM and translation with models of the size of BERT-base and T5-base. ``default``
as precision gives no flag to either side. Writes ``speed.json`` and ``speed.md`` to ``--out``.

llmkit is called as a user calls it. Its figure is what it writes to ``metrics.jsonl``, a line a step; beside it stands
what a clock outside of the process sees, which is the time from line to line as they arrive. Tokens are real ones: no
padding. Warm-up steps are left out. ``of ceiling``: model FLOPs (6 N + 12 L d T a token: PaLM, appendix B, as nanoGPT
counts them) a second over those of the work's large products, timed by themselves in the same turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LOOP = ("engine.log_every=1", "engine.eval_every=null", "engine.save_every=null", "schedule=constant",
        "schedule.warmup_steps=0", "callbacks=none", "tracking.wandb.mode=disabled")  # fmt: skip
DECODER = ("pretrain", "model=gpt2", "model.dropout=0.0", "data.val_fraction=0", "optim.lr=1e-3")
Run = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Who does the work and how: a peer of ``speed_peers``, or ``llmkit``; flags for it."""

    who: str
    flags: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return " ".join((self.who, *(flag.removeprefix("--") for flag in self.flags)))


@dataclass(frozen=True)
class Work:
    """A job: its sizes, llmkit's command for it, and who else does it."""

    sizes: dict[str, int]
    command: tuple[str, ...]
    cases: tuple[Case, ...]


def decoder(
    d_model: int, n_layers: int, n_heads: int, seq_len: int, batch: int, vocab: int = 8192, data: str = "python_docs"
) -> Work:
    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "seq_len": seq_len, "batch": batch}
    command = (
        *DECODER, f"model.d_model={d_model}", f"model.n_layers={n_layers}", f"model.n_heads={n_heads}",
        f"model.max_seq_len={seq_len}", f"data.seq_len={seq_len}", f"engine.micro_batch_size={batch}",
        f"tokenizer.vocab_size={vocab}", f"data={data}",
    )  # fmt: skip
    peers = [Case("plain"), Case("plain", ("--compile",)), Case("trainer_decoder"),
             Case("trainer_decoder", ("--compile",)), Case("litgpt", ("--compile",))]  # fmt: skip
    return Work(sizes | {"vocab": vocab}, command, (Case("llmkit"), Case("llmkit", ("engine.compile=true",)), *peers))


def encoder(data: Path, d_model: int, n_layers: int, n_heads: int, batch: int, vocab: int) -> Work:
    """Masked LM on the sentences of SST-2."""
    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "seq_len": 128, "batch": batch}
    command = (
        "pretrain", "model=bert", "objective=masked_lm", f"model.d_model={d_model}", f"model.n_layers={n_layers}",
        f"model.n_heads={n_heads}", "model.max_seq_len=128", "model.dropout=0.0", "model.pooler=false",
        "tokenizer=wordpiece", f"tokenizer.vocab_size={vocab}", "data.val_fraction=0", "data.seq_len=128",
        f"data.path={data / 'sentiment' / 'sst2.train.jsonl'}", f"engine.micro_batch_size={batch}", "optim.lr=1e-3",
    )  # fmt: skip
    peer = "trainer_encoder"
    return Work(sizes | {"vocab": vocab}, command, (Case("llmkit"), Case(peer), Case(peer, ("--grouped",))))


def seq2seq(data: Path, model: str, d_model: int, n_layers: int, n_heads: int, batch: int, vocab: int = 8192) -> Work:
    """Translation on Multi30k."""
    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "seq_len": 128, "batch": batch}
    sides = [data / "translation" / f"multi30k.train.{language}.txt" for language in ("en", "de")]
    command = (
        "finetune", "task=translation", "task.source=en", "task.target=de", f"data.path={sides[0]}",
        f"data.target_path={sides[1]}", "data.val_fraction=0", f"model={model}", f"model.d_model={d_model}",
        f"model.n_heads={n_heads}", f"model.n_layers={n_layers}", "model.max_seq_len=128", "model.dropout=0.0",
        "tokenizer=bpe", f"tokenizer.vocab_size={vocab}", "engine.max_epochs=null",
        f"engine.micro_batch_size={batch}", "optim.lr=1e-3",
    )  # fmt: skip
    peer = "trainer_t5" if model == "t5" else "trainer_seq2seq"
    return Work(sizes | {"vocab": vocab}, command, (Case("llmkit"), Case(peer), Case(peer, ("--grouped",))))


def works(data: Path) -> dict[str, Work]:
    large = {"vocab": 32768, "data": "python_source"}
    return {
        "A": decoder(384, 6, 6, 256, 16),
        "B": decoder(512, 8, 8, 512, 8),
        "encoder": encoder(data, 256, 4, 4, 32, 8192),
        "seq2seq": seq2seq(data, "bart", 256, 3, 4, 64),
        "124M": decoder(768, 12, 12, 1024, 32, **large),
        "350M": decoder(1024, 24, 16, 1024, 16, **large),
        "1B": decoder(2048, 18, 16, 1024, 8, **large),
        "bert_base": encoder(data, 768, 12, 12, 256, 16384),
        "t5_base": seq2seq(data, "t5", 768, 12, 12, 128),
    }


def run_llmkit(work: Work, case: Case, args: argparse.Namespace, root: Path) -> Run:
    """One training run; the lines of ``metrics.jsonl`` with the moment at which each of them was there."""
    name = f"run{time.monotonic_ns()}"
    precision = () if args.precision == "default" else (f"engine.precision={args.precision}",)
    command = [*work.command, *LOOP, *case.flags, *precision, f"engine.max_steps={args.steps}",
               f"engine.n_threads={args.threads}", f"engine.device={args.device}",
               f"run.root={root}", f"run.name={name}"]  # fmt: skip
    with (root / f"{name}.err").open("wb") as errors:
        process = subprocess.Popen([sys.executable, "-m", "llmkit", *command], stdout=subprocess.DEVNULL, stderr=errors)
        arrivals = list(watch(root / name / "metrics.jsonl", process, args.steps))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
    if status:
        raise SystemExit((root / f"{name}.err").read_text()[-3000:])
    rows = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/loss" in row]
    timed, first = rows[args.warmup :], args.warmup - 1
    tokens = timed[-1]["data/tokens"] - rows[first]["data/tokens"]
    return {
        "tokens_per_second": statistics.median(row["perf/tokens_per_second"] for row in timed),
        "mean_tokens_per_second": tokens / sum(row["perf/step_seconds"] for row in timed),
        "outside_tokens_per_second": tokens / (arrivals[len(rows) - 1] - arrivals[first]),
        "peak_gib": usage.ru_maxrss / 2**20 if args.device == "cpu" else timed[-1]["perf/peak_memory_gib"],
        "loss": timed[-1]["train/loss"],
        "folder": str(root / name),
    }


def watch(path: Path, process: subprocess.Popen[bytes], n_lines: int) -> Iterator[float]:
    """The moments at which ``path`` had one line more, as this process sees them."""
    seen = 0
    while seen < n_lines and process.poll() is None:
        n = path.read_bytes().count(b"\n") if path.exists() else 0
        for _ in range(n - seen):
            yield time.perf_counter()
        seen = max(seen, n)
        time.sleep(0.004)
    if seen < n_lines and path.exists():
        for _ in range(path.read_bytes().count(b"\n") - seen):
            yield time.perf_counter()


def run_peer(case: Case, args: argparse.Namespace, work_file: Path) -> Run:
    flags = [*case.flags, *(["--bf16"] if args.precision == "bf16" else [])]
    command = [sys.executable, "-m", "tests.bench.speed_peers", case.who, "--work", str(work_file), "--steps",
               str(args.steps), "--threads", str(args.threads), "--device", args.device, *flags]  # fmt: skip
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        errors.seek(0)
        if status:
            raise SystemExit(f"{case.label}: {errors.read()[-3000:].decode()}")
    found: Run = json.loads(output.splitlines()[-1])
    rates = [n / s for n, s in zip(found["tokens"], found["seconds"], strict=True)][args.warmup :]
    timed = {"tokens_per_second": statistics.median(rates)} if rates else {"gflops": found["gflops"]}
    peak = usage.ru_maxrss / 2**20 if args.device == "cpu" else found["peak_device_gib"]
    return timed | {"peak_gib": peak, "loss": found["loss"]}


def write_work(work: Work, folder: Path, path: Path) -> None:
    """The ids that llmkit prepared for the run in ``folder``, for the peers: windows, texts or pairs."""
    from llmkit.data.cache import cache_root
    from llmkit.data.prepare import open_entry
    from llmkit.data.token_shards import WindowDataset
    from llmkit.tokenizers.load import load_tokenizer

    checkpoint = max((folder / "checkpoints").iterdir(), key=lambda entry: entry.stat().st_mtime)
    values = {word.partition("=")[0]: word.partition("=")[2] for word in work.command}
    found: dict[str, Any] = {"sizes": work.sizes}
    tokenizer = load_tokenizer(checkpoint / "model")
    if "data.target_path" in values:
        sides = [Path(values[key]).read_text("utf-8").splitlines() for key in ("data.path", "data.target_path")]
        ends = [tokenizer.eos_id]
        found["pairs"] = [[tokenizer.encode(text) + ends for text in pair] for pair in zip(*sides, strict=True)]
    elif "data.path" in values:
        rows = map(json.loads, Path(values["data.path"]).read_text("utf-8").splitlines())
        found["texts"] = [tokenizer.encode(row["text"]) for row in rows]
    else:
        key = json.loads((checkpoint / "state.json").read_text())["data_key"]
        shards = open_entry(cache_root(None) / key, reused=True, reason="").train[0]
        windows = WindowDataset(shards, work.sizes["seq_len"], 1)
        seq_len = work.sizes["seq_len"]
        found["windows"] = [
            shards.window(i * seq_len, (i + 1) * seq_len + 1).tolist()
            for i in range(min(windows.n_sequences - 1, 2000))
        ]
    path.write_text(json.dumps(found))


def compare(name: str, work: Work, args: argparse.Namespace, root: Path) -> dict[str, list[Run]]:
    """Turns of every case; the first of llmkit is not timed: it prepares the text."""
    work_file = root / f"{name}.json"
    short = argparse.Namespace(**{**vars(args), "steps": args.warmup + 1})
    write_work(work, Path(run_llmkit(work, Case("llmkit"), short, root)["folder"]), work_file)
    runs: dict[str, list[Run]] = defaultdict(list)
    for turn in range(args.rounds):
        for case in (Case("ceiling"), *work.cases):
            if case.who == "litgpt" and find_spec("litgpt") is None:
                continue
            ours = case.who == "llmkit"
            found = run_llmkit(work, case, args, root) if ours else run_peer(case, args, work_file)
            found.pop("folder", None)
            runs[case.label].append(found)
            print(json.dumps({"work": name, "turn": turn, "case": case.label, **found}), flush=True)
    return dict(runs)


def flops_per_token(sizes: dict[str, int]) -> int:
    """6 N + 12 L d T of a GPT with a tied head, positions left out."""
    d_model, n_layers = sizes["d_model"], sizes["n_layers"]
    n_params = 12 * n_layers * d_model**2 + sizes["vocab"] * d_model
    return 6 * n_params + 12 * n_layers * d_model * sizes["seq_len"]


def table(name: str, work: Work, runs: dict[str, list[Run]]) -> str:
    """Markdown: medians over the turns, their spread, and the ratio of the best llmkit to each."""

    def median(label: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[label])

    labels = [label for label in runs if label != "ceiling"]
    best = max(median(label, "tokens_per_second") for label in labels if label.startswith("llmkit"))
    ceiling = f"GEMM ceiling {median('ceiling', 'gflops'):.0f} GFLOP/s."
    lines = [f"### {name}: {json.dumps(work.sizes)}", "", ceiling, "",
             "| who | tokens/s | spread | llmkit / who | of ceiling | peak GiB | loss | outside clock |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for label in labels:
        rates = [run["tokens_per_second"] for run in runs[label]]
        rate = statistics.median(rates)
        is_decoder = work.command[0] == "pretrain" and "model=gpt2" in work.command
        share = rate * flops_per_token(work.sizes) / (median("ceiling", "gflops") * 1e9)
        outside = "outside_tokens_per_second" in runs[label][0]
        off = median(label, "outside_tokens_per_second") / median(label, "mean_tokens_per_second") - 1 if outside else 0
        lines.append(
            f"| {label} | {rate:,.0f} | {(max(rates) - min(rates)) / rate:.0%} | {best / rate:.2f} | "
            f"{f'{share:.0%}' if is_decoder else ''} | {median(label, 'peak_gib'):.2f} | "
            f"{median(label, 'loss'):.3f} | {f'{off:+.1%}' if outside else ''} |"
        )
    return "\n".join(lines) + "\n"


def environment() -> dict[str, Any]:
    from llmkit.engine.manifest import library_versions

    return {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version(),
            "versions": library_versions(), "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="*", default=["A"])
    parser.add_argument("--precision", choices=("default", "fp32", "bf16"), default="default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LLMKIT_DATA", "data")))
    parser.add_argument("--out", type=Path, default=Path("runs") / "bench")
    args = parser.parse_args()
    known, tables, results = works(args.data), [], {}
    if unknown := set(args.work) - set(known):
        parser.error(f"no work called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.work:
            runs = compare(name, known[name], args, Path(folder))
            results[name] = {"work": asdict(known[name]), "runs": runs}
            tables.append(table(name, known[name], runs))
            facts = {"environment": environment(), "settings": {k: str(v) for k, v in vars(args).items()}}
            (args.out / "speed.json").write_text(json.dumps(facts | {"results": results}, indent=2) + "\n")
            shown = "\n".join(f"- {key}: {value}" for key, value in facts["environment"].items())
            (args.out / "speed.md").write_text("\n".join([f"{shown}\n- precision: {args.precision}\n", *tables]))
    print((args.out / "speed.md").read_text())


if __name__ == "__main__":
    main()
