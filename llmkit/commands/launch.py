"""Starts a training run: its folder, its lock, its log, and the result that it ends with."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.config.schema import FinetuneConfig, PretrainConfig
from llmkit.engine.launch import is_main_process, refuse_solo_runs
from llmkit.engine.run_folder import RunFolder
from llmkit.errors import LLMKitError, Stopped

if TYPE_CHECKING:
    from llmkit.engine.recorder import Recorder
    from llmkit.engine.trainer import Trainer

log = logging.getLogger("llmkit.training")

# (folder of the run, recorder, whether this is rank 0, whether a stop was asked for) -> everything up to ``fit``
MakeTrainer = Callable[[Path, "Recorder", bool, Callable[[], bool]], "Trainer"]


def launch(cfg: PretrainConfig | FinetuneConfig, args: argparse.Namespace, make_trainer: MakeTrainer) -> int:
    """Train ``cfg.run.name`` to its end, or go on where it stopped; 0 when done."""
    refuse_solo_runs(os.environ)
    is_main = is_main_process(os.environ)
    folder = RunFolder(cfg.run.root, cfg.run.name)
    with folder.lock() if is_main else nullcontext():
        if is_main:
            folder.create(asdict(cfg), args.argv)
        train(cfg, folder, is_main, make_trainer)
    return 0


def train(cfg: PretrainConfig | FinetuneConfig, folder: RunFolder, is_main: bool, make_trainer: MakeTrainer) -> None:
    """The run inside its locked folder. Whatever ends it is written to ``result.json``."""
    from llmkit.commands.assemble import start_recorder
    from llmkit.engine.stop import StopSignal, leave_on_signal

    recorder = start_recorder(cfg, folder.path, is_main)
    stop, step = StopSignal(), 0
    status, exit_code, message = "finished", 0, ""
    with stop:  # around everything, so that no signal finds the folder without a result
        try:
            with leave_on_signal():
                trainer = make_trainer(folder.path, recorder, is_main, lambda: stop.requested)
            try:
                progress = trainer.fit()
                show_change(progress.first_losses, recorder.latest)
                show_gap(recorder.latest)
                show_best(trainer, folder)
            finally:
                step = trainer.progress.step
        except BaseException as error:
            status, exit_code = outcome_of(error)
            message = str(error) or type(error).__name__
            raise
        finally:
            recorder.finish(status)
            if is_main:
                folder.write_result(status, exit_code, step, recorder.latest, message)


def show_change(before: Mapping[str, float], latest: Mapping[str, float]) -> None:
    """What a run that began with a trained model learned, and what it forgot: each loss before and after, in nats."""
    for name, loss in before.items():
        after = latest.get(f"{name}/loss", loss)
        log.info("%s/loss %.4f before, %.4f after (%+.4f)", name, loss, after, after - loss)


def show_gap(latest: Mapping[str, float]) -> None:
    """How much better the rows that were trained on are known than the others, in nats."""
    train, val = latest.get("train_part/loss"), latest.get("val/loss")
    if train is not None and val is not None:
        log.info("loss of training rows %.4f, of validation rows %.4f: a gap of %.4f", train, val, val - train)


def show_best(trainer: Trainer, folder: RunFolder) -> None:
    """Where the best checkpoint is, when it is not the last one."""
    progress, name = trainer.progress, trainer.best_metric.name
    best = folder.checkpoints / f"step_{progress.best_step}"
    if progress.best_value is not None and progress.best_step < progress.step and best.is_dir():
        log.info("%s was best after step %d (%.4f): %s", name, progress.best_step, progress.best_value, best)


def outcome_of(error: BaseException) -> tuple[str, int]:
    """Status and exit code for ``result.json``."""
    if isinstance(error, Stopped):
        return "stopped", error.exit_code
    return "failed", error.exit_code if isinstance(error, LLMKitError) else 1
