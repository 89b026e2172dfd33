"""Rows of like length in a batch: every row once an epoch, whatever the batches, and little padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmkit.data.grouped_order import BUNDLE, POOL, GroupedOrder
from llmkit.data.sampler import SampleOrder


def _lengths(n: int, seed: int = 0) -> NDArray[np.int64]:
    """Pairs as in translation: log-normal, the second side like the first."""
    draw = np.random.default_rng(seed)
    first = draw.lognormal(2.7, 0.4, n)
    return np.maximum(1, np.stack([first, first * draw.normal(1, 0.15, n)], axis=1)).astype(np.int64)


def _rows(order: SampleOrder, start: int, stop: int) -> list[int]:
    return [order.sample_id(position) for position in range(start, stop)]


@settings(max_examples=40, derandomize=True, deadline=None)
@given(sizes=st.lists(st.integers(0, 400), min_size=1, max_size=3).filter(sum), seed=st.integers(0, 2**63 - 1))
def test_every_row_comes_once_an_epoch(sizes: list[int], seed: int) -> None:
    n = sum(sizes)
    order = GroupedOrder(tuple(sizes), seed, _lengths(n))
    for epoch in range(3):
        places = [order.locate(position) for position in range(epoch * n, (epoch + 1) * n)]
        assert sorted(places) == [(source, row, epoch) for source, size in enumerate(sizes) for row in range(size)]


def test_the_rows_of_a_pool_are_those_of_the_plain_order() -> None:
    n = POOL + 3000
    order, plain = GroupedOrder((n,), 5, _lengths(n)), SampleOrder((n,), None, 5)
    for start, stop in ((0, POOL), (POOL, n), (n, 2 * POOL), (2 * POOL, 3 * POOL), (3 * POOL, 2 * n)):
        assert sorted(_rows(order, start, stop)) == sorted(_rows(plain, start, stop))
        assert _rows(order, start, stop) != _rows(plain, start, stop)


def test_a_place_does_not_depend_on_what_was_asked_before() -> None:
    n = POOL + 777
    lengths = _lengths(n)
    forwards = _rows(GroupedOrder((n,), 1, lengths), 0, 3 * n)
    backwards = GroupedOrder((n,), 1, lengths)
    assert [backwards.sample_id(position) for position in reversed(range(0, 3 * n, 97))] == forwards[::97][::-1]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    lengths = _lengths(1000)
    orders = {
        tuple(_rows(GroupedOrder((1000,), seed, lengths), epoch * 1000, (epoch + 1) * 1000))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


@pytest.mark.parametrize("batch", [BUNDLE, BUNDLE // 4])
def test_batches_hold_rows_of_like_length(batch: int) -> None:
    """Padded to the longest of each, most of the tokens are real; in the plain order many are not."""
    n = 3 * POOL + 1000
    lengths = _lengths(n)

    def share(order: SampleOrder) -> float:
        parts = [lengths[_rows(order, start, start + batch)] for start in range(0, 2 * n - batch, batch)]
        return float(sum(part.sum() for part in parts) / sum((part.max(0) * batch).sum() for part in parts))

    assert share(GroupedOrder((n,), 0, lengths)) > 0.87
    assert share(SampleOrder((n,), None, 0)) < 0.75


def test_short_and_long_batches_come_in_no_order() -> None:
    """Rank correlation of neighbouring bundles, and of a bundle with its place, within 4 standard deviations."""
    n = 8 * POOL
    lengths = _lengths(n)
    order = GroupedOrder((n,), 3, lengths)
    means = np.array([lengths[_rows(order, start, start + BUNDLE)].mean() for start in range(0, n, BUNDLE)])
    ranks = np.argsort(np.argsort(means)) / len(means) - 0.5
    assert abs((ranks[1:] * ranks[:-1]).mean() * 12) < 4 / len(means) ** 0.5
    assert abs((ranks * np.linspace(-0.5, 0.5, len(means))).mean() * 12) < 4 / len(means) ** 0.5


def test_lengths_of_other_rows() -> None:
    with pytest.raises(ValueError, match="5 lengths for 6 rows"):
        GroupedOrder((6,), 0, _lengths(5))
