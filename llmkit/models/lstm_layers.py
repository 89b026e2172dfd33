"""LSTM layers over packed rows, and Luong's attention. Letters as in ``llmkit/interfaces.py``, and here

    R width of the LSTM states   E width of what a layer reads   N documents, in order of row and column

The state of an LSTM must begin anew with every document. Three ways give the same numbers:

* rows: every row is one document, and ``nn.LSTM`` runs on the rows as they are;
* packed: the documents become the sequences of a ``PackedSequence``. As many steps as the longest document has tokens,
  no step for padding. The way of cuDNN;
* stretches: the columns are cut where a document begins or ends; ``nn.LSTM`` runs on one stretch of all rows after the
  other, and the states of rows where a document begins are set in between. The way for a CPU, where ``nn.LSTM`` has a
  fast kernel (oneDNN) for rows and none for packed sequences.

Measured on one CPU core, forward and backward, 2 layers of width 256 on 16 rows of 256 tokens in documents of 200 on
average (seconds): rows without documents 0.39, stretches 0.52, packed 1.44, a loop over time steps 1.74. With documents
of 20 tokens, which cut 256 columns into 141: 0.43, 1.49, 0.96, 1.53. So short stretches are left to the packed way.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

from llmkit.models.attention import AttentionMask, attend
from llmkit.models.layers import Linear
from llmkit.models.lstm_documents import Documents, State

MIN_STRETCH = 3  # columns a stretch must have on average, or packing is faster


class LSTM(nn.LSTM):
    """One layer in one direction. Uninitialised: ``init_weights`` or a checkpoint gives the values."""

    def __init__(self, n_inputs: int, width: int) -> None:
        super().__init__(n_inputs, width, batch_first=True)

    def reset_parameters(self) -> None:
        """Nothing, at every size."""


class LSTMStack(nn.Module):
    """Layers in one direction, dropout between them. With ``recompute`` autograd keeps only the input of each layer."""

    def __init__(self, n_inputs: int, width: int, n_layers: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LSTM(width if i else n_inputs, width) for i in range(n_layers))
        self.dropout = nn.Dropout(dropout)
        self.recompute = False

    def forward(self, x_BTE: Tensor, documents: Documents | None, initial: State | None = None) -> tuple[Tensor, State]:
        """States BTR of the last layer and, LNR, the final ones of all layers; see ``run_lstm``."""
        ends = []
        for i, lstm in enumerate(self.layers):
            x_BTE = self.dropout(x_BTE) if i else x_BTE
            start = None if initial is None else State(initial.h[i], initial.c[i])
            x_BTE, end = _maybe_again(self.recompute, lstm, x_BTE, documents, start)
            ends.append(end)
        return x_BTE, State(*map(torch.stack, zip(*ends, strict=True)))


class BidirectionalStack(nn.Module):
    """Layers of two LSTMs of half the width, one in each direction, their states side by side."""

    def __init__(self, n_inputs: int, width: int, n_layers: int, dropout: float) -> None:
        super().__init__()
        self.onward, self.back = (
            nn.ModuleList(LSTM(width if i else n_inputs, width // 2) for i in range(n_layers)) for _ in range(2)
        )
        self.dropout = nn.Dropout(dropout)
        self.recompute = False

    def forward(self, x_BTE: Tensor, documents: Documents | None) -> tuple[Tensor, State]:
        """States BTR of the last layer and, LNR, the final ones of all layers and both directions, side by side."""
        ends, mirrored = [], None if documents is None else documents.mirrored
        for i, (onward, back) in enumerate(zip(self.onward, self.back, strict=True)):
            x_BTE = self.dropout(x_BTE) if i else x_BTE
            there_BTR, last = _maybe_again(self.recompute, onward, x_BTE, documents, None)
            back_BTR, first = _maybe_again(self.recompute, back, x_BTE.flip(1), mirrored, None)
            x_BTE = torch.cat((there_BTR, back_BTR.flip(1)), dim=-1)
            ends.append(torch.cat((torch.stack(last), torch.stack(first)), dim=-1))
        h_LNR, c_LNR = torch.stack(ends, dim=1)
        return x_BTE, State(h_LNR, c_LNR)


def _maybe_again(
    recompute: bool, lstm: nn.Module, x_BTE: Tensor, documents: Documents | None, initial: State | None
) -> tuple[Tensor, State]:
    """``run_lstm``, done again in the backward pass if so asked."""
    if not recompute or not torch.is_grad_enabled():
        return run_lstm(lstm, x_BTE, documents, initial)
    result: tuple[Tensor, State] = checkpoint(run_lstm, lstm, x_BTE, documents, initial, use_reentrant=False)
    return result


def run_lstm(
    lstm: nn.Module, x_BTE: Tensor, documents: Documents | None, initial: State | None
) -> tuple[Tensor, State]:
    """States BTR, zero at padding, and NR, the final state of each document.

    ``documents`` is None when every row is one document; then N = B. ``initial`` is zero when left out. On a CPU the
    layer computes in the type of its weights whatever autocast says: a state carried over many steps gains by it, and
    oneDNN has no bf16 LSTM on a processor without bf16 units.
    """
    on_cpu = x_BTE.device.type == "cpu"
    with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
        x_BTE = x_BTE.to(next(lstm.parameters()).dtype) if on_cpu else x_BTE
        if documents is None:
            y_BTR, (h_1NR, c_1NR) = lstm(x_BTE, None if initial is None else (initial.h[None], initial.c[None]))
            return y_BTR, State(h_1NR[0], c_1NR[0])
        if documents.n_documents == 0 or (on_cpu and (len(documents.cuts) - 1) * MIN_STRETCH <= documents.n_columns):
            return _run_stretches(lstm, x_BTE, documents, initial)
        return _run_packed(lstm, x_BTE, documents, initial)


def _run_packed(lstm: nn.Module, x_BTE: Tensor, documents: Documents, initial: State | None) -> tuple[Tensor, State]:
    packing, device = documents.packing, x_BTE.device
    places_P, rank_N = packing.places_P.to(device), packing.rank_N.to(device)
    start = None
    if initial is not None:
        by_length_N = packing.by_length_N.to(device)
        start = initial.h[None, by_length_N], initial.c[None, by_length_N]
    y, (h_1NR, c_1NR) = lstm(PackedSequence(x_BTE.flatten(0, 1)[places_P], packing.batch_sizes), start)
    y_PR = y.data.new_zeros(documents.n_rows * documents.n_columns, y.data.shape[1]).index_copy(0, places_P, y.data)
    y_BTR = y_PR.unflatten(0, (documents.n_rows, documents.n_columns))
    return y_BTR, State(h_1NR[0, rank_N], c_1NR[0, rank_N])


def _run_stretches(lstm: nn.Module, x_BTE: Tensor, documents: Documents, initial: State | None) -> tuple[Tensor, State]:
    device, width = x_BTE.device, lstm.get_parameter("weight_hh_l0").shape[1]
    h_BR = c_BR = x_BTE.new_zeros(documents.n_rows, width)
    parts, cells = [], []
    for start, stop in pairwise(documents.cuts):
        begun_M = (documents.starts_N == start).nonzero().flatten()
        rows_M, begun_M = documents.rows_N[begun_M].to(device), begun_M.to(device)
        if initial is None:
            h_BR, c_BR = h_BR.index_fill(0, rows_M, 0.0), c_BR.index_fill(0, rows_M, 0.0)
        else:
            h_BR, c_BR = h_BR.index_copy(0, rows_M, initial.h[begun_M]), c_BR.index_copy(0, rows_M, initial.c[begun_M])
        y_BTR, (h_1BR, c_1BR) = lstm(x_BTE[:, start:stop], (h_BR[None], c_BR[None]))
        h_BR, c_BR = h_1BR[0], c_1BR[0]
        parts.append(y_BTR)
        cells.append(c_BR)
    y_BTR = torch.cat(parts, dim=1).masked_fill(documents.padding_BT1.to(device), 0.0)
    stretch_N = torch.searchsorted(torch.tensor(documents.cuts), documents.stops_N) - 1  # its end is the document's
    rows_N = documents.rows_N.to(device)
    h_NR = y_BTR[rows_N, (documents.stops_N - 1).to(device)]
    return y_BTR, State(h_NR, torch.stack(cells)[stretch_N.to(device), rows_N])


class GlobalAttention(nn.Module):
    """Global attention with the score "general" (Luong et al. 2015, section 3.1):

    ``score(h, m) = h^T W m``, ``c`` the mean of the memory weighted by the softmax of the scores, ``tanh(W [c; h])``.
    """

    def __init__(self, width: int, d_model: int) -> None:
        super().__init__()
        self.score = Linear(width, width, bias=False)
        self.combine = Linear(2 * width, d_model, bias=False)

    def forward(
        self,
        states_BTR: Tensor,
        memory_BSR: Tensor,
        mask: AttentionMask,
        blind_BT1: Tensor | None = None,
        *,
        causal: bool,
    ) -> Tensor:
        """BTD in the compute type. ``blind_BT1`` is true where there is no memory to see and ``c`` is zero."""
        query_BTR = self.score(states_BTR)
        states_BTR, memory_BSR = states_BTR.to(query_BTR.dtype), memory_BSR.to(query_BTR.dtype)
        memory_B1SR = memory_BSR[:, None]
        context_BTR = attend(query_BTR[:, None], memory_B1SR, memory_B1SR, mask, causal=causal, scale=1.0)[:, 0]
        if blind_BT1 is not None:
            context_BTR = context_BTR.masked_fill(blind_BT1, 0.0)
        combined_BTD: Tensor = self.combine(torch.cat((context_BTR, states_BTR), dim=-1))
        return combined_BTD.tanh()


@torch.no_grad()
def init_lstm_weights(model: nn.Module, seed: int, init_range: float) -> None:
    """Embedding and head uniform within ``init_range`` (Zaremba et al. 2014, section 4.1). For the rest the usual
    choice: matrices uniform after Glorot and Bengio 2010, recurrent ones orthogonal (Saxe et al. 2014), gate by gate;
    biases zero, but those of the forget gates one (Jozefowicz et al. 2015).

    Drawn on the CPU in the order of the parameters, so that a seed gives the same weights on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        value = torch.zeros(parameter.shape)
        gates = value.chunk(4)  # torch's order: input, forget, cell, output
        if name in ("embedding.weight", "head.weight"):
            value.uniform_(-init_range, init_range, generator=generator)
        elif name.endswith("bias_ih_l0"):
            gates[1].fill_(1.0)  # the other bias of the gate, which is added to it, stays zero
        elif name.endswith("weight_hh_l0"):
            for matrix in gates:
                nn.init.orthogonal_(matrix, generator=generator)
        elif value.dim() == 2:
            for matrix in gates if name.endswith("weight_ih_l0") else (value,):
                nn.init.xavier_uniform_(matrix, generator=generator)
        parameter.copy_(value)
