"""The command line: commands, flags, messages, exit codes, and what it costs."""

from __future__ import annotations

import errno
import io
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmkit import __version__, cli
from llmkit.cli import COMMANDS, main, parse_flags, report
from llmkit.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DistributedError,
    LLMKitError,
    MemoryBudgetError,
    NumericsError,
    Problem,
    SetupError,
    Stopped,
)

HEAVY = ("torch", "hydra", "omegaconf", "rich", "wandb", "numpy", "yaml", "accelerate", "sentencepiece")


def llmkit(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llmkit", *words],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
        timeout=120,
    )


# -- cost ----------------------------------------------------------------------------------------------------------


def modules_after(*words: str) -> set[str]:
    """Top-level modules that are loaded when the command line has ended."""
    program = (
        "import sys; from llmkit.cli import main; code = main(sys.argv[1:]);"
        "print('modules:', *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("modules:")[2].split())


@pytest.mark.parametrize("words", [["--help"], ["help"], ["--version"], [], ["pretrian"], ["doctor", "--help"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    assert not modules_after(*words) & set(HEAVY)


FIVE_MISTAKES = ["optim.lrr=1", "engine.max_steps=many", "model.n_heads=7", "run.name=a/b", "data.seq_len=4096"]


def test_five_mistakes_are_told_before_torch_is_imported() -> None:
    assert not modules_after("pretrain", *FIVE_MISTAKES) & {"torch", "wandb", "accelerate", "transformers"}
    done = llmkit("pretrain", *FIVE_MISTAKES)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("llmkit: 5 mistakes in the configuration\n")
    for text in ("optim.lrr: unknown key", "did you mean optim.lr?", "engine.max_steps: must be a whole number >= 1"):
        assert text in done.stderr
    for text in ("model.n_heads: must divide d_model (256)", "run.name: must be 1 to 128", "data.seq_len: 4096 tokens"):
        assert text in done.stderr


def cpu_seconds(*words: str) -> float:
    """Processor time of one command line: its wall time on a machine that does nothing else."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    llmkit(*words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(("words", "limit"), [(["--help"], 0.15), (["pretrain", *FIVE_MISTAKES], 1.0)])
def test_answers_at_once(words: list[str], limit: float) -> None:
    assert min(cpu_seconds(*words) for _ in range(3)) <= limit


# -- commands and flags --------------------------------------------------------------------------------------------


def test_overview_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    assert all(f"  {name} " in page and command.example in page for name, command in COMMANDS.items())
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"llmkit {__version__}\n"
    assert main([]) == 2
    assert capsys.readouterr().out == page


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"usage: llmkit {command} [flags]")
    assert COMMANDS[command].meaning in page
    assert ("keys (key=value)" in page) == COMMANDS[command].config
    assert main(["help", *command.split()]) == 0
    assert capsys.readouterr().out == page


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["pretrian"], "did you mean pretrain?"),
        (["xyz"], "`llmkit --help` lists the commands"),
        (["pretrain", "--dryrun"], "did you mean --dry-run?"),
        (["generate", "--promt=x"], "did you mean --prompt?"),
        (["evaluate", "--dry-run"], "no flag '--dry-run'"),
        (["generate", "--prompt"], "expected one argument"),
        (["pretrain", "--cfg", "all"], "invalid choice"),
        (["recipes", "sho", "x"], "llmkit recipes [show NAME]"),
        (["recipes", "gpt_tiny"], "llmkit recipes show gpt_tiny"),
        (["recipes", "show", "gpt_tny"], "did you mean gpt_tiny?"),
        (["recipes", "show"], "one name"),
        (["pretrain", "recipe=gtp_tiny"], "did you mean gpt_tiny?"),
        (["pretrain", "--config-dir", "/nothing/here"], "no such folder"),
    ],
)
def test_usage_mistakes(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert text in capsys.readouterr().err


def test_flags_and_overrides_in_any_order() -> None:
    args = parse_flags("generate", ["a=1", "--prompt", "x", "b=2", "--allow=p", "--prompt", "y=z", "~c"])
    assert (args.overrides, args.prompt, args.allow) == (["a=1", "b=2", "~c"], ["x", "y=z"], ["p"])
    args = parse_flags("pretrain", ["recipe=gpt_tiny", "--dry-run", "-m"])
    assert (args.dry_run, args.multirun, args.help, args.cfg) == (True, True, False, None)


def test_the_command_gets_the_checked_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    fake = SimpleNamespace(run=lambda cfg, args: seen.append((cfg, args)) or 42)
    monkeypatch.setattr(cli, "_load", lambda command: fake)
    assert main(["pretrain", "recipe=gpt_small", "--dry-run", "optim.lr=1e-5", "--debug"]) == 42
    cfg, args = seen[0]
    assert (cfg.optim["lr"], cfg.run.name) == (1e-5, "gpt_small")
    assert args.argv == ["llmkit", "pretrain", "recipe=gpt_small", "--dry-run", "optim.lr=1e-5", "--debug"]
    assert args.differences == ["optim.lr: 0.0006 -> 1e-05"]
    assert args.debug


def test_cfg_prints_the_composed_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    assert main(["pretrain", "recipe=gpt_tiny", "optim.lr=3e-4", "--cfg", "job"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["optim"]["lr"] == 3e-4
    assert list(shown)[:2] == ["run", "init"]
    assert main(["evaluate", "--cfg=job"]) == 0
    assert "init: ???" in capsys.readouterr().out
    assert main(["pretrain", "run.name=${nothing}", "--cfg", "job"]) == 2


def test_a_package_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "own_parts").mkdir()
    (tmp_path / "own_parts" / "__init__.py").write_text(
        "class Flat:\n    def __init__(self, warmup_steps: int, min_lr_ratio: float) -> None: ...\n"
        "    def factor(self, step: int, max_steps: int) -> float:\n        return 1.0\n"
    )
    words = [sys.executable, "-P", "-m", "llmkit", "pretrain", "--cfg", "job", "schedule._target_=own_parts.Flat"]
    check = [sys.executable, "-P", "-m", "llmkit", "pretrain", "--dry-run", "schedule._target_=own_parts.Flat"]
    run = {"capture_output": True, "text": True, "cwd": tmp_path, "check": False, "timeout": 120}
    assert subprocess.run(words, **run).returncode == 0  # type: ignore[call-overload]
    refused = subprocess.run(check, **run)  # type: ignore[call-overload]
    assert refused.returncode == 2
    assert "--allow own_parts" in refused.stderr
    wrong = subprocess.run([*check, "--allow", "own_parts", "schedule.warmup_steps=x"], **run)  # type: ignore[call-overload]
    assert "schedule.warmup_steps: must be a whole number" in wrong.stderr
    assert "1 mistake " in wrong.stderr


# -- errors --------------------------------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """Named like the one of torch."""


class DistBackendError(RuntimeError):
    """Named like the one of torch."""


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (LLMKitError("x"), 1, "x"),
        (ConfigError("x", where="a.b", fix="do y"), 2, "llmkit: x\n  where: a.b\n  fix:   do y"),
        (DataError("x"), 3, "x"),
        (CheckpointError("x"), 4, "x"),
        (NumericsError("x"), 5, "x"),
        (MemoryBudgetError("x"), 6, "x"),
        (DistributedError("x"), 7, "x"),
        (SetupError("x"), 8, "x"),
        (Stopped("x"), 75, "x"),
        (Stopped("x", exit_code=143), 143, "x"),
        (OutOfMemoryError("tried to allocate"), 6, "engine.micro_batch_size"),
        (MemoryError(), 6, "out of memory\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 6, "out of memory"),
        (DistBackendError("NCCL"), 7, "process group"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 4, "No space left on device\n  where: runs/x"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 4, "Permission denied"),
        (ModuleNotFoundError("No module named 'hydra'", name="hydra"), 8, "hydra is not installed"),
        (ModuleNotFoundError("No module named 'llmkit.x'", name="llmkit.x"), 1, "bug"),
        (ValueError("odd"), 1, "ValueError: odd"),
        (OSError("odd"), 1, "bug"),
    ],
)
def test_messages_and_exit_codes(
    error: Exception, code: int, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_load", fail)
    assert main(["doctor"]) == code
    shown = capsys.readouterr().err
    assert text in shown
    assert "Traceback" not in shown
    assert main(["doctor", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("LLMKIT_DEBUG", "1")
    main(["doctor"])
    assert "Traceback" in capsys.readouterr().err


def test_problems_are_listed_by_one_rank(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    error = ConfigError("1 mistake", problems=(Problem("a.b", "is odd", "x.yaml:3", "mend it"),))
    assert report(error) == 2
    assert capsys.readouterr().err.endswith("\n  a.b: is odd\n    where: x.yaml:3\n    fix:   mend it\n")
    monkeypatch.setenv("RANK", "1")
    assert report(error) == 2
    assert capsys.readouterr().err == ""
    assert report(DataError("of this rank")) == 3
    assert "of this rank" in capsys.readouterr().err


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(command: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_load", interrupt)
    assert main(["doctor"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_reader_that_has_had_enough() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "llmkit", "pretrain", "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_module_and_script_are_the_same_program() -> None:
    assert llmkit("--version").stdout == f"llmkit {__version__}\n"
    assert isinstance(sys.stdout, io.TextIOBase)
