"""Packing: every example whole and once, rows within their width, and not many more rows than are needed."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.interfaces import NO_DOCUMENT
from llmkit.objectives.row_packing import fewest_columns, first_fit, lay_out

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=24)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(SIZES)
def test_columns_of_examples(lengths: list[int]) -> None:
    layout = lay_out(lengths)
    pieces = [np.arange(100 * n, 100 * n + length) for n, length in enumerate(lengths)]
    values = layout.spread(pieces, -7)
    width = max([1, *lengths])
    assert values.shape == layout.shape == (values.shape[0], width)
    assert sorted(values[values != -7].tolist()) == sorted(np.concatenate(pieces).tolist())
    flat, positions, documents = values.ravel(), layout.positions(), layout.documents()
    for piece, start, last in zip(pieces, layout.starts_N, layout.lasts_N, strict=True):
        assert flat[start : last + 1].tolist() == piece.tolist()
        assert len(piece) == 0 or start // width == last // width
        assert positions.ravel()[start : last + 1].tolist() == list(range(len(piece)))
        assert len(set(documents.ravel()[start : last + 1].tolist())) <= 1
    assert ((documents == NO_DOCUMENT) == (values == -7)).all()
    assert (positions[values == -7] == 0).all()
    for row, own in zip(values, documents, strict=True):
        owners = [value // 100 for value in row.tolist() if value != -7]
        assert owners == sorted(owners), "examples of a row stand in their order"
        assert own[own != NO_DOCUMENT].tolist() == sorted(own[own != NO_DOCUMENT].tolist())
        assert len(set(owners)) == len(set(own[own != NO_DOCUMENT].tolist()))
        assert (np.diff((own == NO_DOCUMENT).astype(int)) >= 0).all(), "padding is at the end"


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=24))
def test_two_sides(sizes: list[tuple[int, int]]) -> None:
    sizes_N2 = np.array(sizes)
    widths = sizes_N2.max(0)
    rows = first_fit(sizes_N2, widths)
    assert sorted(number for row in rows for number in row) == list(range(len(sizes)))
    for row in rows:
        assert (sizes_N2[row].sum(0) <= widths).all()
    for one, row in enumerate(rows):
        for other, number in product(rows[:one], row):
            assert (sizes_N2[[*other, number]].sum(0) > widths).any(), "an earlier row has room for it"


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 60)), min_size=1, max_size=24))
def test_the_narrower_side_gives_way(sizes: list[tuple[int, int]]) -> None:
    """Every example once, neither side wider than the widest example, and never more columns than without it."""
    sizes_N2 = np.array(sizes)
    rows = fewest_columns(sizes_N2)
    assert sorted(number for row in rows for number in row) == list(range(len(sizes)))
    used = np.array([sizes_N2[row].sum(0) for row in rows]).max(0)
    assert used.max() == sizes_N2.max()
    strict = first_fit(sizes_N2, sizes_N2.max(0))
    assert len(rows) * used.sum() <= len(strict) * np.array([sizes_N2[row].sum(0) for row in strict]).max(0).sum()


def test_short_sources_fill_up_beside_targets_of_one_length() -> None:
    sizes_N2 = np.array([[40, 5], *[[10, 5]] * 8])
    assert len(first_fit(sizes_N2, sizes_N2.max(0))) == 9
    assert len(fewest_columns(sizes_N2)) == 3


@settings(derandomize=True, max_examples=100, deadline=None)
@given(SIZES)
def test_few_rows(lengths: list[int]) -> None:
    """All rows but one are more than half full, so there are less than twice as many as could do."""
    layout = lay_out(lengths)
    fewest = max(1, -(-sum(lengths) // layout.shape[1]))
    assert fewest <= layout.shape[0] <= 2 * fewest


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [([6, 3, 3, 2, 4], 3), ([8, 4, 4, 2, 2, 2, 2], 3), ([5], 1), ([5, 5, 5], 3), ([7, 1, 1, 1, 1, 1, 1, 1], 2)],
)
def test_known_cases(lengths: list[int], rows: int) -> None:
    assert lay_out(lengths).shape == (rows, max(lengths))
