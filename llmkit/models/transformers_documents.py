"""Packed rows taken apart for modules that know no documents: one document a row, padded on the right.

Letters as in ``llmkit/interfaces.py``; N documents of a batch, M those of one part of it, which are read together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmkit.models.lstm_documents import Documents, find_documents, whole_rows


class Part(NamedTuple):
    """Documents of similar length as rows of their own."""

    ids_MT: Tensor
    mask_MT: Tensor | None  # 1 where there is a token; None when all are
    places_P: Tensor  # of the tokens in B*T flattened, row by row

    def tokens(self, states_MTD: Tensor) -> Tensor:
        """PD: the states at the tokens, in the order of ``places_P``."""
        flat_PD = states_MTD.flatten(0, 1)
        return flat_PD if self.mask_MT is None else flat_PD[self.mask_MT.flatten().bool()]


def documents_in(ids_BT: Tensor, document_ids_BT: Tensor | None) -> Documents:
    """Without document ids every row is one document with the id 0."""
    return whole_rows(*ids_BT.shape) if document_ids_BT is None else find_documents(document_ids_BT)


def by_length(lengths: Sequence[int], *, exact: bool) -> list[list[int]]:
    """Which documents are read together: those within a power of two, so that less than half of a part is padding, or
    of one length only."""
    groups: dict[int, list[int]] = defaultdict(list)
    for number, length in enumerate(lengths):
        groups[length if exact else (length - 1).bit_length()].append(number)
    return [groups[key] for key in sorted(groups)]


def part_of(ids_BT: Tensor, documents: Documents, numbers: Sequence[int], pad_id: int) -> Part:
    """The documents ``numbers`` of a batch."""
    chosen_M = torch.tensor(numbers)
    lengths_M = documents.lengths_N[chosen_M]
    starts_M = (documents.rows_N * documents.n_columns + documents.starts_N)[chosen_M]
    columns_T = torch.arange(int(lengths_M.max()))
    real_MT = columns_T < lengths_M[:, None]
    places_MT = torch.where(real_MT, starts_M[:, None] + columns_T, 0).to(ids_BT.device)
    ids_MT = ids_BT.flatten()[places_MT]
    if bool(real_MT.all()):
        return Part(ids_MT, None, places_MT.flatten())
    real_MT = real_MT.to(ids_BT.device)
    return Part(ids_MT.masked_fill(~real_MT, pad_id), real_MT.long(), places_MT[real_MT])


def parts_of(ids_BT: Tensor, documents: Documents, pad_id: int, *, exact: bool) -> Iterator[Part]:
    """All documents of a batch; padding is in none."""
    for numbers in by_length(documents.lengths_N.tolist(), exact=exact):
        yield part_of(ids_BT, documents, numbers, pad_id)


def put_back(parts: Sequence[tuple[Tensor, Tensor]], like_BT: Tensor) -> Tensor:
    """BTD from (places, states) of the parts; zeros at padding."""
    states_PD = torch.cat([states for _, states in parts])
    places_P = torch.cat([places for places, _ in parts])
    flat_PD = states_PD.new_zeros(like_BT.numel(), states_PD.shape[1]).index_copy(0, places_P, states_PD)
    return flat_PD.view(*like_BT.shape, -1)
