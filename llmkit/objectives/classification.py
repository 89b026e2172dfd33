"""One label for an example, from the state of one of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmkit.interfaces import IGNORE_INDEX, Batch, Examples, Model, Row, TokenIds
from llmkit.objectives.example_rows import n_labelled, to_batch
from llmkit.objectives.places import states_at
from llmkit.objectives.row_choice import Choices, RowChoice, examples_of, head_logits
from llmkit.objectives.row_packing import first_fit
from llmkit.objectives.rows import Ids, to_tensor
from llmkit.objectives.source_target import to_batch as to_two_sides
from llmkit.objectives.supervised_seq2seq import side_by_side


@dataclass(frozen=True)
class Classification(RowChoice):
    """Cross entropy over ``Answer.label``.

    The head reads, of an encoder, the state of the first token (Devlin et al. 2019, section 4.1); of a decoder that of
    the last, the only one that has seen all (Radford et al. 2018, section 3.2); of an encoder-decoder that of the
    decoder's start, all that its decoder is given.
    """

    kind: str  # of the model

    @property
    def trains(self) -> tuple[str, ...]:
        return (self.kind,)

    @property
    def predicted_share(self) -> float:
        return 1.0 if self.kind == "encoder_decoder" else 0.0  # of one position a row there is nothing to spare

    def target_len(self, seq_len: int) -> int:
        return 1 if self.kind == "encoder_decoder" else 0

    def collate(self, rows: Sequence[Row], *, seq_len: int, ids: TokenIds) -> Batch:
        """Examples of at most ``seq_len`` ids to packed rows; those without a label can be read, not trained on."""
        labels_N = np.array([_label(row) for row in rows], dtype=np.int64)
        return _sources(rows, labels_N, ids) if self.kind == "encoder_decoder" else to_batch(rows, labels_N, ids)

    def choices(self, model: Model, batch: Batch) -> Choices:
        examples = examples_of(batch)
        places_N = examples.last_N if self.kind == "decoder" else examples.first_N
        return Choices(head_logits(model, states_at(model, batch, places_N)).unsqueeze(1), examples.labels.unsqueeze(1))


def _label(row: Row) -> int:
    return IGNORE_INDEX if row.answer is None or row.answer.label is None else row.answer.label


def _sources(rows: Sequence[Row], labels_N: Ids, ids: TokenIds) -> Batch:
    """Packed sources, and a decoder that reads one start for each."""
    lengths_N1 = np.array([[len(row.ids)] for row in rows], dtype=np.int64)
    packed = first_fit(lengths_N1, lengths_N1.max(0))
    start = np.array([ids.pad_id])
    batch = to_two_sides([side_by_side([(rows[n].ids, start) for n in row]) for row in packed], ids)
    places_N, width = np.zeros_like(labels_N), batch.input_ids.shape[1]
    for b, row in enumerate(packed):
        places_N[row] = b * width + np.arange(len(row))
    examples = Examples(to_tensor(places_N), to_tensor(places_N), to_tensor(labels_N))
    nothing = batch.labels.new_full(batch.labels.shape, IGNORE_INDEX)
    return replace(batch, labels=nothing, n_targets=0, examples=examples, n_examples=n_labelled(labels_N))
