"""The choice of hidden tokens: exact expectations, whole units, and draws that belong to the row alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.interfaces import Row
from llmkit.objectives.masking import (
    SPAN_MAX,
    Draws,
    Flags,
    choose,
    corrupt,
    draw,
    per_unit,
    span_length_cdf,
    span_starts,
    word_starts,
)


def drawn(n_rows: int, length: int, seed: int = 0) -> tuple[Draws, Flags]:
    """Draws of full rows, and their places."""
    real = np.ones((n_rows, length), dtype=np.bool_)
    return draw([Row(np.zeros(length, np.int64), (seed, i)) for i in range(n_rows)], real), real


def starts_of(sizes: Sequence[int], n_rows: int) -> Flags:
    """Rows of units of these sizes."""
    row = np.zeros(sum(sizes), dtype=np.bool_)
    row[np.cumsum([0, *sizes[:-1]])] = True
    return np.tile(row, (n_rows, 1))


@pytest.mark.parametrize("n", [1, 2, 9, 40])
@pytest.mark.parametrize("rate", [0.15, 0.5, 1.0])
def test_single_tokens_are_counted_exactly(n: int, rate: float) -> None:
    """A row hides its share rounded down or up, so often up that the mean is right."""
    draws, real = drawn(4000, n)
    counts = choose(real, real, np.full(4000, rate), draws).sum(1)
    assert set(counts.tolist()) <= {int(np.floor(rate * n)), int(np.ceil(rate * n))}
    assert counts.mean() == pytest.approx(rate * n, abs=4 * 0.5 / 4000**0.5)


@pytest.mark.parametrize("sizes", [(1, 3), (1, 1, 1, 9), (5,), (2, 2, 7), (4, 1, 4, 1, 1, 1, 4)])
@pytest.mark.parametrize("rate", [0.15, 0.6])
def test_every_unit_has_the_same_chance_whatever_its_size(sizes: tuple[int, ...], rate: float) -> None:
    n_rows = 8000
    draws, real = drawn(n_rows, sum(sizes))
    chosen = choose(starts_of(sizes, n_rows), real, np.full(n_rows, rate), draws)
    shares = chosen.mean(0)
    assert np.abs(shares - rate).max() < 4.5 * (rate * (1 - rate) / n_rows) ** 0.5
    assert not np.diff(np.split(chosen, np.cumsum(sizes)[:-1], axis=1)[-1], axis=1).any()


def test_single_tokens_are_chosen_independently_of_their_place() -> None:
    """All pairs of places are hidden together equally often: no runs, no spacing."""
    n_rows, n, rate = 20_000, 6, 0.5
    draws, real = drawn(n_rows, n)
    chosen = choose(real, real, np.full(n_rows, rate), draws).astype(float)
    together = chosen.T @ chosen / n_rows
    expected = 3 / 6 * 2 / 5
    assert np.abs(together[~np.eye(n, dtype=bool)] - expected).max() < 4.5 * (expected * (1 - expected) / n_rows) ** 0.5


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5), max_size=25), min_size=1, max_size=5),
    st.floats(0.01, 1.0),
    st.sampled_from([None, 1.0, 2.0, 5.0]),
    st.integers(0, 5),
)
def test_units_are_never_split(texts: list[list[int]], rate: float, mean: float | None, seed: int) -> None:
    """Ids: 0 is special, 1 and 2 begin a word, the others go on. The words are found here by a plain loop."""
    width = 26
    inputs = np.zeros((len(texts), width), np.int64)
    real = np.zeros((len(texts), width), np.bool_)
    for b, text in enumerate(texts):
        inputs[b, : len(text)], real[b, : len(text)] = text, True
    special, begins = np.arange(6) < 1, (np.arange(6) >= 1) & (np.arange(6) <= 2)
    eligible = real & ~special[inputs]
    draws = draw([Row(np.array(text), (seed, b)) for b, text in enumerate(texts)], real)
    starts = words = word_starts(inputs, eligible, begins)
    if mean is not None:
        starts = span_starts(words, eligible, mean, draws.length_BT)
    chosen = choose(starts, eligible, np.full(len(texts), rate), draws)
    assert not (chosen & ~eligible).any()
    for b, text in enumerate(texts):
        groups: list[list[int]] = []
        for t, token in enumerate(text):
            after_special = t == 0 or text[t - 1] == 0
            if token != 0 and (after_special or token in (1, 2)):
                groups.append([])
            if token != 0:
                groups[-1].append(t)
        assert sorted(np.flatnonzero(words[b])) == [group[0] for group in groups]
        assert all(len({bool(chosen[b, t]) for t in group}) == 1 for group in groups)
        if rate == 1.0:
            assert chosen[b].sum() == eligible[b].sum()


def test_span_lengths_are_geometric_with_the_given_mean() -> None:
    """A mean of 3.8 is SpanBERT's p = 0.2 cut off at 10: P(l) ~ 0.8^(l - 1)."""
    lengths = np.arange(1, SPAN_MAX + 1)
    weights = 0.8 ** (lengths - 1)
    exact_mean = float((lengths * weights).sum() / weights.sum())
    assert exact_mean == pytest.approx(3.8, abs=0.005)
    np.testing.assert_allclose(span_length_cdf(exact_mean), np.cumsum(weights / weights.sum())[:-1], atol=1e-9)
    draws, real = drawn(300, 500)
    starts = span_starts(real, real, exact_mean, draws.length_BT)
    drawn_lengths = np.concatenate([np.diff(np.flatnonzero(row)) for row in starts])
    counts = np.bincount(drawn_lengths, minlength=SPAN_MAX + 1)[1:]
    expected = len(drawn_lengths) * weights / weights.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
    assert drawn_lengths.mean() == pytest.approx(3.8, abs=0.05)


