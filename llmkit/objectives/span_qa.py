"""The answer to a question as a span of its context: where it begins, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llmkit.interfaces import IGNORE_INDEX, Batch, Model, Row, TokenIds
from llmkit.objectives.example_rows import to_batch
from llmkit.objectives.row_choice import Choices, RowChoice, examples_of, head_logits
from llmkit.objectives.row_packing import lay_out


@dataclass(frozen=True)
class SpanQA(RowChoice):
    """The mean of two cross entropies over the tokens of an example: the span's first token, and its last.

    (Devlin et al. 2019, section 4.2.) No answer is the span of the example's first token alone (section 4.3).
    """

    trains: ClassVar[tuple[str, ...]] = ("encoder",)

    def collate(self, rows: Sequence[Row], *, seq_len: int, ids: TokenIds) -> Batch:
        """Examples of at most ``seq_len`` ids to packed rows; those without a span can be read, not trained on."""
        layout = lay_out([len(row.ids) for row in rows])
        spans_N2 = np.array([_span(row) for row in rows], dtype=np.int64)
        places_N2 = np.where(spans_N2 == IGNORE_INDEX, IGNORE_INDEX, layout.starts_N[:, None] + spans_N2)
        return to_batch(rows, places_N2, ids, layout)

    def choices(self, model: Model, batch: Batch) -> Choices:
        """The head speaks of every token; each example chooses among its own."""
        import torch

        examples = examples_of(batch)
        logits_P2 = head_logits(model, model.hidden_states(batch).flatten(0, 1))
        places_NT = examples.first_N[:, None] + torch.arange(batch.input_ids.shape[1], device=logits_P2.device)
        own_NT = places_NT <= examples.last_N[:, None]
        logits_NT2 = logits_P2[places_NT.where(own_NT, examples.first_N[:, None])]
        logits_N2T = logits_NT2.masked_fill(~own_NT[:, :, None], -float("inf")).transpose(1, 2)
        return Choices(logits_N2T, examples.labels - examples.first_N[:, None])


def _span(row: Row) -> tuple[int, int]:
    answer = row.answer
    return (IGNORE_INDEX, IGNORE_INDEX) if answer is None or answer.span is None else answer.span
