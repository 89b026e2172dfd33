"""What tasks share whose answers are written: rows and prompts of a decoder and of an encoder-decoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from llmkit.errors import BadExample, ConfigError
from llmkit.interfaces import Answer, Row, Tokenizer
from llmkit.task_interface import Prediction, Question
from llmkit.tasks.encoding import (
    EMPTY_TARGET,
    TOO_LONG,
    Prompt,
    as_document,
    begin,
    encode_target,
    fill,
    fit_alone,
    fit_answered,
    template_problems,
    to_array,
)

CUT_AWAY = "answer cut away"


@dataclass(frozen=True)
class TextTask(ABC):
    """A prompt, made of the question by a template with ``{role}`` in it, and an answer in words.

    A decoder reads ``decoder_prompt`` and goes on with the answer: ``[bos] prompt answer eos``, of which the answer
    and its end are trained. An encoder-decoder reads ``source_prompt`` and writes ``answer eos``.
    """

    decoder_prompt: str
    source_prompt: str

    name: ClassVar[str]
    placeholders: ClassVar[tuple[str, ...]]  # roles that a template may hold
    needed: ClassVar[tuple[str, ...]]  # and those that it must
    long_role: ClassVar[str]  # whose text loses its end when a row is too long

    @property
    @abstractmethod
    def roles(self) -> Mapping[str, tuple[str, ...]]:
        """See ``interfaces.Task``."""

    @property
    def n_samples(self) -> int:
        """How many texts are wanted for each question."""
        return 1

    @property
    def optional(self) -> tuple[str, ...]:
        """Roles that a file may lack."""
        return ()

    @abstractmethod
    def values(self, question: Question) -> Mapping[str, str]:
        """What the templates' roles stand for."""

    @abstractmethod
    def targets(self, question: Question) -> Sequence[str]:
        """The answers that a model is trained on, one row each."""

    def end_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """None beside the tokenizer's end token."""
        return ()

    def answer_score(self, question: Question, prediction: Prediction) -> float:
        """chrF of the answer, 0 .. 100: BLEU is nearly always 0 for a single sentence."""
        from llmkit.metrics.translation import sacre_bleu

        return sacre_bleu([prediction.text.strip()], [list(self.targets(question))])[1]

    def details(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> dict[str, Any]:
        """What belongs beside the metrics and is no number of its own, as plain values."""
        return {}

    def still_answers(self, question: Question, prompt: str) -> bool:
        """Whether a shortened prompt still holds what the answer is made of, as far as that can be told."""
        return True

    def problems(self) -> list[tuple[str, str]]:
        """Templates that cannot be filled."""
        found = template_problems("decoder_prompt", self.decoder_prompt, self.placeholders, self.needed)
        return found + template_problems("source_prompt", self.source_prompt, self.placeholders, self.needed)

    def with_labels(self, labels: Sequence[str]) -> Self:
        """Itself: there are no labels."""
        return self

    def answers(self, kind: str) -> str:
        """``text``. Raises ``ConfigError`` for an encoder, which writes none."""
        if kind == "encoder":
            what = f"{self.name} is a task of writing, and an encoder writes no text"
            raise ConfigError(what, where="task", fix="start from a decoder or an encoder-decoder")
        return "text"

    def rows(self, question: Question, tokenizer: Tokenizer, kind: str, max_len: int, *, cut: bool) -> Sequence[Row]:
        """One row for each answer to train on. See ``interfaces.Task``."""
        prompt = self.filled(question, kind)
        make = self._source_row if kind == "encoder_decoder" else self._decoder_row
        return [make(question, prompt, target, tokenizer, max_len, cut) for target in self.targets(question)]

    def prompt(self, question: Question, tokenizer: Tokenizer, kind: str, max_len: int) -> Sequence[int]:
        """At most ``max_len`` ids: those before the answer in a decoder's row, or an encoder-decoder's source.

        A longer one is shortened as training rows are with ``cut``; only then does it differ from the whole prompt.
        """
        prompt = self.filled(question, kind)
        if kind == "encoder_decoder":
            ids, _ = as_document(prompt, tokenizer, max_len, cut=True)
            return [int(i) for i in ids]
        first = begin(tokenizer)
        return [*first, *fit_alone(prompt, tokenizer, max_len - len(first), cut=True).ids]

    def filled(self, question: Question, kind: str) -> Prompt:
        """The text that a model of this kind reads."""
        template = self.source_prompt if kind == "encoder_decoder" else self.decoder_prompt
        prompt = fill(template, self.values(question), self.long_role)
        return Prompt(prompt.text.rstrip(" \t"), *prompt[1:])  # an empty role may leave a space at the end

    def _decoder_row(
        self, question: Question, prompt: Prompt, target: str, tokenizer: Tokenizer, max_len: int, cut: bool
    ) -> Row:
        first = begin(tokenizer)
        fitted, n_prompt = fit_answered(prompt, target, tokenizer, max_len - len(first) - 1, cut=cut)
        if fitted.n_cut and not self.still_answers(question, fitted.prompt.text):
            raise BadExample(CUT_AWAY)
        ids = to_array([*first, *fitted.ids, tokenizer.eos_id])
        trained = np.arange(len(ids)) >= len(first) + n_prompt
        return Row(ids, (), answer=Answer(trained=trained, n_cut=fitted.n_cut))

    def _source_row(
        self, question: Question, prompt: Prompt, target: str, tokenizer: Tokenizer, max_len: int, cut: bool
    ) -> Row:
        written = encode_target(target, tokenizer)
        if not written:
            raise BadExample(EMPTY_TARGET)  # no character of it is in the vocabulary
        if len(written) >= max_len:
            raise BadExample(TOO_LONG)
        first = begin(tokenizer)
        fitted = fit_alone(prompt, tokenizer, max_len - len(first) - 1, cut=cut)
        if fitted.n_cut and not self.still_answers(question, fitted.prompt.text):
            raise BadExample(CUT_AWAY)
        ids = to_array([*first, *fitted.ids, tokenizer.eos_id])
        return Row(ids, (), answer=Answer(target=to_array([*written, tokenizer.eos_id]), n_cut=fitted.n_cut))


def mean(values: Sequence[float]) -> float:
    """Their mean; 0 of none."""
    return sum(values) / len(values) if values else 0.0
