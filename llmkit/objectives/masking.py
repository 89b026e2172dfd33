"""Which tokens of a row are hidden, and what stands in their place. Numpy only; every function is pure.

What is hidden together is a *unit*: a token, a whole word, or a span of either. A row of n eligible tokens hides k of
them, k being ``rate * n`` rounded up or down by a coin, so that its expectation is exact. Units are taken without
splitting and without favour to short ones: they lie in random order on a circle of n tokens, which is turned by a
random angle, and an arc of k tokens is marked. A unit inside the arc is chosen; one that the arc cuts is chosen with a
probability equal to its share inside. So every token of every unit is chosen with probability k / n, and the number of
chosen tokens has expectation k. With single tokens it is k.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkit.interfaces import IGNORE_INDEX, Row
from llmkit.objectives.rows import Ids

Flags = NDArray[np.bool_]
Numbers = NDArray[np.float64]

SPAN_MAX = 10  # units in the longest span (SpanBERT)


class Draws(NamedTuple):
    """Uniform numbers in [0, 1) of each row. They depend on the row's seed and length, not on the batch around it."""

    count_B: Numbers  # rounds the number of tokens to hide
    turn_B: Numbers  # turns the circle
    order_BT: Numbers  # of a unit at its first token: its place on the circle
    cut_BT: Numbers  # of a unit at its first token: whether it is chosen when the arc cuts it
    kind_BT: Numbers  # mask, random or kept
    token_BT: Numbers  # which random token
    length_BT: Numbers  # lengths of spans, from the left


def draw(rows: Sequence[Row], real_BT: Flags) -> Draws:
    """All random numbers of a batch; ``real_BT`` is false at padding, which is on the right."""
    B, T = real_BT.shape
    scalars, table = np.zeros((2, B)), np.zeros((5, B, T))
    for b, (row, length) in enumerate(zip(rows, real_BT.sum(1), strict=True)):
        rng = row.rng()
        scalars[:, b] = rng.random(2)
        table[:, b, :length] = rng.random((5, length))
    return Draws(*scalars, *table)


def word_starts(inputs_BT: Ids, eligible_BT: Flags, begins_word_V: Flags) -> Flags:
    """First tokens of words: ids that begin one, and whatever stands at the start of a row or after a special token.

    So a word cut by the start of a row counts as a word: where it began is not in the row.
    """
    return eligible_BT & (begins_word_V[inputs_BT] | _first(eligible_BT))


def _first(eligible_BT: Flags) -> Flags:
    """Columns at the start of a row or after a special token."""
    first_BT = np.ones_like(eligible_BT)
    first_BT[:, 1:] = ~eligible_BT[:, :-1]
    return first_BT


def span_starts(starts_BT: Flags, eligible_BT: Flags, mean_length: float, length_BT: Numbers) -> Flags:
    """Joins units into spans of random lengths in units; special tokens end a span. SpanBERT, section 3.1.

    The row is cut into spans from the left and whole spans are hidden, so the lengths of hidden spans are those drawn,
    less what special tokens cut off. Two hidden spans may touch, as in SpanBERT.
    """
    B, T = starts_BT.shape
    lengths = np.searchsorted(span_length_cdf(mean_length), length_BT, side="right") + 1
    cuts = np.cumsum(lengths, axis=1)  # the indices of the units that begin the second, third ... span
    begins = np.zeros((B, T + 1), dtype=np.bool_)
    begins[:, 0] = True
    np.put_along_axis(begins, np.minimum(cuts, T), True, axis=1)
    unit_BT = np.maximum(np.cumsum(starts_BT, axis=1) - 1, 0)
    return starts_BT & (np.take_along_axis(begins, unit_BT, axis=1) | _first(eligible_BT))


