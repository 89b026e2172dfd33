"""Sentiment, and any other task of one label for a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from llmkit.errors import BadExample, ConfigError, DataError
from llmkit.interfaces import Answer, Row, Tokenizer
from llmkit.task_interface import Prediction, Question
from llmkit.tasks.encoding import Prompt, as_document, text_of

if TYPE_CHECKING:
    from llmkit.metrics.classification import ClassReport

UNKNOWN_LABEL = "unknown label"
NO_ANSWER = "(no answer)"


@dataclass(frozen=True)
class Sentiment:
    """One of ``labels`` for a text, by a head.

    ``labels`` None: those of the training data, or of the model that is evaluated. A label in the data is one of them
    whatever its capitals, or a whole number that counts them from 0. The end of a text that is too long is cut.
    """

    labels: list[str] | None

    name: ClassVar[str] = "sentiment"
    usual_kind: ClassVar[str] = "encoder"  # of the small model that is trained where none is given
    optional: ClassVar[tuple[str, ...]] = ()
    best_metric: ClassVar[str] = "accuracy"

    def problems(self) -> list[tuple[str, str]]:
        """Labels that cannot be told apart, or are too few."""
        if self.labels is None:
            return []
        found = [("labels", "must be at least 2, or null")] if len(self.labels) < 2 else []
        if any(not label.strip() for label in self.labels):
            found.append(("labels", "one is empty"))
        return found + [("labels", f"{a!r} and {b!r} are the same") for a, b in _alike(self.labels)]

    @property
    def roles(self) -> Mapping[str, tuple[str, ...]]:
        return {
            "text": ("text", "sentence", "review", "content", "comment", "tweet", "message", "body", "input"),
            "label": ("label", "sentiment", "class", "category", "polarity", "target", "labels", "rating", "stars"),
        }

    def read(self, fields: Mapping[str, Any], *, answered: bool) -> Sequence[Mapping[str, Any]]:
        """``text`` and ``label``, the label as it is called in ``labels``."""
        example = {"text": text_of(fields, "text")}
        return [example | {"label": self._label(fields.get("label"))} if answered else example]

    def _label(self, value: Any) -> str:
        label = _as_text(value)
        if self.labels is None:
            if label.startswith("-") and label[1:].isdecimal():
                raise BadExample(UNKNOWN_LABEL)  # by convention -1 stands for "not known"
            return label
        by_name = {name.strip().casefold(): name for name in self.labels}
        if label.casefold() in by_name:
            return by_name[label.casefold()]
        if label.isdecimal() and int(label) < len(self.labels):
            return self.labels[int(label)]
        raise BadExample(UNKNOWN_LABEL)

    def with_labels(self, labels: Sequence[str]) -> Sentiment:
        """With ``labels``, in this order, unless the configuration gives them."""
        if self.labels is not None:
            return self
        fix = "give the labels: task.labels=[negative,positive]"
        if len(labels) < 2:
            found = repr(labels[0]) if labels else "none"
            raise DataError(f"a choice needs two labels, the data has {found}", where="data.path", fix=fix)
        if alike := _alike(labels):
            what = f"two labels differ in capitals only: {alike[0][0]!r} and {alike[0][1]!r}"
            raise DataError(what, where="data.path", fix=fix + ", which match whatever their capitals")
        return replace(self, labels=list(labels))

    def answers(self, kind: str) -> str:
        """``class``, in models of every kind."""
        return "class"

    def rows(self, question: Question, tokenizer: Tokenizer, kind: str, max_len: int, *, cut: bool) -> Sequence[Row]:
        """``[bos] text eos``, and the place of the label in ``labels``."""
        labels = self._known()
        if question.fields["label"] not in labels:
            raise BadExample(UNKNOWN_LABEL)
        ids, n_cut = as_document(_whole(question), tokenizer, max_len, cut=cut)
        return [Row(ids, (), answer=Answer(label=labels.index(question.fields["label"]), n_cut=n_cut))]

    def prompt(self, question: Question, tokenizer: Tokenizer, kind: str, max_len: int) -> Sequence[int]:
        """The ids of the row, which are those that the head reads."""
        ids, _ = as_document(_whole(question), tokenizer, max_len, cut=True)
        return [int(i) for i in ids]

    def metrics(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> dict[str, float]:
        """``accuracy``, ``macro_f1`` and ``mcc``, 0 .. 1 (-1 .. 1)."""
        report = self._report(questions, predictions)
        return {"accuracy": report.accuracy, "macro_f1": report.macro_f1, "mcc": report.mcc}

    def answer_score(self, question: Question, prediction: Prediction) -> float:
        """The probability of the right label; 0 where the model does not know the label."""
        return prediction.scores.get(str(question.fields["label"]), 0.0)

    def details(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> dict[str, Any]:
        """The table of classes and the confusion matrix: rows are the labels of the data, columns the predicted.

        ``labels`` names both; labels of the data that the model does not know and "no answer" are among them where
        they occur.
        """
        report = self._report(questions, predictions)
        per_class = {label or NO_ANSWER: scores._asdict() for label, scores in report.per_class.items()}
        return {"labels": list(per_class), "per_class": per_class, "confusion": report.confusion}

    def _report(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> ClassReport:
        from llmkit.metrics.classification import classification_report

        gold = [question.fields["label"] for question in questions]
        return classification_report(gold, [prediction.text for prediction in predictions], self._known())

    def _known(self) -> list[str]:
        if self.labels is None:
            raise ConfigError("the labels are not known", where="task.labels", fix="task.labels=[negative,positive]")
        return self.labels


def _whole(question: Question) -> Prompt:
    text = question.fields["text"]
    return Prompt(text, 0, len(text))


def _as_text(value: Any) -> str:
    """A label as a file may hold it: text, a whole number or a truth value."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if value is None:
        raise BadExample("missing label")
    if not isinstance(value, str):
        raise BadExample("label is not text")
    if not value.strip():
        raise BadExample("empty label")
    return value.strip()


def _alike(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of labels that are the same but for capitals."""
    folded = [label.strip().casefold() for label in labels]
    return [(labels[folded.index(name)], labels[i]) for i, name in enumerate(folded) if folded.index(name) < i]
