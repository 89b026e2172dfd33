"""A fine-tuned model with its task, as the commands that ask it need it: ``evaluate task=``, ``predict``, ``chat``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from llmkit.commands.open_model import open_model
from llmkit.config.build import build
from llmkit.config.schema import Node
from llmkit.data.loader import check_vocabulary
from llmkit.engine.device import autocast, pick_device, set_threads
from llmkit.engine.init import resolve_init
from llmkit.engine.prediction import Answerer
from llmkit.errors import ConfigError
from llmkit.interfaces import Tokenizer
from llmkit.models.head_config import HeadConfig
from llmkit.objectives.for_task import objective_for
from llmkit.settings import DeviceConfig, GenerationConfig, LossConfig
from llmkit.task_interface import Prediction, Question, Task
from llmkit.tokenizers.load import load_tokenizer

PLAIN_LOSS = LossConfig(label_smoothing=0.0, r_drop=0.0, chunk_size=None)


@dataclass(frozen=True)
class TaskModel:
    """``answer`` gives one prediction a question."""

    task: Task
    model: Any
    tokenizer: Tokenizer
    answerer: Answerer
    device: torch.device
    precision: str

    def answer(self, questions: Sequence[Question]) -> list[Prediction]:
        with autocast(self.device, self.precision):
            return self.answerer(questions) or []


def open_task_model(
    init: str, node: Node | None, seq_len: int | None, generation: GenerationConfig, engine: DeviceConfig
) -> TaskModel:
    """The model of ``init`` with the task of ``node``, or with the one it was fine-tuned for."""
    folder = resolve_init(init)
    task: Task = build(node if node is not None else trained_task(init))
    device = pick_device(engine.device)
    set_threads(engine.n_threads)
    tokenizer, model = load_tokenizer(folder), open_model(folder, device=device)
    check_vocabulary(tokenizer.vocab_size, model.config.vocab_rows)
    kind = model.config.kind
    answers = task.answers(kind)
    head: HeadConfig | None = getattr(getattr(model, "task_head", None), "config", None)
    if answers != "text" and (head is None or head.kind != answers):
        what = f"the model has no head for {task.name}"
        raise ConfigError(what, where="init", fix=f"llmkit finetune task={task.name} init={init}, then use that run")
    if answers == "class" and head is not None:
        task = task.with_labels(list(head.labels))
    max_len = min(seq_len or model.config.max_seq_len, model.config.max_seq_len)
    objective = objective_for(answers, kind, PLAIN_LOSS)
    size = engine.micro_batch_size
    answerer = Answerer(task, objective, model, tokenizer, max_len, generation, device, size)
    return TaskModel(task, model, tokenizer, answerer, device, engine.precision)


def trained_task(init: str) -> Node:
    """The task of the run behind ``init``."""
    folder = Path(init).expanduser()
    for place in (folder, *folder.parents[:2]):  # a run, or a checkpoint inside one
        if (place / "config.yaml").is_file():
            config = yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8"))
            if "task" in config:
                node: Node = config["task"]
                return node
    raise ConfigError("nothing says which task the model is for", where="task", fix="task=sentiment, or another task")
