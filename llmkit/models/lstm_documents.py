"""Where the documents of packed rows lie, and what a recurrent layer needs to keep them apart.

Letters as in ``llmkit/interfaces.py``; N counts documents, in order of row and column.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from llmkit.interfaces import NO_DOCUMENT
from llmkit.models.cache import KVCache


class State(NamedTuple):
    """Hidden and cell state of an LSTM, of the same shape."""

    h: Tensor
    c: Tensor


class Packing(NamedTuple):
    """The order of a ``PackedSequence``: tokens by their step, documents with equal steps by length, longest first."""

    places_P: Tensor  # in B*T flattened
    batch_sizes: Tensor
    by_length_N: Tensor  # the documents, longest first
    rank_N: Tensor  # its inverse


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a batch. All tensors are on the CPU; padding belongs to none."""

    n_rows: int
    n_columns: int
    ids_N: Tensor
    rows_N: Tensor
    starts_N: Tensor
    lengths_N: Tensor

    @property
    def n_documents(self) -> int:
        return len(self.ids_N)

    @property
    def stops_N(self) -> Tensor:
        return self.starts_N + self.lengths_N

    @cached_property
    def mirrored(self) -> Documents:
        """The same documents, in the same order, with the columns read from right to left."""
        starts_N = self.n_columns - self.stops_N
        return Documents(self.n_rows, self.n_columns, self.ids_N, self.rows_N, starts_N, self.lengths_N)

    @cached_property
    def packing(self) -> Packing:
        by_length_N = self.lengths_N.argsort(descending=True, stable=True)
        rank_N = torch.empty_like(by_length_N).index_copy_(0, by_length_N, torch.arange(self.n_documents))
        document_P = torch.repeat_interleave(torch.arange(self.n_documents), self.lengths_N)
        step_P = torch.arange(len(document_P)) - (self.lengths_N.cumsum(0) - self.lengths_N)[document_P]
        place_P = (self.rows_N * self.n_columns + self.starts_N)[document_P] + step_P
        order_P = (step_P * self.n_documents + rank_N[document_P]).argsort()
        return Packing(place_P[order_P], torch.bincount(step_P), by_length_N, rank_N)

    @cached_property
    def padding_BT1(self) -> Tensor:
        """True where there is no document."""
        change_BT = torch.zeros(self.n_rows, self.n_columns + 1, dtype=torch.int64)
        change_BT.index_put_((self.rows_N, self.starts_N), torch.tensor(1), accumulate=True)
        change_BT.index_put_((self.rows_N, self.stops_N), torch.tensor(-1), accumulate=True)
        return (change_BT.cumsum(1)[:, :-1] == 0)[..., None]

    @cached_property
    def cuts(self) -> list[int]:
        """Columns at which a document begins or ends, with both ends of the rows."""
        return sorted({0, self.n_columns, *self.starts_N.tolist(), *self.stops_N.tolist()})

    def carry_on(self, rows: State, goes_on_B1: Tensor, fresh: State) -> State:
        """LNR: the state with which each document begins. It is its row's (``rows``, LBR) where the row's first column
        ``goes_on`` with the document before it, else ``fresh`` (LNR)."""
        device = goes_on_B1.device
        rows_N = self.rows_N.to(device)
        goes_on_N1 = goes_on_B1[rows_N] & (self.starts_N == 0).to(device)[:, None]
        h_LNR, c_LNR = (
            torch.where(goes_on_N1, old[:, rows_N], new.to(old.dtype)) for old, new in zip(rows, fresh, strict=True)
        )
        return State(h_LNR, c_LNR)

    def last_of_rows(self, final: State) -> State:
        """LBR: the final state (LNR) of the document in each row's last column; zero where that is padding."""
        device = final.h.device
        last_M = (self.stops_N == self.n_columns).nonzero().flatten()
        rows_M, last_M = self.rows_N[last_M].to(device), last_M.to(device)
        h_LBR, c_LBR = (
            part.new_zeros(part.shape[0], self.n_rows, part.shape[2]).index_copy(1, rows_M, part[:, last_M])
            for part in final
        )
        return State(h_LBR, c_LBR)


class StateCache(KVCache):
    """The LSTM's states after the last token of every row, and the document it belongs to."""

    def __init__(self, like: State, n_rows: int, max_len: int) -> None:
        """States of the depth, width, type and device of ``like`` (L.R)."""
        L, _, R = like.h.shape
        super().__init__([], torch.zeros(n_rows, max_len, dtype=torch.int64, device=like.h.device))
        self.state_LBR = State(like.h.new_zeros(L, n_rows, R), like.c.new_zeros(L, n_rows, R))

    def keep(self, rows_B: Tensor) -> None:
        """Go on with these of the rows, in this order; one may be there several times."""
        super().keep(rows_B)
        self.state_LBR = State(self.state_LBR.h[:, rows_B], self.state_LBR.c[:, rows_B])

    def goes_on(self) -> Tensor:
        """B1: whether the next token, its document already noted, goes on with the document before it."""
        first_B1 = self.document_ids_BS[:, self.length : self.length + 1]
        if self.length == 0:
            return torch.zeros_like(first_B1, dtype=torch.bool)
        return first_B1 == self.document_ids_BS[:, self.length - 1 : self.length]


def find_documents(document_ids_BT: Tensor) -> Documents:
    """Runs of equal ids in a row, padding left out. One device synchronisation."""
    ids_BT = document_ids_BT.cpu()
    B, T = ids_BT.shape
    begins_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    begins_BT[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
    places_N = begins_BT.flatten().nonzero().flatten()
    lengths_N = places_N.diff(append=torch.tensor([B * T]))
    ids_N = ids_BT.flatten()[places_N]
    real_N = ids_N != NO_DOCUMENT
    ids_N, places_N, lengths_N = ids_N[real_N], places_N[real_N], lengths_N[real_N]
    return Documents(B, T, ids_N, places_N // T, places_N % T, lengths_N)


def whole_rows(n_rows: int, n_columns: int) -> Documents:
    """Every row one document with the id 0."""
    zeros_N = torch.zeros(n_rows, dtype=torch.int64)
    return Documents(n_rows, n_columns, zeros_N, torch.arange(n_rows), zeros_N, torch.full((n_rows,), n_columns))
