"""Whole examples side by side in few rows, each a document of its own. Numpy only.

A micro-batch is a fixed number of examples. Its rows are as wide as its longest example, and the short ones share what
is left, so that little is padded and no sum changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llmkit.interfaces import NO_DOCUMENT
from llmkit.objectives.rows import Ids


def first_fit(sizes_NK: Ids, widths_K: Ids) -> list[list[int]]:
    """The examples of each row: of K sides, none holds more than its width.

    First-fit decreasing (Johnson et al. 1974), by the side of an example that fills its row most: the largest first,
    each into the first row that has room. Within a row examples stand in their order. No example is larger than a row.
    """
    order = np.argsort(-(sizes_NK / np.maximum(widths_K, 1)).max(1), kind="stable")
    room = np.tile(widths_K, (len(sizes_NK), 1))
    rows: list[list[int]] = []
    for number in order.tolist():
        size_K = sizes_NK[number]
        fits = (room[: len(rows)] >= size_K).all(1)
        row = int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        room[row] -= size_K
    return [sorted(row) for row in rows]


def fewest_columns(sizes_N2: Ids) -> list[list[int]]:
    """The examples of each row, for two sides of which one is often much shorter.

    Its width is the longest example's, or more where that takes fewer columns in all: a row of short sources would
    otherwise be full of them before it is full of targets, or the other way round. It never exceeds the wider side's.
    """
    longest_2 = sizes_N2.max(0)
    narrow, width = int(longest_2.argmin()), int(longest_2.min())
    best = first_fit(sizes_N2, longest_2)
    while width < longest_2.max():
        width = min(2 * max(width, 1), int(longest_2.max()))
        widths_2 = longest_2.copy()
        widths_2[narrow] = width
        best = min(best, first_fit(sizes_N2, widths_2), key=lambda rows: _n_columns(rows, sizes_N2))
    return best


def _n_columns(rows: list[list[int]], sizes_N2: Ids) -> int:
    """Of both sides, each as wide as its longest row."""
    return len(rows) * int(np.array([sizes_N2[row].sum(0) for row in rows]).max(0).sum())


@dataclass(frozen=True)
class Layout:
    """Where the columns of N examples stand in a batch of one side."""

    lengths_N: Ids
    starts_N: Ids  # place of each example's first column, in B*T flattened
    ranks_N: Ids  # how many examples stand before it in its row
    shape: tuple[int, int]  # B, T

    @property
    def lasts_N(self) -> Ids:
        """Place of each example's last column."""
        return self.starts_N + self.lengths_N - 1

    def spread(self, pieces: Sequence[Ids], empty: int) -> Ids:
        """BT: one value for each column of each example, ``empty`` elsewhere."""
        return self._filled(np.concatenate(pieces), empty)

    def positions(self) -> Ids:
        """BT: columns since the example began; 0 at padding."""
        return self._filled(self._counted, 0)

    def documents(self) -> Ids:
        """BT: the number of the example in its row; ``NO_DOCUMENT`` at padding."""
        return self._filled(np.repeat(self.ranks_N, self.lengths_N), NO_DOCUMENT)

    @cached_property
    def _counted(self) -> Ids:
        """P, the columns of all examples one after another: how many of its example stand before it."""
        before_N = np.cumsum(self.lengths_N) - self.lengths_N
        return np.arange(self.lengths_N.sum()) - np.repeat(before_N, self.lengths_N)

    def _filled(self, values_P: Ids, empty: int) -> Ids:
        filled = np.full(self.shape[0] * self.shape[1], empty, dtype=np.int64)
        filled[np.repeat(self.starts_N, self.lengths_N) + self._counted] = values_P
        return filled.reshape(self.shape)


def lay_out(lengths: Sequence[int]) -> Layout:
    """Examples of these lengths in as few rows as first-fit finds, as wide as the longest (one column at least)."""
    lengths_N = np.array(lengths, dtype=np.int64)
    width = max(1, int(lengths_N.max(initial=0)))
    rows = first_fit(lengths_N[:, None], np.array([width]))
    starts_N, ranks_N = np.zeros_like(lengths_N), np.zeros_like(lengths_N)
    for b, row in enumerate(rows):
        ends = np.cumsum(lengths_N[row])
        starts_N[row] = b * width + ends - lengths_N[row]
        ranks_N[row] = np.arange(len(row))
    return Layout(lengths_N, starts_N, ranks_N, (len(rows), width))
