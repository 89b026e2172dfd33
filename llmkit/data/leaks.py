"""Finds validation text that also stands in the training text.

Text is compared by windows of 32 bytes. A window counts when a hash of its first 8 bytes falls in the lowest
sixteenth, so the same text gives the same windows wherever it stands. A validation document of which at least 80 % of
the windows occur in the training text is a near-duplicate. Fewer than 8 windows (about 160 bytes) say nothing: such
documents are only compared as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

WINDOW_BYTES = 32
MIN_WINDOWS = 8
NEAR_FRACTION = 0.8
_MAX_WINDOWS = 1 << 21  # bounds memory; beyond it only every second, fourth ... window is kept
_SEPARATOR = b"\0" * (WINDOW_BYTES // 4)  # no document holds U+0000, so no window of one document spans it
_BELOW = np.uint64(1 << 60)  # a sixteenth of all 64-bit numbers
_BLOCK_BYTES = 1 << 15  # temporary arrays stay in the processor's cache
# Odd constants; the products of 64-bit words with them are Fibonacci hashes (Knuth, TAOCP 3, 6.4).
_ODD = [np.uint64(odd) for odd in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)]
_SHIFT = np.uint64(32)


def sampled_windows(texts: Sequence[bytes]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """(index of the text, hash) of every sampled window."""
    joined = _SEPARATOR.join(texts)
    n_windows = len(joined) - WINDOW_BYTES + 1
    if n_windows < 1:
        return np.empty(0, np.int64), np.empty(0, np.uint64)
    words = np.ndarray((len(joined) - 7,), "<u8", buffer=joined, strides=(1,))  # the 8 bytes at every offset
    blocks = range(0, n_windows, _BLOCK_BYTES)
    at = np.concatenate(
        [np.flatnonzero(words[b : min(b + _BLOCK_BYTES, n_windows)] * _ODD[0] < _BELOW) + b for b in blocks]
    )
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    starts = np.concatenate([[0], np.cumsum(lengths + len(_SEPARATOR))[:-1]])
    owner = np.searchsorted(starts, at, side="right") - 1
    inside = at + WINDOW_BYTES <= starts[owner] + lengths[owner]
    return owner[inside], _hash(words, at[inside])


def _hash(words: NDArray[np.uint64], at: NDArray[np.int64]) -> NDArray[np.uint64]:
    mixed = np.zeros(at.size, np.uint64)
    for step, odd in enumerate(_ODD):
        mixed = (mixed ^ words[at + 8 * step]) * odd
        mixed ^= mixed >> _SHIFT
    return mixed


@dataclass
class ValidationWindows:
    """Windows of the validation documents, collected in one pass and looked up in the next."""

    n_documents: int = 0
    thinning: int = 0  # windows whose hash has this many low bits 0 are kept
    owners: list[NDArray[np.int64]] = field(default_factory=list)
    hashes: list[NDArray[np.uint64]] = field(default_factory=list)

    def add(self, texts: Sequence[bytes]) -> None:
        """Append documents."""
        owner, hashes = sampled_windows(texts)
        self.merge(ValidationWindows(len(texts), 0, [owner], [hashes]))

    def merge(self, other: ValidationWindows) -> None:
        """Append the documents of ``other`` after the ones held."""
        self.owners += [owner + self.n_documents for owner in other.owners]
        self.hashes += other.hashes
        self.n_documents += other.n_documents
        self._thin(max(self.thinning, other.thinning))
        while sum(map(len, self.hashes)) > _MAX_WINDOWS:
            self._thin(self.thinning + 1)

    def _thin(self, bits: int) -> None:
        if bits == 0:
            return
        kept = [thin(part, bits) for part in self.hashes]
        self.owners = [part[keep] for part, keep in zip(self.owners, kept, strict=True)]
        self.hashes = [part[keep] for part, keep in zip(self.hashes, kept, strict=True)]
        self.thinning = bits

    def table(self) -> NDArray[np.uint64]:
        """The distinct windows, sorted."""
        return np.unique(np.concatenate([np.empty(0, np.uint64), *self.hashes]))

    def near_duplicates(self, seen: NDArray[np.bool_]) -> tuple[int, int]:
        """(near-duplicates, documents long enough to tell); ``seen`` marks the rows of ``table`` found in training
        text.
        """
        if not self.hashes or not self.n_documents:
            return 0, 0
        owner, hashes = np.concatenate(self.owners), np.concatenate(self.hashes)
        hit = seen[np.searchsorted(self.table(), hashes)] if hashes.size else np.empty(0, bool)
        total = np.bincount(owner, minlength=self.n_documents)
        found = np.bincount(owner[hit], minlength=self.n_documents)
        long_enough = total >= MIN_WINDOWS
        return int((long_enough & (found >= NEAR_FRACTION * total)).sum()), int(long_enough.sum())


def thin(hashes: NDArray[np.uint64], bits: int) -> NDArray[np.bool_]:
    """Which hashes stay when every ``2 ** bits``-th is kept."""
    return np.asarray(hashes & np.uint64((1 << bits) - 1) == 0)


@dataclass
class WindowIndex:
    """Which windows of a validation set occur in some text: the side of the worker processes."""

    table: NDArray[np.uint64]  # sorted

    @classmethod
    def load(cls, path: Path) -> WindowIndex:
        """From the saved ``ValidationWindows.table()``."""
        return cls(np.load(path))

    def found_in(self, texts: Sequence[bytes]) -> NDArray[np.int64]:
        """Rows of ``table`` that occur in ``texts``, each once."""
        if not self.table.size:
            return np.empty(0, np.int64)
        _, hashes = sampled_windows(texts)
        rows = np.minimum(np.searchsorted(self.table, hashes), self.table.size - 1)
        return np.unique(rows[self.table[rows] == hashes])
