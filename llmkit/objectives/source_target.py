"""What objectives of encoder-decoders share: packed rows of two sides as a batch, and the loss over the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkit.interfaces import IGNORE_INDEX, NO_DOCUMENT, Batch, TokenIds, Tokens
from llmkit.objectives.rows import Ids, pad_rows, to_tensor
from llmkit.objectives.token_loss import TokenPrediction


class Sides(NamedTuple):
    """One row: what the encoder reads, what the decoder has to say, and the document each id belongs to.

    Documents are numbered upwards in the order of the text; both sides call a document by the same number.
    """

    source: Ids
    source_documents: Ids
    target: Ids
    target_documents: Ids


@dataclass(frozen=True)
class SourceTarget(TokenPrediction):
    """The loss over the target tokens of an encoder-decoder."""

    trains: ClassVar[tuple[str, ...]] = ("encoder_decoder",)


def documents_of(ids_T: Ids, eos_id: int) -> Ids:
    """The number of each id's document: one begins with the row and after every ``eos_id``."""
    return np.cumsum(np.concatenate([[False], ids_T == eos_id])[: len(ids_T)])


def to_batch(rows: Sequence[Sides], ids: TokenIds) -> Batch:
    """Rows padded to the longest on each side.

    The decoder reads, for each document, the pad id as start and then the target but for its last id, as in T5. Both
    sides have document ids, or neither where every row is one document without padding on either side.
    """
    source_width = max(1, *(len(row.source) for row in rows))
    target_width = max(1, *(len(row.target) for row in rows))
    source, _ = pad_rows([row.source for row in rows], source_width, ids.pad_id)
    target, _ = pad_rows([row.target for row in rows], target_width, ids.pad_id)
    source_documents, _ = pad_rows([row.source_documents for row in rows], source_width, NO_DOCUMENT)
    target_documents, _ = pad_rows([row.target_documents for row in rows], target_width, NO_DOCUMENT)
    before = np.roll(target, 1, axis=1)
    inputs = np.where(_starts(target_documents) | (target_documents == NO_DOCUMENT), ids.pad_id, before)
    packed = bool(source_documents.any() or target_documents.any())
    return Batch(
        input_ids=to_tensor(inputs),
        labels=to_tensor(np.where(target_documents == NO_DOCUMENT, IGNORE_INDEX, target)),
        position_ids=to_tensor(_positions(target_documents)),
        document_ids=to_tensor(target_documents) if packed else None,
        n_targets=sum(len(row.target) for row in rows),
        source=Tokens(
            input_ids=to_tensor(source),
            position_ids=to_tensor(_positions(source_documents)),
            document_ids=to_tensor(source_documents) if packed else None,
        ),
    )


def _starts(documents_BT: Ids) -> NDArray[np.bool_]:
    """Columns whose document is another than that of the column before."""
    starts_BT = np.ones(documents_BT.shape, bool)
    starts_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return starts_BT


def _positions(documents_BT: Ids) -> Ids:
    """Columns since the document began; 0 at padding."""
    columns = np.arange(documents_BT.shape[1])
    first_columns = np.maximum.accumulate(np.where(_starts(documents_BT), columns, 0), axis=1)
    return np.where(documents_BT == NO_DOCUMENT, 0, columns - first_columns)
