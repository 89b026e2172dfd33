"""May this configuration go on with the run that is already in its folder?

Everything that would change the numbers of the steps still to come must be as it was. What may change: how often things
are logged, evaluated, saved and kept, where the run is tracked, how the work is laid out on the machine (the engine
checks that the global batch stays), and the length of the run, as long as the learning rates so far stay the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmkit.config.compose import Composed, leaves
from llmkit.config.yaml_file import read_yaml
from llmkit.errors import ConfigError, Problem
from llmkit.redact import redact

SAFE = (
    "run.name",
    "run.root",
    "run.resume",
    "engine.max_hours",
    "engine.micro_batch_size",
    "engine.grad_accum_steps",
    "engine.device",
    "engine.n_threads",
    "engine.compile",
    "engine.fp32_matmul",
    "engine.attention",
    "engine.memory",
    "engine.log_every",
    "engine.eval_every",
    "engine.eval_batch_size",
    "engine.save_every",
    "engine.keep_last",
    "engine.keep_best",
    "engine.patience",
    "engine.on_nonfinite",
    "engine.max_skipped_steps",
    "engine.timeout_minutes",
    "data.old_val_path",
    "data.n_workers",
    "data.cache_dir",
    "data.max_answers",
    "generation",
    "objective.chunk_size",
    "loss.chunk_size",
    "callbacks",
    "tracking",
)
LENGTH = ("engine.max_steps", "engine.max_tokens", "engine.max_epochs")
_STEP = re.compile(r"step_(\d+)")
_MANY_STEPS = 10**9
_CURVE_POINTS = 1000
NEW_RUN = "choose another run.name"


def resume_problems(composed: Composed, values: Mapping[str, Any], schedule: Any) -> Iterator[Problem]:
    """What stands against ``run.resume`` in the run's folder.

    ``values`` are the checked values by path, ``schedule`` is the checked schedule object.
    """
    resume, folder = values["run.resume"], Path(values["run.root"]).expanduser() / values["run.name"]
    reached = newest_step(folder)
    if reached is None:
        if resume == "must":
            yield _problem(
                composed, "run.resume", f"there is no checkpoint to resume in {folder}", "use run.resume=auto"
            )
        return
    if resume == "never":
        yield _problem(composed, "run.resume", f"{folder} already holds a run at step {reached}", NEW_RUN)
        return
    try:
        before = dict(leaves(read_yaml(folder / "config.yaml").tree))
    except ConfigError as error:
        yield _problem(composed, "run.name", f"the run's own configuration is unreadable: {error.what}", NEW_RUN)
        return
    now = {path: values.get(path, value) for path, value in leaves(composed.plain)}
    yield from _changes(composed, before, redact(now), reached, schedule)  # the file is redacted as well


def newest_step(folder: Path) -> int | None:
    """The highest step with a checkpoint folder. Whether it is whole is for the engine to find out."""
    found = [_STEP.fullmatch(path.name) for path in (folder / "checkpoints").glob("step_*")]
    return max((int(match[1]) for match in found if match), default=None)


def _changes(
    composed: Composed, before: dict[str, Any], now: dict[str, Any], reached: int, schedule: Any
) -> Iterator[Problem]:
    changed = [path for path in before if path in now and not _same(before[path], now[path])]
    if now.get("init") is not None:  # the model and tokenizer sections are not used then
        changed = [path for path in changed if path.partition(".")[0] not in ("model", "tokenizer")]
    for path in changed:
        if path in LENGTH or any(path == safe or path.startswith(f"{safe}.") for safe in SAFE):
            continue
        what = f"the run in this folder was started with {before[path]!r:.80}, not {now[path]!r:.80}"
        yield _problem(composed, path, what, f"put the old value back, or {NEW_RUN}")
    lengths = [path for path in changed if path in LENGTH]
    if lengths and not _same_rates(schedule, reached, before, now, lengths):
        path = lengths[0]
        what = f"was {before[path]}: with another length the learning rates up to step {reached} would have been others"
        fix = f"schedule=constant, wsd or inverse_sqrt runs can grow; or start from these weights: init and {NEW_RUN}"
        yield _problem(composed, path, what, fix)


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        return len(old) == len(new) and all(map(_same, old, new))
    return bool(old == new)


def _same_rates(schedule: Any, reached: int, before: dict[str, Any], now: dict[str, Any], lengths: list[str]) -> bool:
    """Whether every step taken so far had the rate that the new length gives it.

    The number of steps is known when ``max_steps`` alone sets it. Otherwise the schedule must not depend on it at all.
    """
    if lengths == ["engine.max_steps"] and before["engine.max_steps"] and now["engine.max_steps"]:
        old, new = int(before["engine.max_steps"]), int(now["engine.max_steps"])
    else:
        old, new = reached, _MANY_STEPS
    points = range(1, reached + 1, max(reached // _CURVE_POINTS, 1))
    return all(schedule.factor(step, old) == schedule.factor(step, new) for step in (*points, reached) if step)


def _problem(composed: Composed, path: str, what: str, fix: str) -> Problem:
    return Problem(path, what, composed.origin(path), fix)
