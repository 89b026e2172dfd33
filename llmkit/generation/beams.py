"""Beam search: of the texts that were begun, the likeliest ``n_beams`` go on at every step.

The score of a text is the sum of its tokens' log-probabilities, its end included, divided by the number of tokens to
the power of ``length_penalty``. A prompt is done when ``n_beams`` of its texts have ended and the best one that goes on
is no better than the worst of these as it stands (the usual rule of ``transformers``, ``early_stopping=False``).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from llmkit.generation.choice import History, known
from llmkit.generation.steps import Steps
from llmkit.generation.text import TextStream
from llmkit.settings import GenerationConfig


class Candidate(NamedTuple):
    """One more token after a beam."""

    score: float  # sum of log-probabilities
    beam: int
    token: int


@dataclass
class Beam:
    """A text that goes on."""

    score: float
    ids: list[int]  # without the prompt
    text: TextStream | None  # only where a stop text may end it


class Found(NamedTuple):
    """A text that has ended."""

    score: float  # after the length penalty
    ids: list[int]


class PromptSearch:
    """The beams of one prompt. ``beginning`` reads the text after the prompt, and ends it where it must end."""

    def __init__(self, settings: GenerationConfig, beginning: TextStream, ends: Collection[int]) -> None:
        self._n, self._length_penalty, self._ends = settings.n_beams, settings.length_penalty, ends
        self._limit, self._n_tokens = beginning.limit, 0
        self.beams = [Beam(0.0, [], beginning.fork() if any(settings.stop) else None)]
        self._found: list[Found] = []
        self.done = False

    @property
    def best(self) -> list[int]:
        """The ids of the best text, its end token included."""
        return self._found[0].ids if self._found else self.beams[0].ids

    def advance(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Take one more token: candidates, the best one first. Gives those that became the new beams."""
        self._n_tokens += 1
        chosen: list[tuple[Candidate, Beam]] = []
        for rank, candidate in enumerate(candidates):
            beam = self._extended(candidate)
            if not self._has_ended(beam):
                chosen.append((candidate, beam))
            elif rank < self._n:
                self._add(beam)
            if len(chosen) == self._n:
                break
        if not chosen or self._is_hopeless(chosen[0][0].score):
            self.done = True
            return []
        if len(chosen) < self._n:  # stop texts have ended the others
            filler = Candidate(-math.inf, *chosen[0][0][1:])
            chosen += [(filler, self._extended(filler))] * (self._n - len(chosen))
        self.beams = [beam for _, beam in chosen]
        return [candidate for candidate, _ in chosen]

    def _extended(self, candidate: Candidate) -> Beam:
        beam = self.beams[candidate.beam]
        text = None if beam.text is None else beam.text.fork()
        if text is not None:
            text.feed(candidate.token)
        return Beam(candidate.score, [*beam.ids, candidate.token], text)

    def _has_ended(self, beam: Beam) -> bool:
        stopped = beam.text is not None and beam.text.ended
        return stopped or beam.ids[-1] in self._ends or self._n_tokens == self._limit

    def _add(self, beam: Beam) -> None:
        if beam.score > -math.inf:
            self._found.append(Found(self._normed(beam.score), beam.ids))
            self._found = sorted(self._found, key=lambda found: -found.score)[: self._n]

    def _normed(self, score: float) -> float:
        return score / math.pow(self._n_tokens, self._length_penalty)

    def _is_hopeless(self, best_score: float) -> bool:
        """Whether no text that goes on is taken to become one of the best."""
        full = len(self._found) == self._n and self._normed(best_score) <= self._found[-1].score
        return full or best_score == -math.inf


def search(
    steps: Steps,
    rows: Sequence[Sequence[int]],
    beginnings: Sequence[TextStream],
    settings: GenerationConfig,
    vocab_size: int,
    ends: Collection[int],
) -> list[list[int]]:
    """The ids of the best text found for each of ``rows``, which are those of ``steps``."""
    prompts = [PromptSearch(settings, beginning, ends) for beginning in beginnings]
    going, history = list(prompts), History(settings, rows)
    while True:
        logits_BV = known(steps.logits(), vocab_size)
        scores_BV = history.weigh(logits_BV.log_softmax(-1))
        taken = _advance(going, scores_BV, settings.n_beams * (1 + max(1, len(ends))))
        going = [prompt for prompt in going if not prompt.done]
        if not going:
            return [prompt.best for prompt in prompts]
        rows_B, next_B = torch.tensor(taken, device=scores_BV.device).unbind(1)
        steps.keep(rows_B)
        history.keep(rows_B)
        steps.append(next_B)
        history.append(next_B)


def _advance(prompts: Sequence[PromptSearch], scores_BV: torch.Tensor, n: int) -> list[tuple[int, int]]:
    """Give each prompt its ``n`` best candidates. (row, token) of the rows that go on, the rows as they are now."""
    V = scores_BV.shape[1]
    before_B = torch.tensor([beam.score for prompt in prompts for beam in prompt.beams], device=scores_BV.device)
    totals_QC = (scores_BV + before_B[:, None]).view(len(prompts), -1)
    best = totals_QC.topk(min(n, totals_QC.shape[1]))
    taken, first = [], 0
    for prompt, values, places in zip(prompts, best.values.tolist(), best.indices.tolist(), strict=True):
        n_rows = len(prompt.beams)
        pairs = zip(values, places, strict=True)
        chosen = prompt.advance([Candidate(value, place // V, place % V) for value, place in pairs])
        taken += [(first + candidate.beam, candidate.token) for candidate in chosen]
        first += n_rows
    return taken
