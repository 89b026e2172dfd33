"""What every objective does with rows of ids: pad them, and tell their documents apart. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmkit.interfaces import NO_DOCUMENT

if TYPE_CHECKING:
    from torch import Tensor

Ids = NDArray[np.int64]


def pad_rows(rows: Sequence[Ids], width: int, pad_id: int) -> tuple[Ids, Ids]:
    """Rows side by side, filled up on the right, and their lengths: (B, width) and (B,)."""
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    for row, target in zip(rows, ids, strict=True):
        target[: len(row)] = row
    return ids, np.array([len(row) for row in rows], dtype=np.int64)


def document_columns(inputs_BT: Ids, real_BT: NDArray[np.bool_], eos_id: int) -> tuple[Ids, Ids]:
    """Positions and document ids, both BT: a document begins at the start of a row and after every ``eos_id``."""
    columns = np.arange(inputs_BT.shape[1])
    ends = (inputs_BT == eos_id) & real_BT
    starts = np.concatenate([np.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
    first_columns = np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    positions = np.where(real_BT, columns - first_columns, 0)
    return positions, np.where(real_BT, np.cumsum(starts, axis=1), NO_DOCUMENT)


def isolation(documents_BT: Ids) -> Tensor | None:
    """Document ids as a batch holds them: None when every row is one document without padding."""
    return to_tensor(documents_BT) if documents_BT.any() else None


def to_tensor(array: NDArray[np.integer]) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
