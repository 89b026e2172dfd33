"""Rows of ids that a model reads on, one id a row at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from llmkit.interfaces import NO_DOCUMENT
from llmkit.seq2seq_generation import Conditioned


class LanguageModel(Protocol):
    """A decoder with a cache (``llmkit.models.decoder.Decoder``)."""

    @property
    def max_seq_len(self) -> int: ...
    def __call__(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        document_ids_BT: Tensor | None,
        cache: Any,
        /,
        *,
        last_only: bool,
    ) -> Tensor: ...
    def new_cache(self, batch_size: int, max_len: int) -> Any: ...
    def modules(self) -> Iterator[torch.nn.Module]: ...


class Steps:
    """Rows and what the model remembers of them. In turns: ``logits``, perhaps ``keep``, ``append``."""

    def __init__(
        self,
        model: LanguageModel,
        rows: Sequence[Sequence[int]],
        pad_id: int,
        *,
        n_more: int,
        use_cache: bool,
        device: torch.device | str,
    ) -> None:
        """At most ``n_more`` ids are appended to each row. Without a cache all of a row is read again each time."""
        self._model = model
        self._ids_BT, self._position_ids_BT, self._document_ids_BT = left_padded(rows, pad_id, device)
        width = self._ids_BT.shape[1] + n_more
        self._cache = model.new_cache(len(rows), width) if use_cache else None

    def logits(self) -> Tensor:
        """BV of the next id of every row, in fp32."""
        views = self._ids_BT, self._position_ids_BT, self._document_ids_BT
        return self._model(*views, self._cache, last_only=True)[:, -1].float()

    def keep(self, rows_B: Tensor) -> None:
        """Go on with these of the rows, in this order; one may be there several times."""
        if torch.equal(rows_B, torch.arange(len(self._ids_BT), device=rows_B.device)):
            return
        self._ids_BT, self._position_ids_BT = self._ids_BT[rows_B], self._position_ids_BT[rows_B]
        self._document_ids_BT = None if self._document_ids_BT is None else self._document_ids_BT[rows_B]
        if self._cache is not None:
            self._cache.keep(rows_B)
        if isinstance(self._model, Conditioned):
            self._model.keep(rows_B)

    def append(self, next_B: Tensor) -> None:
        """One more id in every row."""
        last = self._model.max_seq_len - 1  # rows that have come to it have ended, and wait for others
        position_B1 = (self._position_ids_BT[:, -1:] + 1).clamp(max=last)
        if self._cache is not None:
            self._ids_BT, self._position_ids_BT, self._document_ids_BT = next_B[:, None], position_B1, None
            return
        self._ids_BT = torch.cat((self._ids_BT, next_B[:, None]), dim=1)
        self._position_ids_BT = torch.cat((self._position_ids_BT, position_B1), dim=1)
        if self._document_ids_BT is not None:
            self._document_ids_BT = torch.nn.functional.pad(self._document_ids_BT, (0, 1))


def left_padded(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, positions and documents BT. Padding is on the left, so that every row's next token is in the same column."""
    width = max(map(len, rows))
    pads = [width - len(row) for row in rows]
    ids = torch.tensor([[pad_id] * n + list(row) for n, row in zip(pads, rows, strict=True)], device=device)
    columns = torch.arange(width, device=device) - torch.tensor(pads, device=device)[:, None]
    documents = torch.where(columns < 0, NO_DOCUMENT, 0)
    return ids, columns.clamp(min=0), documents if any(pads) else None


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
