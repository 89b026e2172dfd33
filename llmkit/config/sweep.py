"""``-m``: one run for every combination of ``key=a,b`` values.

Hydra's own ``main`` makes the combinations, so its sweepers and launchers work. Each job is a process of its own: the
state of Accelerate, of process groups and of a GPU's memory does not outlive it, and one failure stops no other job.
The jobs' folders are ``run.name`` with the job's number; ``<run.root>/<run.name>-sweep/`` holds a line for each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmkit.config.check import check, config_error
from llmkit.config.choices import USER_RECIPE, Choices, recipes_dir, tell_hydra, version_base
from llmkit.config.compose import compose
from llmkit.config.overrides import Override, parse
from llmkit.errors import ConfigError, LLMKitError, Problem, Stopped

SCORE = "val/loss"
SPELT = {"evaluate_task": ("evaluate",), "data_show": ("data", "show")}  # roots that are not called like their command
STOPPED = 75
_stopped = threading.Event()


@dataclass(frozen=True)
class Job:
    """What became of one job. ``score`` is its last ``val/loss`` in nats, null without one."""

    number: int
    overrides: list[str]
    exit_code: int
    score: float | None


def sweep(command: str, texts: list[str], config_dir: Path | None, flags: list[str]) -> int:
    """Run every job with ``flags``; 0 when all of them went well.

    Raises ConfigError before the first job when a value of any is wrong.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("a sweep starts its own processes", fix="start it without torchrun, as one process")
    overrides = _read(texts)
    first = _check_all(command, overrides, config_dir)
    run = first.get("run", {"root": "runs", "name": command})
    folder = Path(run["root"]).expanduser() / f"{run['name']}-sweep"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("job-*.json"):
        old.unlink()
    picked, words = _for_hydra(command, overrides, config_dir, folder)
    recipe = str(picked.recipe_file.path) if picked.recipe_file else ""
    _hydra_main(_task(command, flags, recipe, folder, "run" in first), command, words)
    return _summary(folder)


def _read(texts: list[str]) -> list[Override]:
    read = [parse(text, sweep=True) for text in texts]
    problems = [override for override in read if isinstance(override, Problem)]
    if problems:
        raise config_error(problems)
    return [override for override in read if isinstance(override, Override)]


def _check_all(command: str, overrides: list[Override], config_dir: Path | None) -> dict[str, Any]:
    """Check the first value of every sweep together, then each other value in its place; the first configuration."""
    own = [override for override in overrides if not override.key.startswith(("hydra.", "hydra/"))]
    firsts = [f"{_key(o)}={o.choices[0]}" if o.choices else o.text for o in own]
    known = [text for text, o in zip(firsts, own, strict=True) if o.choices or not _is_drawn(o)]
    plain = compose(command, known, config_dir).plain
    problems: dict[Problem, None] = {}
    for variant in _variants(own, firsts):
        composed = compose(command, [text for text in variant if text], config_dir)
        try:
            check(command, composed, resuming=False)
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise config_error(list(problems))
    return plain


def _key(override: Override) -> str:
    return override.text.partition("=")[0]


def _is_drawn(override: Override) -> bool:
    """A range that only a sweeper draws from, as ``interval(0, 1)``: there is no value to check yet."""
    return override.kind == "set" and override.value is None and override.raw != "null"


def _variants(own: list[Override], firsts: list[str]) -> Iterator[list[str]]:
    base = ["" if not o.choices and _is_drawn(o) else text for o, text in zip(own, firsts, strict=True)]
    yield base
    for place, override in enumerate(own):
        for choice in override.choices[1:]:
            yield [*base[:place], f"{_key(override)}={choice}", *base[place + 1 :]]


def _for_hydra(
    command: str, overrides: list[Override], config_dir: Path | None, folder: Path
) -> tuple[Choices, list[str]]:
    """The arguments for Hydra's ``main``: the user's, and those that keep it quiet and out of the working folder."""
    picked = Choices(command, config_dir)
    words = []
    for override in overrides:
        if override.key == "recipe" and not override.choices:
            picked.add(override)
            words += [word for word in picked.hydra if word.startswith("recipe=")]
        else:
            words.append(override.hydra)
    quiet = {
        "hydra/job_logging": "disabled",
        "hydra/hydra_logging": "disabled",
        "hydra.output_subdir": "null",
        "hydra.job.chdir": "false",
        "hydra.sweep.dir": f"'{folder}'",
        "hydra.sweep.subdir": ".",
    }
    given = {override.key for override in overrides}
    words += [f"{key}={value}" for key, value in quiet.items() if key not in given]
    tell_hydra(picked)
    return picked, words


