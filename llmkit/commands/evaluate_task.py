"""``llmkit evaluate task=...``: a task's metrics on rows with answers, and what went wrong."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmkit.commands.evaluate import trained_config
from llmkit.commands.finetuning import tell
from llmkit.commands.task_model import TaskModel, generation_as_trained, open_task_model, refuse_unused
from llmkit.config.schema import EvaluateTaskConfig
from llmkit.data.task_questions import load_questions
from llmkit.errors import ConfigError, DataError
from llmkit.models.heads import head_of
from llmkit.settings import TaskDataConfig
from llmkit.task_interface import Prediction, Question, Task

UNUSED = ("data.val_path", "data.val_target_path", "data.val_fraction", "data.max_answers", "data.long_rows")

log = logging.getLogger("llmkit.evaluate")


def run(cfg: EvaluateTaskConfig, args: argparse.Namespace) -> int:
    """Answer every question once; print metrics, details and the worst answers as JSON.

    Where answers are written, the likelihood of the right ones is among the metrics, as in validation.
    """
    refuse_unused(args.overrides, UNUSED, "every row is answered, each once")
    generation = generation_as_trained(cfg.init, cfg.task, cfg.generation, args.overrides)
    model = open_task_model(cfg.init, cfg.task, args.overrides, cfg.data.seq_len, generation, cfg.engine)
    questions = questions_of(cfg, model.task)
    predictions = model.answer(questions)
    metrics = model.task.metrics(questions, predictions)
    if head_of(model.model) is None:
        metrics = model.losses(questions, cfg.engine.micro_batch_size) | metrics
    shown: dict[str, Any] = {"init": cfg.init, "task": model.task.name, "n_questions": len(questions), **metrics}
    shown["details"] = model.task.details(questions, predictions)
    for line in confusion_lines(shown["details"]):
        log.info("%s", line)
    shown["worst"] = worst(model, questions, predictions, cfg.n_examples)
    print(json.dumps(shown, indent=2, ensure_ascii=False))
    return 0


def questions_of(cfg: EvaluateTaskConfig, task: Task) -> list[Question]:
    """All of ``data.path``; without it the validation questions of the run."""
    if cfg.data.path is None:
        found = load_questions(task, data_of_run(cfg))
        questions = found.val[: cfg.data.max_rows]
    else:
        found = load_questions(task, replace(cfg.data, val_path=None, val_target_path=None), split=False)
        questions = found.train
    tell("data", found.report.lines())
    if not questions:
        what = "the run held no question out" if cfg.data.path is None else "there is no question to answer"
        raise DataError(what, where="data.path", fix="data.path=test.jsonl")
    return questions


def data_of_run(cfg: EvaluateTaskConfig) -> TaskDataConfig:
    """The rows that the model was fine-tuned and validated on."""
    trained, fix = trained_config(cfg.init) or {}, "data.path=test.jsonl"
    if "task" not in trained:
        what = "there are no rows: this model is not a fine-tuning run's, so it has no validation rows of its own"
        raise ConfigError(what, where="data.path", fix=fix)
    if trained["task"]["_target_"] != cfg.task["_target_"]:
        raise ConfigError("the run was fine-tuned for another task, whose rows these are", where="data.path", fix=fix)
    return TaskDataConfig(**trained["data"])


def confusion_lines(details: Mapping[str, Any]) -> list[str]:
    """The confusion matrix as a table: a row a label of the data, a column a predicted one."""
    if "confusion" not in details:
        return []
    labels = [str(label) for label in details["labels"]]
    rows = [["", *labels]] + [[label, *map(str, row)] for label, row in zip(labels, details["confusion"], strict=True)]
    width = max(len(cell) for row in rows for cell in row)
    lines = ["  ".join(cell.rjust(width) for cell in row) for row in rows]
    return ["rows: the right label; columns: the predicted one", *lines]


def worst(
    model: TaskModel, questions: Sequence[Question], predictions: Sequence[Prediction], n: int
) -> list[dict[str, Any]]:
    """The answers that score least."""
    if n == 0:
        return []
    scores = [model.task.answer_score(*pair) for pair in zip(questions, predictions, strict=True)]
    order = sorted(range(len(questions)), key=lambda i: (scores[i], i))[:n]
    return [
        {"where": questions[i].where, "score": scores[i], **questions[i].fields, "predicted": predictions[i].text}
        for i in order
    ]
