"""``llmkit pretrain``: from raw text to a resumable checkpoint."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict

from llmkit.commands.plan import show_plan
from llmkit.config.schema import PretrainConfig
from llmkit.engine.launch import is_main_process, refuse_solo_runs
from llmkit.engine.run_folder import RunFolder
from llmkit.errors import LLMKitError, Stopped

log = logging.getLogger("llmkit.training")


def run(cfg: PretrainConfig, args: argparse.Namespace) -> int:
    """Train ``cfg.run.name`` to its end, or go on where it stopped; 0 when done."""
    if args.dry_run:
        return show_plan(cfg, args)
    refuse_solo_runs(os.environ)
    is_main = is_main_process(os.environ)
    folder = RunFolder(cfg.run.root, cfg.run.name)
    with folder.lock() if is_main else nullcontext():
        if is_main:
            folder.create(asdict(cfg), args.argv)
        train(cfg, folder, is_main)
    return 0


def train(cfg: PretrainConfig, folder: RunFolder, is_main: bool) -> None:
    """The run inside its locked folder. Whatever ends it is written to ``result.json``."""
    from llmkit.commands.training import load_text, make_trainer, start_recorder
    from llmkit.engine.stop import StopSignal, leave_on_signal

    recorder = start_recorder(cfg, folder.path, is_main)
    stop, step = StopSignal(), 0
    status, exit_code, message = "finished", 0, ""
    with stop:  # around everything, so that no signal finds the folder without a result
        try:
            with leave_on_signal():
                text = load_text(cfg, progress=is_main)
                trainer = make_trainer(cfg, text, folder.path, recorder, lambda: stop.requested)
            try:
                trainer.fit()
                show_change(trainer.progress.first_losses, recorder.latest)
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


def outcome_of(error: BaseException) -> tuple[str, int]:
    """Status and exit code for ``result.json``."""
    if isinstance(error, Stopped):
        return "stopped", error.exit_code
    return "failed", error.exit_code if isinstance(error, LLMKitError) else 1