def _task(command: str, flags: list[str], recipe: str, folder: Path, named: bool) -> Callable[[Any], float]:
    """The function that Hydra calls once a job; a launcher may do so in another process."""

    def task(config: Any) -> float:
        from hydra.core.hydra_config import HydraConfig

        hydra = HydraConfig.get()
        overrides = [word.replace(f"recipe={USER_RECIPE}", f"recipe={recipe}") for word in hydra.overrides.task]
        number = int(hydra.job.num)
        if named:
            overrides.append(f"run.name={config.run.name}-{number}")
        words = [sys.executable, "-m", "llmkit", *SPELT.get(command, (command,)), *flags, *overrides]
        code = STOPPED if _stopped.is_set() else _run_child(words)
        score = _score(Path(config.run.root).expanduser() / f"{config.run.name}-{number}") if named else None
        job = Job(number, overrides, code, score if code == 0 else None)
        (folder / f"job-{number}.json").write_text(json.dumps(asdict(job)) + "\n", encoding="utf-8")
        return math.nan if job.score is None else job.score

    return task


def _run_child(words: list[str]) -> int:
    """Run one job to its end and return its exit code. A stop signal is passed on, and no further job starts."""
    child = subprocess.Popen(words)

    def forward(number: int, frame: Any) -> None:
        _stopped.set()
        child.send_signal(number)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.wait()  # it got the signal too, and saves its checkpoint
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _score(run: Path) -> float | None:
    try:
        metrics: Mapping[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))["metrics"]
    except (OSError, ValueError, KeyError):
        return None
    value = metrics.get(SCORE)
    return None if value is None else float(value)


def _hydra_main(task: Callable[[Any], float], command: str, words: list[str]) -> None:
    import hydra
    from hydra.errors import HydraException

    argv, sys.argv = sys.argv, ["llmkit", "--multirun", *words]
    try:
        with _old_argparse():
            hydra.main(config_path=str(recipes_dir()), config_name=command, **version_base())(task)()
    except SystemExit as error:
        if error.code:
            raise ConfigError("Hydra could not run the sweep; its message stands above") from None
    except HydraException as error:  # what it raises instead where a debugger or a coverage tool is at work
        raise ConfigError(f"Hydra could not run the sweep: {error}") from None
    finally:
        sys.argv = argv


@contextmanager
def _old_argparse() -> Iterator[None]:
    """Python 3.14 tries every help text of a parser when it is added, and one of Hydra 1.3's cannot be formatted."""
    check_help = getattr(argparse.ArgumentParser, "_check_help", None)
    if check_help is None or not version_base():
        yield
        return
    argparse.ArgumentParser._check_help = lambda self, action: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        argparse.ArgumentParser._check_help = check_help  # type: ignore[attr-defined]


def _summary(folder: Path) -> int:
    """Print a line a job, best first; the exit code of the first that failed."""
    jobs = [Job(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("job-*.json")]
    jobs.sort(key=lambda job: (job.exit_code != 0, math.inf if job.score is None else job.score, job.number))
    for job in jobs:
        result = f"exit code {job.exit_code}" if job.exit_code else f"{SCORE} {job.score}" if job.score else "done"
        print(f"job {job.number}: {result}  {' '.join(job.overrides)}")
    failed = sorted((job for job in jobs if job.exit_code), key=lambda job: job.number)
    if not failed:
        return 0
    if all(job.exit_code == STOPPED for job in failed):
        raise Stopped("the sweep was stopped", fix="run the same command to go on")
    numbers = ", ".join(str(job.number) for job in failed)
    error = LLMKitError(f"{len(failed)} of {len(jobs)} jobs failed: {numbers}", where=str(folder))
    code = failed[0].exit_code
    error.exit_code = code if code > 0 else 128 - code
    raise error
