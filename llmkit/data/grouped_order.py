"""Rows of like length next to each other, so that a batch of them has little padding and short rows of attention."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from llmkit.data.sampler import SampleOrder, permute, stream_keys

BUNDLE = 64  # positions whose rows are of like length; a micro-batch that divides it never holds rows of two
POOL = 64 * BUNDLE  # positions whose rows are sorted together
_BUNDLES = -3  # stream of keys


class GroupedOrder(SampleOrder):
    """The order of ``SampleOrder``, in which the rows of every ``POOL`` positions of an epoch change places.

    They are sorted by their longer side, then by the other, cut into bundles, and the bundles are shuffled. So every
    row comes once an epoch still, and a position says which: neither batch size nor number of processes plays a part.
    """

    def __init__(self, sizes: tuple[int, ...], seed: int, lengths: NDArray[np.int64]) -> None:
        """``lengths``: N x sides, of the rows of all sources in their order."""
        super().__init__(sizes, None, seed)
        if len(lengths) != self.n_samples:
            raise ValueError(f"{len(lengths)} lengths for {self.n_samples} rows")
        self._by_length = np.empty(self.n_samples, np.int64)  # place of each row among all, from short to long
        self._by_length[np.lexsort((lengths.min(1), lengths.max(1)))] = np.arange(self.n_samples)
        self._pool = lru_cache(maxsize=2)(self._sorted_pool)

    def _draw(self, position: int) -> tuple[int, int]:
        epoch = position // self.n_samples
        start = max(epoch * self.n_samples, position // POOL * POOL)
        stop = min((epoch + 1) * self.n_samples, (position // POOL + 1) * POOL)
        return epoch, int(self._pool(start, stop)[position - start])

    def _sorted_pool(self, start: int, stop: int) -> NDArray[np.int64]:
        """The rows at these positions, which are of one epoch."""
        drawn = np.array([super(GroupedOrder, self)._draw(position)[1] for position in range(start, stop)])
        rows = drawn[np.argsort(self._by_length[drawn])]
        first = -start % BUNDLE  # positions before the first whole bundle: at the beginning of an epoch only
        n_whole = max(0, stop - start - first) // BUNDLE
        whole = rows[first : first + n_whole * BUNDLE].reshape(n_whole, BUNDLE)
        keys = stream_keys(self.seed, start, _BUNDLES)
        shuffled = whole[[permute(place, n_whole, keys) for place in range(n_whole)]]
        return np.concatenate([rows[:first], shuffled.ravel(), rows[first + n_whole * BUNDLE :]])
