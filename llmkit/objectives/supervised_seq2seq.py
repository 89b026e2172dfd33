"""Answers written by an encoder-decoder: predict the target from a source of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llmkit.interfaces import Batch, Row, TokenIds
from llmkit.objectives.row_packing import fewest_columns
from llmkit.objectives.rows import Ids
from llmkit.objectives.source_target import Sides, to_batch
from llmkit.objectives.supervised_text import SupervisedText


@dataclass(frozen=True)
class SupervisedSeq2Seq(SupervisedText):
    """The loss over ``Answer.target``, for an encoder-decoder that reads the ids of the row."""

    trains: ClassVar[tuple[str, ...]] = ("encoder_decoder",)

    def target_len(self, seq_len: int) -> int:
        return seq_len

    def collate(self, rows: Sequence[Row], *, seq_len: int, ids: TokenIds) -> Batch:
        """Examples of at most ``seq_len`` ids on each side to packed rows; no target sees another's source."""
        sides = [(row.ids, _target(row)) for row in rows]
        sizes_N2 = np.array([[len(source), len(target)] for source, target in sides], dtype=np.int64)
        return to_batch([side_by_side([sides[number] for number in row]) for row in fewest_columns(sizes_N2)], ids)


def _target(row: Row) -> Ids:
    assert row.answer is not None, "a task's row says what is predicted"
    assert row.answer.target is not None
    return row.answer.target


def side_by_side(examples: Sequence[tuple[Ids, Ids]]) -> Sides:
    """One row of (source, target) pairs, numbered in their order."""
    sources, targets = zip(*examples, strict=True)
    numbers = [np.repeat(np.arange(len(ids)), [len(piece) for piece in ids]) for ids in (sources, targets)]
    return Sides(np.concatenate(sources), numbers[0], np.concatenate(targets), numbers[1])
