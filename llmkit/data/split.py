"""Which documents are repeats, and which are validation data: decided from 64-bit hashes of the documents alone.

So the same document always falls on the same side, whatever its file, its place and the number of processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llmkit.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK = 1 << 22  # hashes held at once, in a few copies: about 100 MB


def repeated(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """True where an earlier document has the same hash. Works through ranges of hash values, one block at a time."""
    out = np.zeros(hashes.size, bool)
    n_ranges = max(1, -(-2 * hashes.size // _BLOCK))
    width = -(-(1 << 64) // n_ranges)
    for number in range(n_ranges):
        places = _places_between(hashes, number * width, min((number + 1) * width, 1 << 64) - 1)
        _, first = np.unique(hashes[places], return_index=True)
        out[places] = True
        out[places[first]] = False
    return out


def _places_between(hashes: NDArray[np.uint64], low: int, high: int) -> NDArray[np.int64]:
    found = [np.empty(0, np.int64)]
    for start in range(0, hashes.size, _BLOCK):
        block = hashes[start : start + _BLOCK]
        found.append(np.flatnonzero((block >= np.uint64(low)) & (block <= np.uint64(high))) + start)
    return np.concatenate(found)


def n_shared(val: NDArray[np.uint64], train: NDArray[np.uint64]) -> int:
    """How many documents of ``val`` also stand in ``train``."""
    seen = np.zeros(val.size, bool)
    for start in range(0, train.size, _BLOCK):
        seen |= np.isin(val, train[start : start + _BLOCK])
    return int(seen.sum())


def wanted_bound(val_fraction: float) -> int:
    """Documents with a hash below this number are validation data."""
    return int(val_fraction * 2**64)


def choose_bound(hashes: NDArray[np.uint64], val_fraction: float) -> int:
    """``wanted_bound``, moved just far enough that each side has a document. Raises DataError when that cannot be."""
    if val_fraction == 0:
        return 0
    low, high = int(hashes.min()), int(hashes.max())
    if low == high:
        raise DataError(
            f"{hashes.size} document(s), all the same, cannot be split into training and validation data"
            if hashes.size > 1
            else "1 document cannot be split into training and validation data",
            where="data.val_fraction",
            fix="set data.val_path to held-out text, or data.val_fraction=0 to train without validation, or a smaller "
            "data.max_document_bytes to cut the document into sections",
        )
    return min(max(wanted_bound(val_fraction), low + 1), high)
