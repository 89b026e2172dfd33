"""The key/value cache of a decoder, and the boolean form of its attention rule."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_mask(
    query_document_ids_BT: Tensor, key_document_ids_BS: Tensor, *, causal: bool = True, window: int | None = None
) -> Tensor:
    """B1TS: true where a query sees a key of its document. Causal: the queries are the last T of the S tokens.

    With a ``window``, which is for causal masks, a token sees itself and the ``window - 1`` tokens before it.
    """
    same_BTS = query_document_ids_BT[:, :, None] == key_document_ids_BS[:, None, :]
    if causal:
        T, S = query_document_ids_BT.shape[1], key_document_ids_BS.shape[1]
        seen_TS = torch.ones(T, S, dtype=torch.bool, device=same_BTS.device).tril(S - T)
        same_BTS &= seen_TS if window is None else seen_TS.triu(S - T - window + 1)
    return same_BTS[:, None]


def source_mask(
    document_ids_BT: Tensor | None, source_ids_BS: Tensor | None, input_ids_BT: Tensor, n_source: int
) -> tuple[Tensor | None, Tensor | None]:
    """What target tokens see of the source, B1TS, and which of them see nothing, B1T1; those may look anywhere, so
    that their softmax is not empty, and what they find is to be zeroed. Without document ids all is document 0."""
    if document_ids_BT is None and source_ids_BS is None:
        return None, None
    if document_ids_BT is None:
        document_ids_BT = torch.zeros_like(input_ids_BT)
    if source_ids_BS is None:
        source_ids_BS = document_ids_BT.new_zeros(document_ids_BT.shape[0], n_source)
    seen_B1TS = dense_mask(document_ids_BT, source_ids_BS, causal=False)
    blind_B1T1 = ~seen_B1TS.any(-1, keepdim=True)
    return seen_B1TS | blind_B1T1, blind_B1T1


class LayerCache:
    """Keys and values of one layer, allocated once: B, G, max_len, K. ``window``: tokens the layer's queries see."""

    def __init__(self, k_BGSK: Tensor, v_BGSK: Tensor, window: int | None = None) -> None:
        self.k_BGSK, self.v_BGSK, self.window = k_BGSK, v_BGSK, window

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Store the new keys and values at ``start``; returns all up to their end that one of the new tokens sees."""
        first, stop = first_seen(start, self.window), start + k_BGTK.shape[2]
        self.k_BGSK[:, :, start:stop] = k_BGTK
        self.v_BGSK[:, :, start:stop] = v_BGTK
        return self.k_BGSK[:, :, first:stop], self.v_BGSK[:, :, first:stop]

    def keep(self, rows_B: Tensor) -> None:
        """Go on with these of the rows, in this order; one may be there several times."""
        self.k_BGSK, self.v_BGSK = self.k_BGSK[rows_B], self.v_BGSK[rows_B]


def first_seen(start: int, window: int | None) -> int:
    """The first place in the cache that the token at ``start`` sees."""
    return 0 if window is None else max(0, start - window + 1)


class KVCache:
    """What the decoder remembers of the tokens it has read: ``length`` of at most ``max_len`` per row."""

    def __init__(self, layers: list[LayerCache], document_ids_BS: Tensor) -> None:
        self.layers, self.document_ids_BS, self.length = layers, document_ids_BS, 0
        self.isolated = False  # true once a call gave document ids, e.g. for left padding

    @property
    def max_len(self) -> int:
        return self.document_ids_BS.shape[1]

    def keep(self, rows_B: Tensor) -> None:
        """Go on with these of the rows, in this order; one may be there several times."""
        for layer in self.layers:
            layer.keep(rows_B)
        self.document_ids_BS = self.document_ids_BS[rows_B]

    def mask_of(self, document_ids_BT: Tensor | None, n_tokens: int, window: int | None = None) -> Tensor | None:
        """Note the documents of the next ``n_tokens`` (0 when None); their mask over what ``LayerCache`` gives them.

        None where plain causal attention is the same: the first tokens, or a single one, of one document.
        """
        first, stop = first_seen(self.length, window), self.length + n_tokens
        if document_ids_BT is not None:
            self.isolated = True
            self.document_ids_BS[:, self.length : stop] = document_ids_BT
        fits = window is None or n_tokens <= window
        if not self.isolated and (n_tokens == 1 or (self.length == 0 and fits)):
            return None
        documents_BS = self.document_ids_BS[:, first:stop]
        return dense_mask(documents_BS[:, self.length - first :], documents_BS, window=window)
