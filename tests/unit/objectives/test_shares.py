"""Whole numbers that add up, and choices that favour none."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.objectives.shares import choose, differences, settle, shares

WEIGHTS = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(weights=WEIGHTS, total=st.integers(0, 40), data=st.data())
def test_shares_add_up_and_are_rounded_to_a_neighbour(weights: list[int], total: int, data: st.DataObject) -> None:
    found = shares(total, np.array(weights), data.draw(st.integers(0, sum(weights) - 1)))
    assert found.sum() == total
    for share, weight in zip(found.tolist(), weights, strict=True):
        assert total * weight // sum(weights) <= share <= -(-total * weight // sum(weights))


@settings(derandomize=True, max_examples=40, deadline=None)
@given(weights=WEIGHTS, total=st.integers(0, 40))
def test_shares_are_exact_on_average(weights: list[int], total: int) -> None:
    every = sum(shares(total, np.array(weights), offset) for offset in range(sum(weights)))
    assert np.array_equal(every, total * np.array(weights))


@settings(derandomize=True, max_examples=60, deadline=None)
@given(parts=st.lists(st.tuples(*[st.integers(0, 9)] * 3), min_size=1, max_size=6), total=st.integers(0, 60))
def test_settling_keeps_the_bounds_and_the_total_if_it_can(parts: list[tuple[int, int, int]], total: int) -> None:
    counts, low = (np.array([part[i] for part in parts]) for i in (0, 1))
    high = low + np.array([part[2] for part in parts])
    found = settle(counts, total, low, high)
    assert ((low <= found) & (found <= high)).all()
    assert found.sum() == np.clip(total, low.sum(), high.sum())
    if (low <= counts).all() and (counts <= high).all() and counts.sum() == total:
        assert np.array_equal(found, counts)


def test_every_choice_is_equally_likely() -> None:
    rng = np.random.default_rng(0)
    sizes, counts = np.array([0, 4, 1, 3, 2]), np.array([0, 2, 0, 1, 2])
    found: Counter[tuple[int, ...]] = Counter()
    for _ in range(6000):
        places, parts = choose(sizes, counts, rng)
        assert parts.tolist() == [1, 1, 3, 4, 4]
        found[tuple(places.tolist())] += 1
    possible = {(*pair, third, 8, 9) for pair in combinations(range(4), 2) for third in (5, 6, 7)}
    assert found.keys() == possible
    expected = 6000 / len(possible)
    assert sum((n - expected) ** 2 / expected for n in found.values()) < 41  # chi squared, 17 degrees, p = 0.001


@pytest.mark.parametrize("counts", [[], [3], [2, 0, 5]])
def test_differences_undo_running_sums(counts: list[int]) -> None:
    assert differences(np.cumsum(np.array(counts, dtype=np.int64))).tolist() == counts
