"""Causal language modelling: predict the next token of the same document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmkit.interfaces import IGNORE_INDEX, NO_DOCUMENT, Batch, LossSum, Model
from llmkit.objectives.chunks import auto_chunk_size

if TYPE_CHECKING:
    from torch import Tensor

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction with optional label smoothing and z-loss (formulas in ``linear_cross_entropy.py``)."""

    label_smoothing: float
    z_loss: float
    chunk_size: int | None

    def problems(self) -> list[tuple[str, str]]:
        found = []
        if not 0 <= self.label_smoothing < 1:
            found.append(("label_smoothing", "must be in [0, 1)"))
        if not self.z_loss >= 0:
            found.append(("z_loss", "must be at least 0"))
        if self.chunk_size is not None and self.chunk_size < 1:
            found.append(("chunk_size", "must be null or at least 1"))
        return found

    def logit_rows(self, n_rows: int, vocab_size: int) -> int:
        """Of ``n_rows`` tokens, those whose logits are held at once; null chunks as on a GPU, which takes most."""
        return min(n_rows, self.chunk_size or auto_chunk_size(vocab_size, "cuda"))

    def collate(self, rows: Sequence[Ids], *, seq_len: int, eos_id: int, pad_id: int) -> Batch:
        """Windows of at most ``seq_len + 1`` ids to one batch of ``seq_len`` columns.

        Every id but the first is a label, except those that follow an ``eos_id``: they begin another document.
        """
        ids, lengths = _pad(rows, seq_len + 1, pad_id)
        columns = np.arange(seq_len)
        real = columns < lengths[:, None] - 1  # the last id of a row is a label only
        inputs = np.where(real, ids[:, :-1], pad_id)
        ends = (inputs == eos_id) & real
        labels = np.where(real & ~ends, ids[:, 1:], IGNORE_INDEX)
        starts = np.concatenate([np.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)  # a document begins after an eos
        first_columns = np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
        positions = np.where(real, columns - first_columns, 0)
        documents = np.where(real, np.cumsum(starts, axis=1), NO_DOCUMENT)
        return Batch(
            input_ids=_tensor(inputs),
            labels=_tensor(labels),
            position_ids=_tensor(positions),
            document_ids=_tensor(documents) if documents.any() else None,
            n_targets=int((labels != IGNORE_INDEX).sum()),
        )

    def loss(self, model: Model, batch: Batch) -> LossSum:
        """Summed over the targets of the batch; ``sums`` has ``nll``, and ``z_loss`` when it is on."""
        from llmkit.objectives.linear_cross_entropy import linear_cross_entropy

        parts = linear_cross_entropy(
            model.hidden_states(batch).flatten(0, 1),
            model.output_weight_VD,
            batch.labels.flatten(),
            n_targets=batch.n_targets,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            chunk_size=self.chunk_size,
        )
        sums = {"nll": parts.nll, "z_loss": parts.z_loss} if self.z_loss else {"nll": parts.nll}
        return LossSum(parts.loss, sums)


def _pad(rows: Sequence[Ids], width: int, pad_id: int) -> tuple[Ids, Ids]:
    """Rows side by side, filled up on the right, and their lengths."""
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    for row, target in zip(rows, ids, strict=True):
        target[: len(row)] = row
    return ids, np.array([len(row) for row in rows], dtype=np.int64)


def _tensor(array: NDArray[np.integer]) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
