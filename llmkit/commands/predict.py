"""``llmkit predict``: a fine-tuned model's answers to texts or to the rows of a file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmkit.commands.task_model import open_task_model
from llmkit.config.schema import PredictConfig
from llmkit.data.task_questions import load_questions
from llmkit.engine.files import write_atomic
from llmkit.errors import BadExample, ConfigError
from llmkit.task_interface import Prediction, Question, Task


def run(cfg: PredictConfig, args: argparse.Namespace) -> int:
    """Print an answer a line: plain for ``--text``, as JSON with the row for ``--file``, into ``--out`` when given."""
    if bool(args.text) == bool(args.file):
        what = "nothing to answer" if not args.text else "--text and --file exclude each other"
        raise ConfigError(what, where="--text", fix="llmkit predict init=... --text '...', or --file rows.jsonl")
    model = open_task_model(cfg.init, cfg.task, cfg.data.seq_len, cfg.generation, cfg.engine)
    if args.file:
        data = replace(cfg.data, path=args.file)
        questions = load_questions(model.task, data, split=False, answered=False).train
    else:
        questions = [typed(model.task, text, number) for number, text in enumerate(args.text)]
    predictions = model.answer(questions)
    lines = list(as_lines(questions, predictions) if args.file or args.out else plain_lines(predictions))
    if args.out:
        write_atomic(Path(args.out).expanduser(), ("\n".join(lines) + "\n").encode())
        print(f"{len(lines)} answers in {args.out}", file=sys.stderr)
    else:
        print("\n".join(lines))
    return 0


def typed(task: Task, text: str, number: int) -> Question:
    """A question from the command line: JSON with the task's roles, or the text of the one that it asks about."""
    asked = [role for role in task.roles if role not in ("label", "answers", "target", "summaries", "code")]
    fields: Mapping[str, Any] = {asked[0]: text}
    if text.lstrip().startswith("{"):
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"no valid JSON: {error}", where="--text") from error
    try:
        (found,) = task.read(fields, answered=False)
    except BadExample as error:
        shape = json.dumps({role: "..." for role in asked})
        raise ConfigError(f"this cannot be answered: {error}", where="--text", fix=f"--text '{shape}'") from error
    return Question(found, f"--text {number + 1}", number)


def plain_lines(predictions: Sequence[Prediction]) -> Iterator[str]:
    for prediction in predictions:
        scores = "  ".join(f"{name} {score:.3f}" for name, score in prediction.scores.items())
        yield f"{prediction.text}  ({scores})" if scores else prediction.text


def as_lines(questions: Sequence[Question], predictions: Sequence[Prediction]) -> Iterator[str]:
    for question, prediction in zip(questions, predictions, strict=True):
        row: dict[str, Any] = {**question.fields, "prediction": prediction.text}
        row |= {"scores": prediction.scores} if prediction.scores else {}
        row |= {"samples": prediction.samples} if prediction.samples else {}
        yield json.dumps(row, ensure_ascii=False)