def test_spans_count_words_and_stop_at_special_tokens() -> None:
    """Length numbers of 0.99 ask for long spans: 10 words unless something special stands between them."""
    eligible = np.ones((1, 40), dtype=np.bool_)
    eligible[0, 31] = False
    starts = eligible & (np.arange(40) % 2 == 0)
    starts[0, 32] = True
    spans = span_starts(starts, eligible, 5.0, np.full((1, 40), 0.99))
    assert np.flatnonzero(spans[0]).tolist() == [0, 20, 32]
    one = span_starts(starts, eligible, 1.0, np.full((1, 40), 0.99))
    assert (one == starts).all()


def test_a_number_per_unit() -> None:
    starts = np.array([[True, False, True, False, False]])
    assert per_unit(np.arange(5.0)[None], starts).tolist() == [[0, 0, 2, 2, 2]]


def test_rows_without_an_eligible_token() -> None:
    draws, real = drawn(3, 4)
    none = np.zeros_like(real)
    assert not choose(none, none, np.full(3, 1.0), draws).any()
    some = real.copy()
    some[1] = False
    assert choose(some, some, np.full(3, 1.0), draws).sum(1).tolist() == [4, 0, 4]


def test_draws_depend_on_the_row_alone() -> None:
    rows = [Row(np.zeros(n, np.int64), (7, n)) for n in (3, 0, 5)]
    real = np.arange(6) < np.array([[3], [0], [5]])
    together = draw(rows, real)
    for b, row in enumerate(rows):
        alone = draw([row], real[b : b + 1, : max(len(row.ids), 1)])
        for many, one in zip(together, alone, strict=True):
            assert (many[b, : one.shape[1]] == one[0]).all() if one.ndim == 2 else many[b] == one[0]


def test_replacements_by_their_shares() -> None:
    inputs, chosen = np.full((1, 6), 5), np.array([[True, True, True, True, True, False]])
    kinds, tokens = np.array([[0.79, 0.81, 0.89, 0.91, 0.0, 0.0]]), np.array([[0.5, 0.0, 0.999, 0.5, 0.5, 0.5]])
    special = np.array([True, False, True, False, False, False, True])
    ids = corrupt(inputs, chosen, kinds, tokens, mask_share=0.8, random_share=0.1, mask_id=6, special_V=special)
    assert ids.tolist() == [[6, 1, 5, 5, 6, 5]]
    assert inputs.tolist() == [[5] * 6]
