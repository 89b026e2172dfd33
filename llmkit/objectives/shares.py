"""Whole numbers that add up: a total split over parts, and random choices within parts. Numpy only."""

from __future__ import annotations

import numpy as np

from llmkit.objectives.rows import Ids


def shares(total: int, weights_K: Ids, offset: int) -> Ids:
    """``total`` split over K parts in proportion to their weights, each share rounded up or down.

    ``offset`` in 0 .. sum of the weights - 1 says which are rounded up; where it is drawn evenly, every share is exact
    on average (systematic sampling).
    """
    return differences((np.cumsum(weights_K) * total + offset) // weights_K.sum())


def differences(sums_K: Ids) -> Ids:
    """The counts of which ``sums_K`` are the running sums."""
    counts = sums_K.copy()
    counts[1:] -= sums_K[:-1]
    return counts


def settle(counts_K: Ids, total: int, low_K: Ids, high_K: Ids) -> Ids:
    """Counts within their bounds that add up to ``total``, as far as the bounds let them.

    What the bounds took or added is shared out by the room that is left.
    """
    counts = np.clip(counts_K, low_K, high_K)
    missing = total - int(counts.sum())
    room = high_K - counts if missing > 0 else counts - low_K
    step = min(abs(missing), int(room.sum()))
    if step == 0:
        return counts
    return counts + (1 if missing > 0 else -1) * shares(step, room, 0)


def choose(sizes_K: Ids, counts_K: Ids, rng: np.random.Generator) -> tuple[Ids, Ids]:
    """Of the ``sizes_K[k]`` places of each part ``counts_K[k]``, every choice equally likely.

    Returns the chosen places in order, counted through all parts, and the part of each.
    """
    part = np.repeat(np.arange(len(sizes_K)), sizes_K)
    shuffled = np.lexsort((rng.random(len(part)), part))
    rank = np.arange(len(part)) - (np.cumsum(sizes_K) - sizes_K)[part]
    chosen = np.sort(shuffled[rank < counts_K[part]])
    return chosen, part[chosen]
