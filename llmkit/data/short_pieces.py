"""Lengths of the pieces into which rows cut a text: from them follows how many pieces an objective cannot use."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from llmkit.data.token_shards import WindowDataset

MOST_TOKENS = 1 << 28  # are looked at: a few seconds
_BLOCK_TOKENS = 1 << 20


class Pieces(NamedTuple):
    """Documents, or the part of one that stands in a row: how many ids each has, and how many of them are text."""

    n_ids_K: NDArray[np.int64]  # begin and end of the document included
    n_text_K: NDArray[np.int64]


def pieces_of(dataset: WindowDataset, n_parts: int) -> Iterator[Pieces]:
    """The pieces of the rows in the first ``MOST_TOKENS``, many rows at a time.

    A row is read in ``n_parts`` equal parts, which cut documents as its edges do. Rows must not overlap.
    """
    shards, stride = dataset.shards, dataset.stride
    n_tokens = min(shards.n_tokens, max(1, MOST_TOKENS // stride) * stride)
    block = max(1, _BLOCK_TOKENS // stride) * stride
    for start in range(0, n_tokens, block):
        ids = shards.window(start, min(start + block, n_tokens))
        rows = np.arange(0, ids.size, stride)
        lengths = np.minimum(stride, ids.size - rows)
        begins = np.ones(ids.size + 1, bool)  # a piece, at each place
        np.equal(ids[:-1], shards.eos_id, out=begins[1:-1])
        for part in range(n_parts):
            begins[rows + lengths * part // n_parts] = True
        bounds = np.flatnonzero(begins)
        n_ids = np.diff(bounds)
        n_special = (ids[bounds[1:] - 1] == shards.eos_id).astype(np.int64)
        if shards.bos_id is not None:
            n_special += ids[bounds[:-1]] == shards.bos_id
        yield Pieces(n_ids, n_ids - n_special)
