"""Which documents are repeats, and which are validation data: decided from 64-bit hashes of the documents alone.

So the same document always falls on the same side, whatever its file, its place and the number of processes. A text
that was cut into sections can be kept together: then the hash of its first section decides for all of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import DataError

_FEW = 10  # documents
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


def n_shared(val: NDArray[np.uint64], train: NDArray[np.uint64], of_train: NDArray[np.bool_] | None = None) -> int:
    """How many documents of ``val`` also stand in ``train``, or in those of ``train`` that ``of_train`` marks."""
    seen = np.zeros(val.size, bool)
    for start in range(0, train.size, _BLOCK):
        block = train[start : start + _BLOCK]
        seen |= np.isin(val, block if of_train is None else block[of_train[start : start + _BLOCK]])
    return int(seen.sum())


def text_keys(
    hashes: NDArray[np.uint64], cut: NDArray[np.bool_], before: np.uint64 | None = None
) -> NDArray[np.uint64]:
    """For every document the hash of the first section of its text, which decides where the text goes.

    ``cut`` marks documents that go on in the next one; ``before`` is the key of a text that the first one goes on with.
    """
    begins = np.concatenate([[True], ~cut[:-1]])[: hashes.size]
    keys = hashes[np.maximum.accumulate(np.where(begins, np.arange(hashes.size), 0))]
    if before is not None:
        begins[:1] = False
        keys[: begins.argmax() if begins.any() else keys.size] = before
    return keys


ValRule = int | NDArray[np.uint64] | None  # hashes below this number; these hashes; every document


def belongs_to_val(hashes: NDArray[np.uint64], rule: ValRule) -> NDArray[np.bool_]:
    """Which documents are validation data."""
    if rule is None:
        return np.ones(hashes.size, bool)
    if isinstance(rule, int):
        return np.asarray(hashes < np.uint64(rule))
    return np.isin(hashes, rule)


def wanted_bound(val_fraction: float) -> int:
    """The rule for a corpus of many documents: it stays the same when the corpus grows."""
    return int(val_fraction * 2**64)


def choose_rule(
    hashes: NDArray[np.uint64], lengths: NDArray[np.uint64], val_fraction: float, n_texts: int | None = None
) -> ValRule:
    """The rule for this corpus; ``lengths`` are the documents' bytes. Raises DataError when it cannot be split.

    With ``text_keys`` for hashes, ``n_texts`` says of how many texts the documents are.

    A bound on the hash gives about ``val_fraction`` of many documents, but anything of a few: none, or the one that is
    half of the text. Where it is expected to catch fewer than ten documents they are chosen by size.
    """
    if val_fraction == 0:
        return 0
    low, high = int(hashes.min()), int(hashes.max())
    if low == high:
        raise DataError(
            f"{hashes.size} document(s) with the same text cannot be split into training and validation data",
            where="data.val_fraction",
            fix="set data.val_path to held-out text, or data.val_fraction=0 to train without, or a smaller "
            "data.max_document_bytes to cut the document into sections",
        )
    if (n_texts or hashes.size) * val_fraction < _FEW:
        return _few(hashes, lengths, val_fraction)
    return min(max(wanted_bound(val_fraction), low + 1), high)


def _few(hashes: NDArray[np.uint64], lengths: NDArray[np.uint64], val_fraction: float) -> NDArray[np.uint64]:
    """In the order of hashes, the documents that together fit in ``val_fraction`` of the bytes; else the nearest."""
    distinct, place = np.unique(hashes, return_inverse=True)
    sizes = np.bincount(place, weights=lengths)
    target = val_fraction * sizes.sum()
    chosen, left = [], target
    for number, size in enumerate(sizes):
        if size <= left:
            chosen.append(number)
            left -= size
    return distinct[chosen or [int(np.abs(sizes - target).argmin())]]
