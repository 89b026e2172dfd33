"""The order of samples: a permutation each epoch, exact weights, and no memory."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.sampler import BLOCK, SampleOrder, draws_before
from llmkit.errors import ConfigError, DataError

quick = settings(max_examples=30, derandomize=True, deadline=None)
SEEDS = st.integers(0, 2**63 - 1)


@quick
@given(st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(sum), SEEDS, st.integers(0, 5))
def test_every_row_comes_once_an_epoch(sizes: list[int], seed: int, epoch: int) -> None:
    order = SampleOrder(tuple(sizes), None, seed)
    n = sum(sizes)
    places = [order.locate(p) for p in range(epoch * n, (epoch + 1) * n)]
    assert sorted(places) == [(source, row, epoch) for source, size in enumerate(sizes) for row in range(size)]
    assert sorted(order.sample_id(p) for p in range(epoch * n, (epoch + 1) * n)) == list(range(n))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [
        tuple(SampleOrder((500,), None, seed).sample_id(epoch * 500 + p) for p in range(500))
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len(set(orders)) == len(orders)
    assert all(order != tuple(range(500)) for order in orders)


def test_the_order_looks_random() -> None:
    """Rank correlation of neighbours, and of position with row, within 4 standard deviations of none."""
    n = 20_000
    rows = [SampleOrder((n,), None, 7).sample_id(p) / n - 0.5 for p in range(n)]
    lagged = sum(a * b for a, b in pairwise(rows)) / n * 12
    trend = sum(a * (p / n - 0.5) for p, a in enumerate(rows)) / n * 12
    assert abs(lagged) < 4 / n**0.5
    assert abs(trend) < 4 / n**0.5


@quick
@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=5), SEEDS, st.integers(1, 3))
def test_a_mixture_holds_its_weights_and_each_source_goes_round(weights: list[float], seed: int, n_blocks: int) -> None:
    sizes = tuple(3 + 5 * n for n in range(len(weights)))
    order = SampleOrder(sizes, tuple(weights), seed)
    places = [order.locate(p) for p in range(n_blocks * BLOCK)]
    for source, size in enumerate(sizes):
        rows = [row for where, row, _ in places if where == source]
        share = weights[source] / sum(weights)
        assert abs(len(rows) - share * len(places)) <= len(weights)
        epochs = Counter(rows)
        # the draws of a block are permuted, so after whole blocks no row is more than one draw ahead
        assert max(epochs.values(), default=0) - min(epochs[row] for row in range(size)) <= 1


@quick
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6).filter(sum), st.integers(0, 10**15))
def test_draws_never_step_back_and_always_add_up(parts: list[int], position: int) -> None:
    before, after = draws_before(position, tuple(parts)), draws_before(position + 1, tuple(parts))
    assert sum(before) == position
    assert all(0 <= b - a <= 1 for a, b in zip(before, after, strict=True))
    assert all(
        abs(n - part / sum(parts) * position) <= len(parts) + 1e-3 for n, part in zip(before, parts, strict=True)
    )


def test_a_tiny_weight_is_still_drawn() -> None:
    order = SampleOrder((10, 10), (1.0, 1e-4), 0)
    drawn = Counter(order.locate(p)[0] for p in range(30 * BLOCK))
    assert drawn[1] == pytest.approx(30 * BLOCK * 1e-4, abs=2)


def test_memory_does_not_depend_on_the_corpus() -> None:
    def peak(n: int, weights: tuple[float, ...] | None) -> int:
        tracemalloc.start()
        order = SampleOrder((n, n), weights, 1)
        for position in range(500):
            order.locate(position)
        order.locate(10**13)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    for weights in (None, (0.5, 0.5)):
        peak(10, weights)  # fills the caches that all share
        assert peak(10**12, weights) < peak(10, weights) + 20_000


def test_epoch_counts_draws() -> None:
    assert SampleOrder((30, 10), None, 0).epoch(60) == 1.5


def test_what_is_no_mixture_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 weights for 2 sources"):
        SampleOrder((3, 3), (1.0,), 0)
    for weights in ((1.0, -1.0), (0.0, 0.0), (1.0, float("nan")), (1.0, float("inf"))):
        with pytest.raises(ConfigError, match="finite"):
            SampleOrder((3, 3), weights, 0)
    with pytest.raises(DataError, match="source 1 has a weight but no training sequence"):
        SampleOrder((3, 0), (1.0, 1.0), 0)
    with pytest.raises(DataError, match="no training sequence"):
        SampleOrder((0,), None, 0)
