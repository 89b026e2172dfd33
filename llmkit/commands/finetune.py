"""``llmkit finetune``: a model that is there, trained for a task and scored on it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.commands.launch import launch
from llmkit.config.schema import FinetuneConfig

if TYPE_CHECKING:
    from llmkit.engine.recorder import Recorder
    from llmkit.engine.trainer import Trainer


def run(cfg: FinetuneConfig, args: argparse.Namespace) -> int:
    """Train ``cfg.run.name`` to its end, or go on where it stopped; 0 when done."""

    def make(folder: Path, recorder: Recorder, is_main: bool, stop_requested: Callable[[], bool]) -> Trainer:
        from llmkit.commands.finetuning import make_trainer

        return make_trainer(cfg, folder, recorder, stop_requested)

    return launch(cfg, args, make)
