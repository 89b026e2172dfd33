"""The ``llmkit`` command: picks the command, checks its configuration, and only then loads what does the work.

Every module outside the standard library is imported inside a function, so that ``llmkit --help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llmkit import __version__
from llmkit.errors import EXIT_BUG, EXIT_OK, ConfigError, LLMKitError, MemoryBudgetError, Problem


@dataclass(frozen=True)
class Flag:
    """A command-line flag; ``value`` names its argument, and is empty for a switch."""

    names: tuple[str, ...]
    meaning: str
    value: str = ""
    repeat: bool = False


@dataclass(frozen=True)
class Command:
    """``module`` has ``run(cfg, args)``. A command with ``config`` takes ``key=value`` arguments."""

    module: str
    meaning: str
    config: bool = True
    flags: tuple[Flag, ...] = ()
    example: str = ""


DEBUG = Flag(("--debug",), "show the traceback of an error")
COMMON = (
    Flag(("--cfg",), "print the composed configuration (job) and stop", "job"),
    Flag(("-m", "--multirun"), "run once for every combination of key=a,b values"),
    Flag(("--config-dir",), "look for groups and recipes in this folder first", "DIR"),
    Flag(("--allow",), "let _target_ name classes of this package too", "PACKAGE", repeat=True),
)

COMMANDS = {
    "pretrain": Command(
        "llmkit.commands.pretrain",
        "train a language model on text, from raw files to a resumable checkpoint",
        flags=(Flag(("--dry-run",), "show the plan: parameters, tokens, memory, steps; start nothing"),),
        example="llmkit pretrain recipe=gpt_tiny 'data.path=notes/*.txt' optim.lr=6e-4 run.name=mine",
    ),
    "prepare": Command(
        "llmkit.commands.prepare",
        "train the tokenizer and make the token shards once, with a report",
        example="llmkit prepare recipe=gpt_tiny data.path=corpus.jsonl",
    ),
    "finetune": Command(
        "llmkit.commands.finetune",
        "fine-tune a model for a task: sentiment, qa, summarization, translation, code, chat",
        example="llmkit finetune task=sentiment init=runs/bert_tiny data.path=reviews.jsonl run.name=reviews",
    ),
    "evaluate": Command(
        "llmkit.commands.evaluate",
        "loss, perplexity and bits per byte of a model on text; with task=..., a task's metrics on rows",
        example="llmkit evaluate init=runs/mine data.path=heldout.txt",
    ),
    "predict": Command(
        "llmkit.commands.predict",
        "answers of a fine-tuned model to texts or to the rows of a file",
        flags=(
            Flag(("--text",), "a text to answer, or JSON with the task's roles", "TEXT", repeat=True),
            Flag(("--file",), "a file of rows to answer", "FILE"),
            Flag(("--out",), "write the answers here, a JSON object a line", "FILE"),
        ),
        example="llmkit predict init=runs/reviews --text 'What a lovely day'",
    ),
    "chat": Command(
        "llmkit.commands.chat",
        "talk with a model",
        example="llmkit chat init=runs/assistant",
    ),
    "data show": Command(
        "llmkit.commands.data_show",
        "rows of a task token by token: what is trained, what is masked, what was cut",
        example="llmkit data show task=chat data.path=conversations.jsonl",
    ),
    "generate": Command(
        "llmkit.commands.generate",
        "continue prompts with a trained model",
        flags=(
            Flag(("--prompt",), "text to continue", "TEXT", repeat=True),
            Flag(("--prompt-file",), "a file with one prompt a line; - reads standard input", "FILE"),
        ),
        example="llmkit generate init=runs/mine --prompt 'The with statement'",
    ),
    "export": Command(
        "llmkit.commands.export",
        "write a model for transformers, vLLM or llama.cpp, and check that it computes the same there",
        example="llmkit export init=runs/mine format=hf dtype=bfloat16 out=mine-hf",
    ),
    "recipes": Command(
        "llmkit.commands.recipes",
        "list the recipes; `llmkit recipes show NAME` prints one and what it composes to",
        config=False,
        flags=(Flag(("--config-dir",), "look in this folder too", "DIR"),),
        example="llmkit recipes show gpt_tiny",
    ),
    "doctor": Command(
        "llmkit.commands.doctor",
        "check this machine and print a report to paste into a question",
        config=False,
        example="llmkit doctor",
    ),
}

TASK_ROOTS = {"evaluate": "evaluate_task"}
MODULES = {"evaluate_task": "llmkit.commands.evaluate_task"}  # of roots that are not a command's own


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code of ``llmkit.errors``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv or os.environ.get("LLMKIT_DEBUG", "") not in ("", "0")
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except KeyboardInterrupt:
        print("llmkit: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        return report(error)


def _dispatch(argv: list[str]) -> int:
    words = [word for word in argv if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        if len(words) > 1 and words[0] == "help":
            return _dispatch([*words[1:], "--help"])
        print(overview())
        return EXIT_OK if words else ConfigError.exit_code
    if words[0] == "--version":
        print(f"llmkit {__version__}")
        return EXIT_OK
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    if name not in COMMANDS:
        raise _unknown("command", name, list(COMMANDS), "`llmkit --help` lists the commands")
    args = parse_flags(name, words[len(name.split()) :])
    args.argv = ["llmkit", *argv]
    args.debug = "--debug" in argv
    command = COMMANDS[name]
    if not command.config and args.help:
        print(short_help(name))
        return EXIT_OK
    if command.config:
        return _run_configured(name, args)
    code: int = _load(command.module).run(None, args)
    return code


def _load(module: str) -> Any:
    import importlib

    return importlib.import_module(module)


def _run_configured(name: str, args: argparse.Namespace) -> int:
    """Compose, check, and hand over to the command."""
    from llmkit.config import targets
    from llmkit.config.check import check, config_error
    from llmkit.config.compose import compose

    for prefix in args.allow:
        targets.allow(prefix)
    folder = Path(args.config_dir) if args.config_dir else None
    root = root_of(name, args.overrides)
    if args.help:
        from llmkit.config.help import config_help

        print(f"{short_help(name)}\n\n{config_help(root, args.overrides, folder)}")
        return EXIT_OK
    if args.multirun:
        from llmkit.config.sweep import sweep

        return sweep(root, args.overrides, folder, passed_on(name, args))
    composed = compose(root, args.overrides, folder)
    if args.cfg:
        from llmkit.config.yaml_file import dump

        if composed.problems:
            raise config_error(composed.problems)
        print(dump(composed.plain), end="")
        return EXIT_OK
    cfg = check(root, composed)
    if getattr(args, "dry_run", False):
        args.differences = [f"{path}: {old} -> {new}" for path, old, new in composed.differences()]
    from llmkit.tracking.logs import setup_logging

    setup_logging(_rank(), debug=args.debug)
    code: int = _load(MODULES.get(root, COMMANDS[name].module)).run(cfg, args)
    return code


def root_of(name: str, overrides: Sequence[str]) -> str:
    """The root file in ``recipes/`` of a command; `evaluate` has a second one, for tasks."""
    root = name.replace(" ", "_")
    return TASK_ROOTS[root] if root in TASK_ROOTS and any(word.startswith("task=") for word in overrides) else root


# -- flags ---------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, fix=f"`{self.prog} --help` lists the flags")


def parse_flags(name: str, words: list[str]) -> argparse.Namespace:
    """Flags and ``key=value`` arguments in any order."""
    flags = flags_of(name)
    parser = _Parser(f"llmkit {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    for flag in flags:
        if not flag.value:
            parser.add_argument(*flag.names, action="store_true")
        elif flag.repeat:
            parser.add_argument(*flag.names, action="append", default=[])
        else:
            parser.add_argument(*flag.names, choices=["job"] if flag.value == "job" else None)
    args, rest = parser.parse_known_args(words)
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        spelt = [name for flag in flags for name in flag.names]
        raise _unknown("flag", unknown[0].partition("=")[0], spelt, f"`llmkit {name} --help` lists the flags")
    args.overrides = rest
    return args


def flags_of(name: str) -> tuple[Flag, ...]:
    command = COMMANDS[name]
    return (*command.flags, *(COMMON if command.config else ()))


def passed_on(name: str, args: argparse.Namespace) -> list[str]:
    """The flags that each job of a sweep gets too."""
    words = []
    for flag in flags_of(name):
        value = getattr(args, flag.names[-1].lstrip("-").replace("-", "_"))
        if flag.names[-1] == "--multirun" or not value:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"{flag.names[-1]}={value}" if flag.value else flag.names[-1] for value in values]
    return words


def _unknown(kind: str, word: str, options: list[str], otherwise: str) -> ConfigError:
    from llmkit.config.suggest import did_you_mean, nearest

    return ConfigError(f"no {kind} {word[:80]!r}", fix=did_you_mean(nearest(word, options)) or otherwise)


# -- help ----------------------------------------------------------------------------------------------------------


def overview() -> str:
    """What ``llmkit --help`` prints."""
    commands = [f"  {name:<10} {command.meaning}" for name, command in COMMANDS.items()]
    examples = [f"  {command.example}" for command in COMMANDS.values()]
    return "\n".join(
        [
            "usage: llmkit <command> [flags] [key=value ...]",
            "",
            "Train language models from YAML recipes.",
            "",
            "commands:",
            *commands,
            "",
            "examples:",
            *examples,
            "",
            "`llmkit <command> --help` shows a command's flags, config groups and keys. `llmkit --version`.",
        ]
    )


def short_help(name: str) -> str:
    """Usage, meaning, flags and example of a command; configured commands add their groups and keys."""
    command = COMMANDS[name]
    shown = [(", ".join(flag.names) + (f" {flag.value}" if flag.value else ""), flag) for flag in flags_of(name)]
    shown += [("--debug", DEBUG), ("-h, --help", Flag((), "this text"))]
    flags = [f"  {names:<22} {flag.meaning}{' (repeatable)' if flag.repeat else ''}" for names, flag in shown]
    rest = "[key=value ...]" if command.config else ""
    usage = f"usage: llmkit {name} [flags] {rest}".rstrip()
    return "\n".join([usage, "", command.meaning, "", "flags:", *flags, "", "example:", f"  {command.example}"])


# -- errors --------------------------------------------------------------------------------------------------------

_DISK = {"ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO"}
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
_GROUP_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError", "DistError")


def report(error: Exception) -> int:
    """Print ``error`` for a person, on stderr, and return its exit code."""
    known = error if isinstance(error, LLMKitError) else _translated(error)
    if known is None:
        print(f"llmkit: {type(error).__name__}: {str(error)[:500]}", file=sys.stderr)
        print("  This is a bug in llmkit. --debug shows where; please report it with `llmkit doctor`.", file=sys.stderr)
        return EXIT_BUG
    problems = known.problems if isinstance(known, ConfigError) else ()
    if problems and _rank() != 0:
        return known.exit_code  # every rank finds the same mistakes; one of them tells
    print(f"llmkit: {known}", file=sys.stderr)
    for problem in problems:
        print(_shown(problem), file=sys.stderr)
    return known.exit_code


def _shown(problem: Problem) -> str:
    lines = [f"\n  {problem.path}: {problem.what}"]
    lines += [f"    where: {problem.origin}"] if problem.origin else []
    lines += [f"    fix:   {problem.fix}"] if problem.fix else []
    return "\n".join(lines)


def _translated(error: Exception) -> LLMKitError | None:
    """Errors of the system and of torch that have an exit code of their own; None for a bug."""
    import errno

    from llmkit.errors import CheckpointError, DistributedError, SetupError

    names = {cls.__name__ for cls in type(error).__mro__}
    text = str(error).strip().split("\n")[0][:300]
    if isinstance(error, ModuleNotFoundError) and not (error.name or "llmkit").startswith("llmkit"):
        return SetupError(
            f"the package {error.name} is not installed", fix="pip install llmkit; `llmkit doctor` checks"
        )
    if isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in _DISK:
        return CheckpointError(f"the disk refused: {error.strerror}", where=str(error.filename or ""))
    lacks_memory = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names or lacks_memory:
        fix = "halve engine.micro_batch_size and double engine.grad_accum_steps: the result is the same"
        return MemoryBudgetError(f"out of memory: {text}".rstrip(": "), fix=fix)
    if names.intersection(_GROUP_ERRORS):
        return DistributedError(f"the process group failed: {text}")
    return None


def _rank() -> int:
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0
