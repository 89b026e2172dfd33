"""Kill a real `llmkit pretrain` at random moments, start the same command again, and compare with an unbroken run.

    python -m tests.faults.kill_and_resume --kills 100
    python -m tests.faults.kill_and_resume --kills 60 --signals
    python -m tests.faults.kill_and_resume --kills 20 --pair next_sentence-bert

SIGKILL is the default; with ``--signals`` SIGTERM, SIGINT and SIGUSR1 take turns, and the exit codes are checked too.
Attempts are forked from a process that has torch loaded already; ``--fresh`` starts a new interpreter for each of them.
A run counts as equal when every row of its ``metrics.jsonl`` (all but wall-clock figures) and the bytes of its last
weights and optimizer state are those of the unbroken run. Ends with 0 when nothing was lost, 1 otherwise.
"""

from __future__ import annotations

import argparse
import importlib
import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.pairs import PAIRS

PHASES = ("start", "prepare", "build", "step", "eval", "save", "remove", "end")
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
CODE_BEFORE_FIRST_STEP = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}
PATIENCE_S = 120.0
SEQ_LEN, SEQUENCES_A_STEP = 32, 8
RECIPE = (
    *("model.dropout=0.1", "model.max_seq_len=64"),
    *(f"data.seq_len={SEQ_LEN}", "data.val_fraction=0.1", "data.n_workers=1"),
    *("engine.micro_batch_size=4", "engine.grad_accum_steps=2", "engine.n_threads=1", "engine.device=cpu"),
    "engine.precision=fp32",
    *("engine.max_steps=60", "engine.eval_every=7", "engine.save_every=5", "engine.log_every=1"),
    *("schedule.warmup_steps=5", "optim.lr=3e-3", "tracking=none", "callbacks=none"),
)
LOADED_BEFORE = (
    *("accelerate", "hydra", "sentencepiece", "torch._dynamo"),
    *("llmkit.config.check", "llmkit.config.compose", "llmkit.commands.training"),
)
WALL_CLOCK = ("perf/", "time/")


def write_corpus(path: Path) -> None:
    """90 documents, no two alike: equal losses cannot hide a repeated batch. The run ends in the second epoch."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(200)]

    def sentence() -> str:
        return " ".join(rng.choices(words, k=rng.randint(3, 12))).capitalize() + "."

    texts = (" ".join(sentence() for _ in range(rng.randint(1, 7))) for _ in range(90))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def mark_phases(shared: mmap.mmap) -> None:
    """Let the process write what it is doing into its first shared byte."""
    from llmkit.commands import training
    from llmkit.engine import trainer
    from llmkit.engine.checkpoint import CheckpointStore

    def during(phase: str, function: Callable[..., Any], after: str = "") -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            before, shared[0] = shared[0], PHASES.index(phase)
            try:
                return function(*args, **kwargs)
            finally:
                shared[0] = PHASES.index(after) if after else before

        return marked

    for owner, name, phase, after in (
        (training, "load_text", "prepare", "build"),
        (trainer.Trainer, "fit", "step", "end"),
        (trainer, "evaluate", "eval", ""),
        (CheckpointStore, "save", "save", ""),
        (CheckpointStore, "_retain", "remove", ""),
    ):
        setattr(owner, name, during(phase, getattr(owner, name), after))


def run_llmkit(shared: mmap.mmap, log: Path, argv: Sequence[str]) -> int:
    """One attempt inside its own process; what it prints goes to ``log``."""
    from llmkit.cli import main

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    mark_phases(shared)
    return main(argv)


@dataclass
class Attempt:
    """A started process and the byte in which it says what it is doing."""

    pid: int
    shared: mmap.mmap

    @property
    def phase(self) -> str:
        return PHASES[self.shared[0]]

    def code(self, *, wait: bool) -> int | None:
        """Exit code, minus the signal that ended it, or None while it runs."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if not wait:
                return None
            time.sleep(0.002)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise SystemExit(f"attempt {self.pid} did not end within {PATIENCE_S} s (phase {self.phase})")