@lru_cache
def span_length_cdf(mean_length: float) -> Numbers:
    """P(length <= 1 .. ``SPAN_MAX`` - 1) of the geometric distribution cut off at ``SPAN_MAX`` with this mean.

    P(l) is proportional to q^(l - 1); the mean grows with q, which is found by halving. A mean of 3.8 has q = 0.8,
    SpanBERT's value.
    """
    lengths = np.arange(1, SPAN_MAX + 1)
    low, high = 0.0, 1.0
    for _ in range(60):
        q = (low + high) / 2
        weights = q ** (lengths - 1.0)
        low, high = (q, high) if (lengths * weights).sum() < mean_length * weights.sum() else (low, q)
    cdf: Numbers = np.cumsum(weights / weights.sum())[:-1]
    return cdf


def choose(starts_BT: Flags, eligible_BT: Flags, rate_B: Numbers, draws: Draws) -> Flags:
    """The tokens to hide: whole units, ``rate_B`` of the eligible tokens in expectation (see the module's text)."""
    unit_BT = np.cumsum(starts_BT).reshape(starts_BT.shape) - 1
    unit_N = unit_BT[eligible_BT]
    n_B = eligible_BT.sum(1)
    k_B = np.minimum(np.floor(rate_B * n_B + draws.count_B), n_B)
    columns_BT = np.argsort(np.where(starts_BT, draws.order_BT, 2.0), axis=1, kind="stable")
    order_U = np.take_along_axis(unit_BT, columns_BT, axis=1)[np.take_along_axis(starts_BT, columns_BT, axis=1)]
    row_U = np.nonzero(starts_BT)[0]  # in either order: units of a row stay together
    size_U = np.bincount(unit_N, minlength=len(row_U))[order_U]
    inside_U = _inside_arc(size_U, row_U, n_B, k_B, draws.turn_B)
    chosen_U = np.zeros(len(row_U), dtype=np.bool_)
    chosen_U[order_U] = draws.cut_BT[starts_BT][order_U] * size_U < inside_U
    chosen_BT = np.zeros_like(eligible_BT)
    chosen_BT[eligible_BT] = chosen_U[unit_N]
    return chosen_BT


def _inside_arc(size_U: Ids, row_U: Ids, n_B: Ids, k_B: Numbers, turn_B: Numbers) -> Numbers:
    """Tokens that each unit has in the arc. Units of a row lie side by side on its circle of ``n_B`` tokens."""
    n, k, turn = n_B[row_U], k_B[row_U], np.floor(turn_B * n_B).astype(np.int64)[row_U]
    row_begin = (np.cumsum(n_B) - n_B)[row_U]
    begin = (np.cumsum(size_U) - size_U - row_begin - turn) % n  # counted from where the arc begins
    end = begin + size_U
    inside: Numbers = np.clip(np.minimum(end, k) - begin, 0, None) + np.clip(np.minimum(end - n, k), 0, None)
    return inside


def per_unit(values_BT: Numbers, starts_BT: Flags) -> Numbers:
    """Every token gets the number of the first token of its unit."""
    columns = np.where(starts_BT, np.arange(starts_BT.shape[1]), 0)
    return np.take_along_axis(values_BT, np.maximum.accumulate(columns, axis=1), axis=1)


def corrupt(
    inputs_BT: Ids,
    chosen_BT: Flags,
    kind_BT: Numbers,
    token_BT: Numbers,
    *,
    mask_share: float,
    random_share: float,
    mask_id: int,
    special_V: Flags,
) -> Ids:
    """Of the chosen ids ``mask_share`` become the mask, ``random_share`` any token but special ones; the rest stay."""
    real_ids = np.flatnonzero(~special_V)
    corrupted = np.where(chosen_BT & (kind_BT < mask_share), mask_id, inputs_BT)
    swapped = chosen_BT & (kind_BT >= mask_share) & (kind_BT < mask_share + random_share)
    corrupted[swapped] = real_ids[(token_BT[swapped] * len(real_ids)).astype(np.int64)]
    return corrupted


def labels_of(inputs_BT: Ids, chosen_BT: Flags) -> Ids:
    """The ids that stood at the chosen places; elsewhere nothing is asked."""
    return np.where(chosen_BT, inputs_BT, IGNORE_INDEX)
