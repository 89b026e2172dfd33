"""What the parts of llmkit know of a task for fine-tuning, beside ``interfaces``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from llmkit.interfaces import Row, Tokenizer


class Question(NamedTuple):
    """One example of a task as the task understood it: texts, not ids."""

    fields: Mapping[str, Any]  # by role: text, label, question, context, answers, messages ...
    where: str  # file:line, for messages
    number: int  # in the order of the file; predictions are given back by it


class Prediction(NamedTuple):
    """What a model says to a question. ``text`` is the label, the span or the generated text."""

    text: str
    scores: Mapping[str, float] = {}  # probability of each label; score of the span and of no answer
    samples: tuple[str, ...] = ()  # further generated texts, where several were asked for


class Task(Protocol):
    """A job for fine-tuning: which columns it reads, how they become ids, and how answers are scored.

    A frozen dataclass in ``llmkit/tasks``. ``kind`` is the model's: ``decoder``, ``encoder`` or ``encoder_decoder``.
    ``answers(kind)`` says how the model answers: ``class`` and ``span`` by a head, ``text`` by generation.
    """

    @property
    def name(self) -> str: ...
    @property
    def usual_kind(self) -> str:
        """The kind of model it is usually done with: what is trained where none is given."""

    @property
    def roles(self) -> Mapping[str, tuple[str, ...]]:
        """Roles and the usual spellings of their columns, most usual first."""

    @property
    def optional(self) -> tuple[str, ...]:
        """Roles that a file may lack (answers of rows to predict are not among them)."""

    def read(self, fields: Mapping[str, Any], *, answered: bool) -> Sequence[Mapping[str, Any]]:
        """The examples of one record, by role (a SQuAD article holds many). ``answered=False``: only the question.

        Raises ``BadExample`` with a short reason: the same words for the same fault, since faults are counted by them.
        """

    def with_labels(self, labels: Sequence[str]) -> Task:
        """The task with the labels found in the data, where it has none; itself in tasks without labels."""

    def answers(self, kind: str) -> str:
        """``class``, ``span`` or ``text``. Raises ConfigError with the kinds that will do, when ``kind`` will not."""

    def rows(self, question: Question, tokenizer: Tokenizer, kind: str, max_len: int, *, cut: bool) -> Sequence[Row]:
        """Training rows (several for overlapping windows), of at most ``max_len`` ids on each side.

        ``cut`` leaves out a part of the question, never of the answer, to make it fit (``Answer.n_cut``). Raises
        ``BadExample``: "too long" where it does not fit.
        """

    def prompt(self, question: Question, tokenizer: Tokenizer, kind: str, max_len: int) -> Sequence[int]:
        """Ids that generation goes on from; for an encoder-decoder what its encoder reads."""

    def metrics(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> dict[str, float]:
        """The field's metrics, names as in ``docs/finetune.md``, in the scale of their reference implementation."""

    def answer_score(self, question: Question, prediction: Prediction) -> float:
        """How good one answer is, larger is better: what the worst answers are found by. Runs no code."""

    def details(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> dict[str, Any]:
        """What belongs beside the metrics and is no number of its own, as plain values."""

    @property
    def best_metric(self) -> str:
        """The name, among ``metrics`` or ``loss``, that picks the best checkpoint."""


class WrittenTask(Task, Protocol):
    """A task whose answers may be written."""

    @property
    def n_samples(self) -> int:
        """How many texts are wanted for each question."""

    def end_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """What ends a written answer beside the tokenizer's end token: the marks of a chat template."""


class SpanTask(Task, Protocol):
    """A task whose answers may be spans of a context."""

    def windows(self, question: Question, tokenizer: Tokenizer, max_len: int) -> Sequence[Any]:
        """What an encoder reads, at most ``max_len`` ids each; ``row(None)`` of a window is its row."""

    def span_prediction(self, question: Question, windows: Sequence[Any], logits: Sequence[Any]) -> Prediction:
        """The answer from the start and end logits, ``T2``, of every window."""
