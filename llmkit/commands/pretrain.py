"""``llmkit pretrain``: from raw text to a resumable checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.commands.launch import launch
from llmkit.commands.plan import show_plan
from llmkit.config.schema import PretrainConfig

if TYPE_CHECKING:
    from llmkit.engine.recorder import Recorder
    from llmkit.engine.trainer import Trainer


def run(cfg: PretrainConfig, args: argparse.Namespace) -> int:
    """Train ``cfg.run.name`` to its end, or go on where it stopped; 0 when done."""
    if args.dry_run:
        return show_plan(cfg, args)

    def make(folder: Path, recorder: Recorder, is_main: bool, stop_requested: Callable[[], bool]) -> Trainer:
        from llmkit.commands.training import make_trainer

        return make_trainer(cfg, folder, recorder, is_main, stop_requested)

    return launch(cfg, args, make)
