"""``llmkit predict``: a fine-tuned model's answers to texts or to the rows of a file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmkit.commands.finetuning import tell
from llmkit.commands.task_model import generation_as_trained, open_task_model, refuse_unused
from llmkit.config.schema import PredictConfig
from llmkit.data.task_questions import load_questions
from llmkit.engine.files import write_atomic
from llmkit.errors import BadExample, CheckpointError, ConfigError, LLMKitError
from llmkit.settings import TaskDataConfig
from llmkit.task_interface import Prediction, Question, Task

UNUSED = (
    "data.path",
    "data.val_path",
    "data.val_target_path",
    "data.val_fraction",
    "data.max_answers",
    "data.long_rows",
)


def run(cfg: PredictConfig, args: argparse.Namespace) -> int:
    """Print an answer a line: plain for ``--text``, as JSON with the row for ``--file``, into ``--out`` when given."""
    if bool(args.text) == bool(args.file):
        what = "nothing to answer" if not args.text else "--text and --file exclude each other"
        raise ConfigError(what, where="--text", fix="llmkit predict init=... --text '...', or --file rows.jsonl")
    refuse_unused(args.overrides, UNUSED, "the rows are those of --text or --file")
    out = None if args.out is None else writable(args.out)
    generation = generation_as_trained(cfg.init, cfg.task, cfg.generation, args.overrides)
    model = open_task_model(cfg.init, cfg.task, args.overrides, cfg.data.seq_len, generation, cfg.engine)
    if args.file:
        questions = rows_of(args.file, model.task, cfg.data)
    else:
        questions = [typed(model.task, text, number) for number, text in enumerate(args.text)]
    predictions = model.answer(questions)
    lines = list(as_lines(questions, predictions) if args.file or out else plain_lines(predictions))
    if out is None:
        print("\n".join(lines))
        return 0
    try:
        write_atomic(out, ("\n".join(lines) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"the answers could not be written: {error.strerror}", where=args.out) from error
    print(f"{len(lines)} answers in {args.out}", file=sys.stderr)
    return 0


def writable(name: str) -> Path:
    """The file for the answers, refused before the work where it cannot be written."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise ConfigError(f"{name} is a folder", where="--out", fix=f"--out {path / 'answers.jsonl'}")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent}", where="--out", fix=f"mkdir -p {path.parent}")
    return path


def rows_of(name: str, task: Task, data: TaskDataConfig) -> list[Question]:
    """The questions in a file, with the counts of what was left out."""
    try:
        found = load_questions(task, replace(data, path=name), split=False, answered=False)
    except LLMKitError as error:
        error.where = "--file" if error.where == "data.path" else error.where
        raise
    lines = found.report.files[0].bad.lines()
    tell(name, [f"warning: left out: {line}" for line in lines])
    return found.train


def typed(task: Task, text: str, number: int) -> Question:
    """A question from the command line: JSON with the task's roles, or the text of the one that it asks about."""
    fields: Any = {"messages": [{"role": "user", "content": text}]} if task.name == "chat" else {asked(task)[0]: text}
    if text.lstrip().startswith("{"):
        try:
            fields = json.loads(text)
        except ValueError as error:
            what = f"it begins as JSON does, but is none: {error}"
            raise ConfigError(what, where=f"--text {number + 1}", fix=f"--text '{shape_of(task)}'") from error
    try:
        (found,) = task.read(fields, answered=False)
        if isinstance(found, BadExample):
            raise found
    except ValueError as error:  # BadExample, or a record of many questions
        reason = str(error) if isinstance(error, BadExample) else "it holds several questions"
        what = f"this cannot be answered: {reason}"
        raise ConfigError(what, where=f"--text {number + 1}", fix=f"--text '{shape_of(task)}'") from error
    return Question(found, f"--text {number + 1}", number)


def asked(task: Task) -> list[str]:
    """The roles that a question must have."""
    needed = [role for role in getattr(task, "needed", ()) if role in task.roles]
    return needed or list(task.roles)[:1]


def shape_of(task: Task) -> str:
    """A question as JSON."""
    if task.name == "chat":
        return json.dumps({"messages": [{"role": "user", "content": "..."}]})
    return json.dumps({role: "..." for role in asked(task)})


def plain_lines(predictions: Sequence[Prediction]) -> Iterator[str]:
    for prediction in predictions:
        scores = "  ".join(f"{name} {score:.3f}" for name, score in prediction.scores.items())
        yield f"{prediction.text}  ({scores})" if scores else prediction.text


def as_lines(questions: Sequence[Question], predictions: Sequence[Prediction]) -> Iterator[str]:
    for question, prediction in zip(questions, predictions, strict=True):
        row: dict[str, Any] = {"where": question.where, **question.fields, "prediction": prediction.text}
        row |= {"scores": prediction.scores} if prediction.scores else {}
        row |= {"samples": prediction.samples} if prediction.samples else {}
        yield json.dumps(row, ensure_ascii=False)
