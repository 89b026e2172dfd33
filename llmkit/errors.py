"""Every error a user can cause, and the exit code it ends the program with.

    LLMKitError                 1
    ├── ConfigError             2   a wrong key, value, combination or command line
    ├── DataError               3   a file that cannot be read or trained on
    ├── CheckpointError         4   no valid checkpoint, or the disk refused a write
    ├── NumericsError           5   a non-finite loss, gradient or weight
    ├── MemoryBudgetError       6   out of memory
    ├── DistributedError        7   a process group that cannot be trusted, or a time-out
    ├── SetupError              8   a missing extra or an unfit environment
    └── Stopped                75   asked to stop; a resumable checkpoint was saved

A message says what is wrong, where, and how to mend it. ``cli.main`` prints it without a traceback.
"""

from __future__ import annotations

from dataclasses import dataclass

EXIT_OK = 0
EXIT_BUG = 1
EXIT_STOPPED_WITHOUT_CHECKPOINT = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 143}


class LLMKitError(Exception):
    """Base of all errors that are the user's to mend.

    ``where`` is a config path or ``file:line:field``; ``fix`` is one sentence that says what to do.
    """

    exit_code = EXIT_BUG

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration: the config path, what is wrong, where it was written, how to mend it."""

    path: str
    what: str
    origin: str = ""
    fix: str = ""


class ConfigError(LLMKitError):
    """One or more config mistakes; ``problems`` lists all of them."""

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", fix: str = "", problems: tuple[Problem, ...] = ()) -> None:
        super().__init__(what, where=where, fix=fix)
        self.problems = problems


class DataError(LLMKitError):
    exit_code = 3


class CheckpointError(LLMKitError):
    exit_code = 4


class NumericsError(LLMKitError):
    exit_code = 5


class MemoryBudgetError(LLMKitError):
    exit_code = 6


class DistributedError(LLMKitError):
    exit_code = 7


class SetupError(LLMKitError):
    exit_code = 8


class Stopped(LLMKitError):
    """Raised after a stop signal once the state is safe; 75 tells a scheduler to start the same command again."""

    exit_code = 75

    def __init__(self, what: str, *, exit_code: int = 75, fix: str = "") -> None:
        super().__init__(what, fix=fix)
        self.exit_code = exit_code


class BadExample(ValueError):
    """A record that a task cannot use; the reason is short and the same for the same fault. Counted, not fatal."""


def missing_extra(package: str, extra: str) -> SetupError:
    """The error for an optional package that is not installed."""
    return SetupError(f"{package} is not installed", fix=f"pip install 'llmkit[{extra}]'")
