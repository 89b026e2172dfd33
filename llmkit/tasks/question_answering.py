"""Questions about a text: a span of it, found by an encoder, or an answer that a decoder or encoder-decoder writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import BadExample
from llmkit.interfaces import Row, Tokenizer
from llmkit.settings import Range
from llmkit.task_interface import Prediction, Question
from llmkit.tasks.encoding import EMPTY_TARGET, TOO_LONG, text_of
from llmkit.tasks.spans import Window, best_span, find_answer, make_windows
from llmkit.tasks.text_task import TextTask

NOT_IN_CONTEXT = "answer not in context"


@dataclass(frozen=True)
class QuestionAnswering(TextTask):
    """SQuAD's task (Rajpurkar et al. 2016, 2018), from its JSON articles or from rows of one question each.

    An encoder points at the first and last token of the answer; contexts longer than a row are read in windows that
    share ``stride`` tokens. ``unanswerable``: questions may have no answer (version 2), which an encoder says when that
    scores more than the best span plus ``null_threshold``, and other models with the words ``no_answer``.
    """

    stride: Annotated[int, Range(0)]
    max_answer_len: Annotated[int | None, Range(1)]
    unanswerable: bool
    null_threshold: float
    no_answer: str

    name: ClassVar[str] = "qa"
    usual_kind: ClassVar[str] = "encoder"  # of the small model that is trained where none is given
    placeholders: ClassVar[tuple[str, ...]] = ("question", "context")
    needed: ClassVar[tuple[str, ...]] = ("question", "context")
    long_role: ClassVar[str] = "context"
    best_metric: ClassVar[str] = "f1"

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        if not self.no_answer.strip():
            found.append(("no_answer", "must be a word or more"))
        if self.null_threshold and not self.unanswerable:
            found.append(("null_threshold", "has no meaning without unanswerable=true"))
        return found

    @property
    def roles(self) -> Mapping[str, tuple[str, ...]]:
        return {
            "question": ("question", "query"),
            "context": ("context", "passage", "paragraph", "document"),
            "answers": ("answers", "answer", "answer_text", "target"),
            "answer_start": ("answer_start", "start"),
            "is_impossible": ("is_impossible", "impossible"),
            "paragraphs": ("paragraphs",),
        }

    @property
    def optional(self) -> tuple[str, ...]:
        """All: an article has ``paragraphs`` alone, a row has the others. ``read`` says what is missing."""
        return tuple(self.roles)

    def read(self, fields: Mapping[str, Any], *, answered: bool) -> Sequence[Mapping[str, Any]]:
        """``question``, ``context`` and ``answers``, a list of ``{text, start}``; of an article all its questions.

        A question of an article that cannot be used is a ``BadExample`` in its place.
        """
        if fields.get("paragraphs") is None:
            return [self._example(fields, answered)]
        found = [self._example_or_fault(asked, answered) for asked in _questions_of(fields["paragraphs"])]
        if not found:
            raise BadExample("no question in the article")
        return cast("list[Mapping[str, Any]]", found)

    def _example_or_fault(self, fields: Mapping[str, Any], answered: bool) -> Mapping[str, Any] | BadExample:
        try:
            return self._example(fields, answered)
        except BadExample as fault:
            return fault

    def _example(self, fields: Mapping[str, Any], answered: bool) -> Mapping[str, Any]:
        question = text_of(fields, "question")
        text_of(fields, "context")
        context = fields["context"]  # with its outer white space: places are counted in it
        example = {"question": question, "context": context}
        if not answered:
            return example
        if fields.get("answers") is None and fields.get("is_impossible") is not True:
            raise BadExample("missing answers")
        given = [] if fields.get("is_impossible") is True else list(_given_answers(fields))
        if not given and not self.unanswerable:
            raise BadExample(EMPTY_TARGET)
        return example | {"answers": [_placed(context, text, start) for text, start in given]}

    def answers(self, kind: str) -> str:
        """``span`` in encoders, ``text`` in the others."""
        return "span" if kind == "encoder" else super().answers(kind)

    def values(self, question: Question) -> Mapping[str, str]:
        return {role: question.fields[role].strip() for role in self.placeholders}

    def targets(self, question: Question) -> Sequence[str]:
        """The first answer."""
        answers = question.fields["answers"]
        return [answers[0]["text"] if answers else self.no_answer.strip()]

    def still_answers(self, question: Question, prompt: str) -> bool:
        """An answer that stood in the context stands in what is left of it."""
        answers = question.fields["answers"]
        return not answers or answers[0]["start"] is None or answers[0]["text"] in prompt

    def rows(self, question: Question, tokenizer: Tokenizer, kind: str, max_len: int, *, cut: bool) -> Sequence[Row]:
        """Of an encoder a row for each window: those without the whole answer are trained to say so."""
        if kind != "encoder":
            return super().rows(question, tokenizer, kind, max_len, cut=cut)
        place = self._characters(question)
        rows = [window.row(place) for window in self.windows(question, tokenizer, max_len)]
        if place is not None and all(row.answer and row.answer.span == (0, 0) for row in rows):
            raise BadExample(TOO_LONG)  # for the ids that windows share, at least
        return rows

    def _characters(self, question: Question) -> tuple[int, int] | None:
        """Where the first answer that stands in the context does."""
        answers = question.fields["answers"]
        for answer in answers:
            if answer["start"] is not None:
                return answer["start"], answer["start"] + len(answer["text"])
        if answers:
            raise BadExample(NOT_IN_CONTEXT)
        return None

    def windows(self, question: Question, tokenizer: Tokenizer, max_len: int) -> Sequence[Window]:
        """What an encoder reads to answer: at most ``max_len`` ids each."""
        fields = question.fields
        return make_windows(fields["question"], fields["context"], tokenizer, max_len, self.stride)

    def span_prediction(
        self, question: Question, windows: Sequence[Window], logits: Sequence[NDArray[np.floating]]
    ) -> Prediction:
        """The answer from the start and end logits, ``T2``, of every window.

        ``text`` is empty for no answer; the best span is in ``samples`` then.
        """
        best = best_span(windows, logits, self.max_answer_len)
        start, stop = windows[best.window].characters(best.first, best.last)
        scores = {"span": best.score, "no_answer": best.no_answer}
        span = question.fields["context"][start:stop].strip()
        if self.unanswerable and best.no_answer - best.score > self.null_threshold:
            return Prediction("", scores, (span,))
        return Prediction(span, scores)

    def metrics(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> dict[str, float]:
        """``exact_match`` and ``f1`` by SQuAD's rules, 0 .. 100; with ``unanswerable`` those of version 2."""
        from llmkit.metrics.squad import squad_scores

        version = 2 if self.unanswerable else 1
        return squad_scores([self._said(prediction) for prediction in predictions], _gold(questions), version=version)

    def answer_score(self, question: Question, prediction: Prediction) -> float:
        """SQuAD's F1 of the answer, 0 .. 100."""
        return self.metrics([question], [prediction])["f1"]

    def details(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> dict[str, Any]:
        """For spans of which some may be no answer: the ``null_threshold`` that would have scored best here."""
        from llmkit.metrics.squad import best_thresholds

        if not self.unanswerable or not any(prediction.scores for prediction in predictions):
            return {}
        spans = [prediction.text or "".join(prediction.samples[:1]) for prediction in predictions]
        scored = [prediction.scores or {"no_answer": np.inf, "span": 0.0} for prediction in predictions]
        margins = [scores["no_answer"] - scores["span"] for scores in scored]
        return {"null_threshold": best_thresholds(spans, _gold(questions), margins)}

    def _said(self, prediction: Prediction) -> str:
        """What was answered: nothing where a model wrote the words for that."""
        text = prediction.text.strip()
        return "" if self.unanswerable and text.casefold() == self.no_answer.strip().casefold() else text


def _gold(questions: Sequence[Question]) -> list[list[str]]:
    return [[answer["text"] for answer in question.fields["answers"]] for question in questions]


def _questions_of(paragraphs: Any) -> Iterator[Mapping[str, Any]]:
    """The questions of an article, each with its context, as rows have them."""
    if not isinstance(paragraphs, list | tuple):
        raise BadExample("paragraphs is no list")
    for paragraph in paragraphs:
        asked = paragraph.get("qas") if isinstance(paragraph, Mapping) else None
        if not isinstance(asked, list | tuple) or not all(isinstance(each, Mapping) for each in asked):
            raise BadExample("a paragraph without qas")
        for each in asked:
            yield {"context": paragraph.get("context"), **each}


def _given_answers(fields: Mapping[str, Any]) -> Iterator[tuple[str, int | None]]:
    """(text, place) of every answer: a text, a list of them, SQuAD's list of objects, or an object of two lists."""
    answers = fields["answers"]
    if isinstance(answers, Mapping):
        texts, places = _as_list(answers.get("text")), _as_list(answers.get("answer_start"))
        answers = [{"text": text, "answer_start": place} for text, place in _paired(texts, places)]
    elif isinstance(answers, str):
        answers = [{"text": answers, "answer_start": fields.get("answer_start")}]
    elif not isinstance(answers, list | tuple):
        raise BadExample("answers is not text")
    for answer in answers:
        item = answer if isinstance(answer, Mapping) else {"text": answer}
        text_of(item, "text", empty=EMPTY_TARGET)
        yield item["text"], _place(item.get("answer_start"))


def _paired(texts: list[Any], places: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(texts, [*places, *[None] * (len(texts) - len(places))], strict=False)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _place(value: Any) -> int | None:
    """A place as JSON or a table holds it."""
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _placed(context: str, text: str, start: int | None) -> dict[str, Any]:
    """The answer without outer white space, and where it stands; None where it does not."""
    stripped = text.strip()
    shift = len(text) - len(text.lstrip())
    return {"text": stripped, "start": find_answer(context, stripped, None if start is None else start + shift)}
