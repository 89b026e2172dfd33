"""What a model answers to a task's questions: by its head, or by writing. The same in training and in ``predict``."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from llmkit.errors import BadExample
from llmkit.generation import generate_from_ids
from llmkit.interfaces import Answer, Objective, Row, Tokenizer
from llmkit.settings import GenerationConfig
from llmkit.task_interface import Prediction, Question, SpanTask, Task, WrittenTask

Faults = Counter[str]  # how often which

log = logging.getLogger("llmkit.prediction")

WHOLE = 1 << 30  # more ids than any question has
UNASKED = "cannot be asked ({}): answered with nothing"


@dataclass(frozen=True)
class Answerer:
    """Answers questions with ``model``, ``batch_size`` at a time, which does not change the answers.

    A question of more than ``max_len`` ids is cut, as training rows are with ``data.long_rows=truncate``, and so is one
    that leaves a decoder too little room to answer; one that cannot be asked at all is answered with nothing. A warning
    counts both.
    """

    task: Task
    objective: Objective
    model: Any
    tokenizer: Tokenizer
    max_len: int
    settings: GenerationConfig
    device: torch.device
    batch_size: int

    def __call__(
        self, questions: Sequence[Question], should_stop: Callable[[], bool] = lambda: False
    ) -> list[Prediction] | None:
        """One prediction a question, in their order; None when ``should_stop`` cut it short."""
        answer = {"class": self._choose, "span": self._point, "text": self._write}[self.task.answers(self._kind)]
        by_length = sorted(range(len(questions)), key=lambda i: _length(questions[i]))  # so that little is padded
        found: dict[int, Prediction] = {}
        faults: Faults = Counter()
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(by_length), self.batch_size):
                if should_stop():
                    return None
                asked = {
                    i: ids
                    for i in by_length[start : start + self.batch_size]
                    if (ids := self._ids(questions[i], faults))
                }
                if asked:
                    with torch.no_grad():
                        answers = answer([questions[i] for i in asked], list(asked.values()), faults)
                    found |= zip(asked, answers, strict=True)
        finally:
            self.model.train(was_training)
        for fault, n in faults.items():
            log.warning("%d of %d questions %s", n, len(questions), fault)
        return [found.get(i, Prediction("")) for i in range(len(questions))]

    @property
    def _kind(self) -> str:
        kind: str = self.model.config.kind
        return kind

    def _ids(self, question: Question, faults: Faults) -> list[int]:
        """What the model reads; empty where it cannot read the question."""
        if self.task.answers(self._kind) == "span":
            return [self.tokenizer.eos_id]  # windows are made of the whole context
        try:
            ids, n_cut = self.ask(question)
        except BadExample as bad:
            faults[UNASKED.format(bad)] += 1
            return []
        if not ids:
            faults[UNASKED.format("no character of it is in the vocabulary")] += 1
        if n_cut:
            faults[f"are longer than {self._room} tokens: a part was left out{self._advice}"] += 1
        return ids

    def ask(self, question: Question) -> tuple[list[int], int]:
        """(what the model reads, how many ids were left out to make it fit). Raises ``BadExample``."""
        whole = list(self.task.prompt(question, self.tokenizer, self._kind, WHOLE))
        if len(whole) <= self._room:
            return whole, 0
        cut = list(self.task.prompt(question, self.tokenizer, self._kind, self._room))
        return cut, len(whole) - len(cut)

    @property
    def _room(self) -> int:
        """Ids of a question; what a decoder writes must fit behind it, in the model's window."""
        if self._kind != "decoder" or self.task.answers(self._kind) != "text":
            return self.max_len
        window: int = self.model.config.max_seq_len
        return min(self.max_len, window - min(self.settings.max_new_tokens, window // 2))

    @property
    def _advice(self) -> str:
        return "" if self._room == self.max_len else "; a smaller generation.max_new_tokens leaves more room"

    def _scores(self, rows: Sequence[Row]) -> np.ndarray[Any, Any]:
        """The head's logits NQC: one question with C classes, or the first and the last of C places."""
        batch = self.objective.collate(rows, seq_len=self.max_len, ids=self.tokenizer.token_ids())
        choices = self.objective.choices(self.model, batch.to(self.device))  # type: ignore[attr-defined]
        logits: np.ndarray[Any, Any] = choices.logits_NQC.double().cpu().numpy()
        return logits

    def _choose(self, questions: Sequence[Question], prompts: Sequence[list[int]], _: Faults) -> list[Prediction]:
        """The likeliest label of each, and the probabilities of all."""
        rows = [Row(np.array(ids), (), answer=Answer(label=0)) for ids in prompts]
        labels = self.model.task_head.config.labels
        found = []
        for logits_C in self._scores(rows)[:, 0]:
            odds_C = np.exp(logits_C - logits_C.max())
            scores = dict(zip(labels, (odds_C / odds_C.sum()).tolist(), strict=True))
            found.append(Prediction(labels[int(logits_C.argmax())], scores))
        return found

    def _point(self, questions: Sequence[Question], prompts: Sequence[list[int]], faults: Faults) -> list[Prediction]:
        """The best span of each over all windows of its context; nothing where the question leaves no room for it."""
        task = cast(SpanTask, self.task)
        windows = [self._windows(question, faults) for question in questions]
        rows = [window.row(None) for some in windows for window in some]
        parts = [self._scores(rows[i : i + self.batch_size]) for i in range(0, len(rows), self.batch_size)]
        logits = iter([one_2T.T for part in parts for one_2T in part])
        return [
            task.span_prediction(question, some, [next(logits) for _ in some]) if some else Prediction("")
            for question, some in zip(questions, windows, strict=True)
        ]

    def _windows(self, question: Question, faults: Faults) -> Sequence[Any]:
        try:
            windows = cast(SpanTask, self.task).windows(question, self.tokenizer, self.max_len)
        except BadExample as bad:
            faults[UNASKED.format(bad)] += 1
            return ()
        return windows

    def _write(self, questions: Sequence[Question], prompts: Sequence[list[int]], _: Faults) -> list[Prediction]:
        """Generated texts, without outer white space."""
        task = cast(WrittenTask, self.task)
        texts = generate_from_ids(
            self.model,
            self.tokenizer,
            prompts,
            self.settings,
            device=self.device,
            n_samples=task.n_samples,
            end_ids=task.end_ids(self.tokenizer),
        )
        return [Prediction(first.strip(), {}, tuple(text.strip() for text in more)) for first, *more in texts]


def _length(question: Question) -> int:
    return sum(len(str(value)) for value in question.fields.values())
