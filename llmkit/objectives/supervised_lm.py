"""Answers written by a decoder: predict the tokens of the answer from the prompt before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llmkit.interfaces import IGNORE_INDEX, Batch, Row, TokenIds
from llmkit.objectives.row_packing import lay_out
from llmkit.objectives.rows import Ids, isolation, to_tensor
from llmkit.objectives.supervised_text import SupervisedText


@dataclass(frozen=True)
class SupervisedLM(SupervisedText):
    """Next-token prediction of the ids that ``Answer.trained`` names, for a decoder."""

    trains: ClassVar[tuple[str, ...]] = ("decoder",)

    def collate(self, rows: Sequence[Row], *, seq_len: int, ids: TokenIds) -> Batch:
        """Examples of at most ``seq_len + 1`` ids to packed rows; the last id of an example is a label only.

        The first id of an example has nothing before it, and is no label whatever ``trained`` says.
        """
        layout = lay_out([max(len(row.ids) - 1, 0) for row in rows])
        labels = layout.spread([_labels(row) for row in rows], IGNORE_INDEX)
        return Batch(
            input_ids=to_tensor(layout.spread([row.ids[:-1] for row in rows], ids.pad_id)),
            labels=to_tensor(labels),
            position_ids=to_tensor(layout.positions()),
            document_ids=isolation(layout.documents()),
            n_targets=int((labels != IGNORE_INDEX).sum()),
        )


def _labels(row: Row) -> Ids:
    assert row.answer is not None, "a task's row says what is predicted"
    assert row.answer.trained is not None
    return np.where(row.answer.trained[1:], row.ids[1:], IGNORE_INDEX)