@dataclass
class Experiment:
    """All attempts of all runs, and what was found wrong."""

    folder: Path
    kills: int
    rng: random.Random
    use_stop_signals: bool
    fresh: bool
    overrides: Sequence[str]
    by_phase: Counter[str] = field(default_factory=Counter)
    by_code: Counter[str] = field(default_factory=Counter)
    starts_in_a_run: list[int] = field(default_factory=list)
    resumes_in_an_epoch: int = 0
    steps_in_an_epoch: float = 0.0
    wrong: list[str] = field(default_factory=list)
    duration: float = 0.0

    # -- one attempt ---------------------------------------------------------------------------------------------

    def start(self, name: str) -> Attempt:
        """The same command each time; every run prepares its data in a cache of its own."""
        path = self.folder / "phase"
        path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as file:
            shared = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        argv = ["pretrain", *RECIPE, f"data.path={self.folder / 'corpus.jsonl'}", f"run.root={self.folder / 'runs'}"]
        argv += [f"run.name={name}", f"data.cache_dir={self.folder / 'cache' / name}", *self.overrides]
        log = self.folder / f"{name}.log"
        if self.fresh:
            command = [sys.executable, "-m", "tests.faults.kill_and_resume", "--child", str(path), str(log), *argv]
            return Attempt(os.spawnv(os.P_NOWAIT, sys.executable, command), shared)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = run_llmkit(shared, log, argv)
            except KeyboardInterrupt:  # before llmkit's own first line
                code = CODE_BEFORE_FIRST_STEP[signal.SIGINT]
            finally:
                os._exit(code)
        return Attempt(pid, shared)

    def strike(self, attempt: Attempt, number: signal.Signals) -> tuple[str, int | None]:
        """Send ``number`` at a random moment; the phase it met, and None or the exit code of a process that was faster.

        Half of the moments are uniform in time. The others wait for a phase, so that short ones are met as well.
        """
        wanted = self.rng.choice(PHASES[:-1]) if self.rng.random() < 0.5 else ""
        is_early = wanted in PHASES[: PHASES.index("step")]
        moment = time.monotonic() + (0 if is_early else self.rng.uniform(0, 0.5) * self.duration)
        while time.monotonic() < moment or (wanted and attempt.phase != wanted):
            code = attempt.code(wait=False)
            if code is not None:
                return attempt.phase, code
            if is_early and attempt.phase not in PHASES[: PHASES.index(wanted) + 1]:
                break  # it was too short to be seen
            time.sleep(0.0005)
        time.sleep(self.rng.choice([0.0, 0.001, 0.004, 0.02, 0.2]) * self.rng.random())
        phase = attempt.phase
        os.kill(attempt.pid, number)
        return phase, None

    # -- one run -------------------------------------------------------------------------------------------------

    def unbroken(self) -> dict[str, Any]:
        """The run that nothing disturbs. A second one tells how long an attempt takes."""
        for name in ("unbroken", "again"):
            started = time.monotonic()
            code = self.start(name).code(wait=True)
            self.duration = time.monotonic() - started
            if code != 0:
                raise SystemExit(f"the unbroken run ended with {code}:\n{(self.folder / f'{name}.log').read_text()}")
        wanted = self.result("unbroken")
        if self.result("again") != wanted:
            raise SystemExit("two unbroken runs differ: nothing can be compared on this machine")
        (report,) = (self.folder / "cache" / "unbroken").glob("*/report.json")
        n_sequences = json.loads(report.read_text())["train"]["n_tokens"] / SEQ_LEN
        self.steps_in_an_epoch = n_sequences / SEQUENCES_A_STEP
        return wanted

    def result(self, name: str) -> dict[str, Any]:
        """Every row of the curve, and the bytes that training arrived at."""
        from llmkit.engine.manifest import record_of

        run = self.folder / "runs" / name
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        newest = self.newest(name)
        last = run / "checkpoints" / f"step_{newest}"
        hashes = {file: record_of(last / file) for file in ("model/model.safetensors", "optimizer.safetensors")}
        curve = [{key: value for key, value in row.items() if not key.startswith(WALL_CLOCK)} for row in rows]
        return {"curve": curve, "hashes": hashes, "step": newest}

    def newest(self, name: str) -> int:
        """The newest valid step, 0 without one."""
        from llmkit.engine.checkpoint import CheckpointStore

        found = CheckpointStore(self.folder / "runs" / name / "checkpoints", keep_last=2, keep_best=True).newest()
        return found.step if found else 0

    def broken(self, name: str, wanted: dict[str, Any]) -> None:
        """Strike and start again until the run is through; then compare."""
        committed, starts = 0, 0
        epochs: Counter[int] = Counter()
        while True:
            attempt = self.start(name)
            starts += 1
            epochs[int(committed / self.steps_in_an_epoch)] += committed > 0
            number = signal.SIGKILL
            if self.use_stop_signals:
                number = STOPS[self.by_phase.total() % len(STOPS)]
            phase, code = ("end", attempt.code(wait=True)) if self.enough else self.strike(attempt, number)
            struck = code is None
            code = attempt.code(wait=True) if code is None else code
            struck = struck and (self.use_stop_signals or code != 0)  # a SIGKILL may come after the end
            if struck:
                self.by_phase[phase] += 1
                self.by_code[f"{number.name} in {phase}: {code}" if self.use_stop_signals else str(code)] += 1
            self.judge(name, phase, number if struck else None, code or 0)
            found = self.newest(name)
            if found < committed:
                self.wrong.append(f"{name}: committed step {committed} was lost, the newest is {found}")
            committed = found
            if code == 0:
                break
            if self.wrong:
                return
        self.starts_in_a_run.append(starts)
        self.resumes_in_an_epoch = max(self.resumes_in_an_epoch, *epochs.values())
        got = self.result(name)
        self.wrong += [f"{name}: {key} differs from the unbroken run" for key in wanted if got[key] != wanted[key]]

    def judge(self, name: str, phase: str, number: signal.Signals | None, code: int) -> None:
        """Whether the attempt was allowed to end with ``code``."""
        allowed = {0}
        if number == signal.SIGKILL:
            allowed |= {-signal.SIGKILL}
        elif number is not None and phase in ("start", "prepare", "build"):
            # Before the handlers are there, the system ends the process: -15 is what a shell calls 143.
            allowed |= {CODE_BEFORE_FIRST_STEP[number], 75} | ({-number} if phase == "start" else set())
        elif number is not None and phase != "end":
            allowed |= {75}
        elif number is not None:
            allowed |= {CODE_BEFORE_FIRST_STEP[number], -number}
        if code not in allowed:
            tail = (self.folder / f"{name}.log").read_text()[-1500:]
            self.wrong.append(
                f"{name}: ended with {code} in phase {phase} ({number}), allowed {sorted(allowed)}\n{tail}"
            )

    @property
    def enough(self) -> bool:
        return self.by_phase.total() >= self.kills

    def run(self) -> int:
        """All of it; prints the figures and returns the exit code."""
        write_corpus(self.folder / "corpus.jsonl")
        started = time.monotonic()
        wanted = self.unbroken()
        while not self.enough and not self.wrong:
            self.broken(f"run{len(self.starts_in_a_run)}", wanted)
        print(
            f"{self.by_phase.total()} signals in {len(self.starts_in_a_run)} runs, {time.monotonic() - started:.0f} s"
        )
        print("  by phase:", ", ".join(f"{phase} {self.by_phase[phase]}" for phase in PHASES))
        print("  exit codes:", ", ".join(f"{text} ({n}x)" for text, n in sorted(self.by_code.items())))
        starts = self.starts_in_a_run or [0]
        print(f"  starts until a run was through: {min(starts)} to {max(starts)}")
        print(f"  resumes inside one epoch ({self.steps_in_an_epoch:.1f} steps): up to {self.resumes_in_an_epoch}")
        print(f"  rows compared in each run: {len(wanted['curve'])}, of {wanted['step']} steps")
        print(f"  wrong: {len(self.wrong)}", *self.wrong, sep="\n    ")
        return 1 if self.wrong else 0


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        with open(sys.argv[2], "r+b") as file:
            return run_llmkit(mmap.mmap(file.fileno(), mmap.PAGESIZE), Path(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="signals to send before the last run may finish")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments")
    parser.add_argument("--signals", action="store_true", help="SIGTERM, SIGINT and SIGUSR1 instead of SIGKILL")
    parser.add_argument("--fresh", action="store_true", help="a new interpreter for every attempt")
    parser.add_argument("--pair", choices=PAIRS, default="causal_lm-gpt2", help="objective and family")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it there")
    args, overrides = parser.parse_known_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not args.fresh:
            for name in LOADED_BEFORE:
                importlib.import_module(name)
        rng = random.Random(args.seed)
        return Experiment(folder, args.kills, rng, args.signals, args.fresh, [*PAIRS[args.pair], *overrides]).run()


if __name__ == "__main__":
    sys.exit(main())
