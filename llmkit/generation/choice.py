"""Which id comes next. The order of the filters is that of ``transformers``: repetition penalty, repeated n-grams,
temperature, top-k, top-p. Every row has its own random numbers, one a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmkit.errors import NumericsError
from llmkit.settings import GenerationConfig

NO_ID = -1  # padding of a history


class History:
    """The ids of every row so far, prompt included, and what they forbid or make less likely."""

    def __init__(self, settings: GenerationConfig, rows: Sequence[Sequence[int]]) -> None:
        self._penalty, self._n = settings.repetition_penalty, settings.no_repeat_ngram_size
        width = max(map(len, rows), default=0)
        self._ids_BT = torch.tensor([[NO_ID] * (width - len(row)) + list(row) for row in rows], dtype=torch.int64)
        self._used = self._penalty != 1 or self._n is not None

    def weigh(self, scores_BV: Tensor) -> Tensor:
        """The logits, or logarithms of probabilities, after the penalty and without ids that repeat an n-gram."""
        if not self._used:
            return scores_BV
        self._ids_BT = self._ids_BT.to(scores_BV.device)
        if self._penalty != 1:
            scores_BV = penalize(scores_BV, _marked(self._ids_BT, scores_BV.shape[1]), self._penalty)
        return scores_BV if self._n is None else ban_repeats(scores_BV, self._ids_BT, self._n)

    def keep(self, rows_B: Tensor) -> None:
        """Go on with these of the rows, in this order."""
        if self._used:
            self._ids_BT = self._ids_BT[rows_B]

    def append(self, next_B: Tensor) -> None:
        """One more id in every row."""
        if self._used:
            self._ids_BT = torch.cat((self._ids_BT, next_B[:, None]), dim=1)


class Sampler:
    """Chooses the next id of every row from its logits: the likeliest one, or by chance."""

    def __init__(
        self, settings: GenerationConfig, seeds: Sequence[int], rows: Sequence[Sequence[int]], vocab_size: int
    ) -> None:
        self.settings, self.vocab_size = settings, vocab_size
        self.generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
        self.history = History(settings, rows)

    def pick(self, logits_BV: Tensor) -> Tensor:
        """The next ids."""
        logits_BV = self.history.weigh(known(logits_BV, self.vocab_size))
        next_B = logits_BV.argmax(-1) if self.settings.temperature == 0 else self._draw(logits_BV)
        self.history.append(next_B)
        return next_B

    def keep(self, rows_B: Tensor) -> None:
        """Go on with these of the rows, in this order."""
        self.generators = [self.generators[row] for row in rows_B.tolist()]
        self.history.keep(rows_B)

    def _draw(self, logits_BV: Tensor) -> Tensor:
        """One uniform number a row, looked up in the cumulative probabilities."""
        settings = self.settings
        logits_BV = logits_BV / settings.temperature
        if settings.top_k is not None:
            logits_BV = keep_top_k(logits_BV, settings.top_k)
        if settings.top_p is not None:
            logits_BV = keep_top_p(logits_BV, settings.top_p)
        exact_BV = logits_BV.cpu() if logits_BV.device.type == "mps" else logits_BV  # MPS has no fp64
        cumulative_BV = exact_BV.double().softmax(-1).cumsum(-1)
        uniform_B1 = torch.stack([torch.rand(1, generator=g) for g in self.generators]).to(exact_BV.device)
        # right: the first id whose cumulative probability exceeds the number, so never one of probability 0
        next_B1 = torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True)
        return next_B1.squeeze(1).to(logits_BV.device)


def known(logits_BV: Tensor, vocab_size: int) -> Tensor:
    """The logits of the ids that the tokenizer knows: the embedding may have more rows. Raises ``NumericsError``."""
    logits_BV = logits_BV[:, :vocab_size]
    if bool(logits_BV.isnan().any()):
        raise NumericsError("the model's logits are not numbers", fix="use an earlier checkpoint, or precision fp32")
    return logits_BV


def penalize(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make ids that are already there less likely: logits divided by ``penalty``, or multiplied where negative.

    Keskar et al. 2019 (CTRL), section 4.1, in the form ``transformers`` gives it.
    """
    return torch.where(seen_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def ban_repeats(scores_BV: Tensor, ids_BT: Tensor, n: int) -> Tensor:
    """-inf for ids that would end a run of ``n`` ids which the row already has (Paulus et al. 2018, section 2.5).

    A row in which that leaves nothing stays as it is. ``NO_ID`` before a row is no part of it.
    """
    if ids_BT.shape[1] < n:
        return scores_BV
    last_BM = ids_BT[:, ids_BT.shape[1] - n + 1 :]
    runs_BRN = ids_BT.unfold(1, n, 1)
    repeats_BR = (runs_BRN[..., :-1] == last_BM[:, None]).all(-1)
    banned_BR = runs_BRN[..., -1].masked_fill(~repeats_BR, NO_ID)
    banned_BV = _marked(banned_BR, scores_BV.shape[1])
    free_B1 = (~banned_BV & (scores_BV > float("-inf"))).any(-1, keepdim=True)
    return scores_BV.masked_fill(banned_BV & free_B1, float("-inf"))


def _marked(ids_BT: Tensor, vocab_size: int) -> Tensor:
    """BV: true for the ids that a row holds, ``NO_ID`` left out."""
    marked = torch.zeros(ids_BT.shape[0], vocab_size + 1, dtype=torch.bool, device=ids_BT.device)
    return marked.scatter_(1, ids_BT.masked_fill(ids_BT == NO_ID, vocab_size), True)[:, :vocab_size]


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """The ``k`` largest logits of a row, and those equal to the smallest of them; the others become -inf."""
    smallest_B1 = logits_BV.topk(min(k, logits_BV.shape[1])).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < smallest_B1, float("-inf"))


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """The fewest likeliest ids whose probabilities reach ``p`` (Holtzman et al. 2020), at least one."""
    sorted_BV, order_BV = logits_BV.sort(descending=False)
    tail_BV = sorted_BV.softmax(-1).cumsum(-1) <= 1 - p
    tail_BV[:, -1] = False
    return logits_BV.masked_fill(tail_BV.scatter(1, order_BV, tail_BV), float("-inf"))
