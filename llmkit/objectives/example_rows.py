"""Packed examples of one side, each with a question to answer: what encoders and classifying decoders read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmkit.interfaces import IGNORE_INDEX, Batch, Examples, Row, TokenIds
from llmkit.objectives.row_packing import Layout, lay_out
from llmkit.objectives.rows import Ids, isolation, to_tensor


def to_batch(rows: Sequence[Row], labels: Ids, ids: TokenIds, layout: Layout | None = None) -> Batch:
    """Rows of ids as packed documents; example n is row n. No token is a label.

    ``segment_ids`` are 1 from ``Answer.second`` on, and None where no row has a second segment.
    """
    layout = layout or lay_out([len(row.ids) for row in rows])
    has_second = any(_second(row) is not None for row in rows)
    return Batch(
        input_ids=to_tensor(layout.spread([row.ids for row in rows], ids.pad_id)),
        labels=to_tensor(np.full(layout.shape, IGNORE_INDEX)),
        position_ids=to_tensor(layout.positions()),
        document_ids=isolation(layout.documents()),
        n_targets=0,
        segment_ids=to_tensor(layout.spread([_segments(row) for row in rows], 0)) if has_second else None,
        examples=Examples(to_tensor(layout.starts_N), to_tensor(layout.lasts_N), to_tensor(labels)),
        n_examples=n_labelled(labels),
    )


def n_labelled(labels: Ids) -> int:
    """Examples whose answer is known."""
    return int((labels.reshape(len(labels), -1)[:, 0] != IGNORE_INDEX).sum())


def _second(row: Row) -> int | None:
    return None if row.answer is None else row.answer.second


def _segments(row: Row) -> Ids:
    second = _second(row)
    columns = np.arange(len(row.ids))
    return np.zeros_like(columns) if second is None else (columns >= second).astype(np.int64)
