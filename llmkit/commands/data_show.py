"""``llmkit data show``: the rows of a task token by token, and the counts of all of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from llmkit.commands.finetuning import Beginning, find_beginning, opened, row_length
from llmkit.config.build import build
from llmkit.config.schema import ShowConfig
from llmkit.data.task_questions import load_questions
from llmkit.data.task_rows import TaskDataset, encode_rows
from llmkit.interfaces import Row, Tokenizer
from llmkit.task_interface import Task
from llmkit.tracking.logs import visible


def run(cfg: ShowConfig, args: argparse.Namespace) -> int:
    """Print the first ``n_rows`` rows, each token with what is done with it, then the report."""
    task: Task = build(cfg.task)
    init = opened(cfg.init, task)
    lenient = replace(cfg.data, max_bad_fraction=1.0, val_path=None, val_target_path=None)  # bad rows are what is shown
    questions = load_questions(task, lenient, split=False)
    task = task.with_labels(questions.labels())
    beginning: Beginning = find_beginning(init, [], cfg.model, cfg.tokenizer, task, questions)
    config, tokenizer = beginning.config, beginning.tokenizer
    max_len = row_length(cfg.data, config)
    limits = {"max_bad_fraction": 1.0}
    rows = encode_rows(questions.train, task, tokenizer, config.kind, max_len, cfg.data.long_rows, **limits)
    for number in range(min(cfg.n_rows, rows.n_sequences)):
        print("\n".join(row_lines(rows, number, tokenizer)), end="\n\n")
    print("\n".join([*questions.report.lines(), *rows.report.lines()]))
    return 0


def row_lines(rows: TaskDataset, number: int, tokenizer: Tokenizer) -> Iterator[str]:
    """A heading, then a line a token: its place, id and text, and whether it is predicted."""
    row = rows.row(number, (), None)
    question = rows.questions[rows.question_of(number)]
    assert row.answer is not None, "a task's row says what its answer is"
    yield f"row {number + 1} ({question.where}), {len(row.ids)} tokens" + (
        f", {row.answer.n_cut} cut" if row.answer.n_cut else ""
    )
    if row.answer.label is not None:
        yield f"  label {row.answer.label}: {json.dumps(question.fields.get('label'), ensure_ascii=False)}"
    yield from token_lines(row.ids, marks(row), tokenizer)
    if row.answer.target is not None:
        yield f"  target, {len(row.answer.target)} tokens"
        yield from token_lines(row.answer.target, ["predicted"] * len(row.answer.target), tokenizer)


def marks(row: Row) -> list[str]:
    """What is done with every id of the row."""
    answer = row.answer
    found = [""] * len(row.ids)
    if answer is not None and answer.trained is not None:
        found = ["predicted" if trained else "" for trained in answer.trained]
    if answer is not None and answer.span is not None:
        first, last = answer.span
        found = ["answer" if first <= i <= last else "" for i in range(len(row.ids))]
    return found


def token_lines(ids: Sequence[int] | np.ndarray, marked: Sequence[str], tokenizer: Tokenizer) -> Iterator[str]:
    special = tokenizer.token_ids().special
    for place, (token, mark) in enumerate(zip(ids, marked, strict=True)):
        text = "(special)" if special[int(token)] else repr(visible(tokenizer.decode([int(token)])))
        yield f"  {place:5} {int(token):7} {text:24} {mark}".rstrip()
