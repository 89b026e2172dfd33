"""A fine-tuned model with its task, as the commands that ask it need it: ``evaluate task=``, ``predict``, ``chat``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from llmkit.commands.evaluate import trained_config
from llmkit.commands.finetuning import for_task, tell
from llmkit.commands.open_model import open_model, open_tokenizer
from llmkit.config.build import build
from llmkit.config.schema import Node
from llmkit.data.loader import check_vocabulary, eval_batches
from llmkit.data.task_rows import encode_rows
from llmkit.engine.device import autocast, pick_device, set_threads
from llmkit.engine.evaluate import TrainModule, evaluate
from llmkit.engine.init import resolve_init
from llmkit.engine.prediction import Answerer
from llmkit.errors import ConfigError, DataError
from llmkit.interfaces import Objective, Tokenizer
from llmkit.models.heads import head_of
from llmkit.objectives.for_task import objective_for
from llmkit.settings import DeviceConfig, GenerationConfig, LossConfig
from llmkit.task_interface import Prediction, Question, Task

log = logging.getLogger("llmkit.models")

_ANSWERS = {"text": "by writing", "class": "with a label", "span": "with a span of its text"}
PLAIN_LOSS = LossConfig(label_smoothing=0.0, r_drop=0.0, chunk_size=None)


@dataclass(frozen=True)
class TaskModel:
    """``answer`` gives one prediction a question, ``losses`` says how likely the right answers are to the model."""

    task: Task
    model: Any
    tokenizer: Tokenizer
    answerer: Answerer
    objective: Objective
    max_len: int
    long_rows: str  # what became of rows that are too long, in the run behind the model
    device: torch.device
    precision: str

    def answer(self, questions: Sequence[Question]) -> list[Prediction]:
        with autocast(self.device, self.precision):
            return self.answerer(questions) or []

    def losses(self, questions: Sequence[Question], batch_size: int) -> dict[str, float]:
        """``loss`` in nats a token of the right answers, ``accuracy`` 0 .. 1, ``ppl``, ``n_targets``; as in validation.

        Empty where no row fits the model.
        """
        kind = self.model.config.kind
        try:
            rows = encode_rows(questions, self.task, self.tokenizer, kind, self.max_len, self.long_rows)
        except DataError as error:
            log.warning("no loss of the right answers: %s", error)
            return {}
        tell("rows of the loss", rows.report.lines())
        collate = partial(self.objective.collate, seq_len=self.max_len, ids=self.tokenizer.token_ids())
        batches = eval_batches(rows, collate, batch_size, 0, 1)
        module = TrainModule(self.model, self.objective)
        with autocast(self.device, self.precision), torch.inference_mode():
            found = evaluate(module, batches, n_bytes=rows.n_bytes, device=self.device) or {}
        return {name.removeprefix("val/"): value for name, value in found.items()}


def open_task_model(
    init: str,
    node: Node | None,
    overrides: Sequence[str],
    seq_len: int | None,
    generation: GenerationConfig,
    engine: DeviceConfig,
) -> TaskModel:
    """The model of ``init`` with the task of ``node``, or with the one it was fine-tuned for.

    What ``overrides`` does not name is as it was in the run behind ``init``: the task's settings, and ``seq_len``.
    """
    folder = resolve_init(init)
    trained = trained_config(init) or {}
    task: Task = build(task_node(trained.get("task"), node, overrides))
    device = pick_device(engine.device)
    set_threads(engine.n_threads)
    tokenizer, model = for_task(task, open_tokenizer(folder)), open_model(folder, device=device)
    check_vocabulary(tokenizer.vocab_size, model.config.vocab_rows)
    kind = model.config.kind
    answers = task.answers(kind)
    check_head(task, model, answers, init)
    if answers != "text":
        settings = [word.partition("=")[0] for word in overrides if word.startswith("generation.")]
        refuse_unused(overrides, settings, f"the model answers {_ANSWERS[answers]}, not by writing")
    if answers == "class":
        task = with_head_labels(task, model)
    usual = trained["data"]["seq_len"] if "task" in trained else None
    max_len = min(seq_len or usual or model.config.max_seq_len, model.config.max_seq_len)
    objective = objective_for(answers, kind, PLAIN_LOSS)
    size = engine.micro_batch_size
    answerer = Answerer(task, objective, model, tokenizer, max_len, generation, device, size)
    long_rows = trained["data"]["long_rows"] if "task" in trained else "truncate"
    return TaskModel(task, model, tokenizer, answerer, objective, max_len, long_rows, device, engine.precision)


def task_node(trained: Node | None, node: Node | None, overrides: Sequence[str]) -> Node:
    """The task of a run; of the same task that was asked for, the settings that nobody gave are the run's."""
    if node is None and trained is None:
        raise ConfigError("nothing says which task the model is for", where="task", fix="task=sentiment, or another")
    if node is None or trained is None or trained["_target_"] != node["_target_"]:
        return trained if node is None else node  # type: ignore[return-value]
    given = {word.partition("=")[0] for word in overrides}
    kept = {name: trained[name] for name in node if name in trained and f"task.{name}" not in given}
    for name in (name for name, value in kept.items() if value != node[name]):
        log.info("task.%s is the run's: %s", name, kept[name])
    return {**node, **kept}


def generation_as_trained(
    init: str, node: Node | None, generation: GenerationConfig, overrides: Sequence[str]
) -> GenerationConfig:
    """``generation`` with what nobody gave as it was in the run behind ``init``, so that scores are those of the run.

    As it is where the model is no fine-tuning run's, or was fine-tuned for another task.
    """
    trained = trained_config(init) or {}
    if "task" not in trained or (node is not None and node["_target_"] != trained["task"]["_target_"]):
        return generation
    given = {word.partition("=")[0] for word in overrides}
    kept = {name: value for name, value in trained["generation"].items() if f"generation.{name}" not in given}
    for name in (name for name, value in kept.items() if value != getattr(generation, name)):
        log.info("generation.%s is the run's: %s", name, kept[name])
    return replace(generation, **kept)


def refuse_unused(overrides: Sequence[str], names: Sequence[str], why: str) -> None:
    """Raise ConfigError for a value on the command line that would change nothing."""
    for name in (word.partition("=")[0] for word in overrides):
        if name in names:
            raise ConfigError(f"has no effect: {why}", where=name, fix="leave it out")


def check_head(task: Task, model: Any, answers: str, init: str) -> None:
    """Raises ConfigError for a model that does not answer in the way of the task."""
    head = head_of(model)
    have = "text" if head is None else head.config.kind
    if have == answers:
        return
    what = f"the model answers {_ANSWERS[have]}, and {task.name} is answered {_ANSWERS[answers]}"
    raise ConfigError(what, where="init", fix=f"llmkit finetune task={task.name} init={init}, then use that run")


def with_head_labels(task: Task, model: Any) -> Task:
    """The task with the labels of the model's head; a head without names for them takes the task's."""
    head = model.task_head
    task = task.with_labels(list(head.config.labels))
    labels = tuple(task.labels)  # type: ignore[attr-defined]
    if sorted(labels) == sorted(head.config.labels):
        return task
    wanted = replace(head.config, labels=labels)
    if not head.config.answers_as(wanted):
        what = f"the model answers with {', '.join(head.config.labels)}"
        raise ConfigError(what, where="task.labels", fix="leave task.labels out, or give these")
    head.take(wanted)
    return task
