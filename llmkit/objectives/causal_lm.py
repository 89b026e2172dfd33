"""Causal language modelling: predict the next token of the same document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llmkit.interfaces import IGNORE_INDEX, Batch, Row, TokenIds
from llmkit.objectives.rows import document_columns, isolation, pad_rows, to_tensor
from llmkit.objectives.token_loss import TokenPrediction


@dataclass(frozen=True)
class CausalLM(TokenPrediction):
    """Next-token prediction."""

    trains: ClassVar[tuple[str, ...]] = ("decoder",)
    scores_all_text: ClassVar[bool] = True

    def window(self, seq_len: int) -> tuple[int, int]:
        """Rows overlap by one id: the last one of a row is a label only, and the first input of the next."""
        return seq_len, 1

    def collate(self, rows: Sequence[Row], *, seq_len: int, ids: TokenIds) -> Batch:
        """Windows of at most ``seq_len + 1`` ids to one batch of ``seq_len`` columns.

        Every id but the first is a label, except those that follow an end-of-text: they begin another document.
        """
        padded, lengths = pad_rows([row.ids for row in rows], seq_len + 1, ids.pad_id)
        real = np.arange(seq_len) < lengths[:, None] - 1  # the last id of a row is a label only
        inputs = np.where(real, padded[:, :-1], ids.pad_id)
        labels = np.where(real & (inputs != ids.eos_id), padded[:, 1:], IGNORE_INDEX)
        positions, documents = document_columns(inputs, real, ids.eos_id)
        return Batch(
            input_ids=to_tensor(inputs),
            labels=to_tensor(labels),
            position_ids=to_tensor(positions),
            document_ids=isolation(documents),
            n_targets=int((labels != IGNORE_INDEX).sum()),
        )
