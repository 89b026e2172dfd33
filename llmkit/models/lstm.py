"""The LSTM language model: token embedding, LSTM layers, attention over past states, output head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmkit.interfaces import NO_DOCUMENT, Batch
from llmkit.models.cache import dense_mask
from llmkit.models.layers import Embedding, Linear, check_length, compute_dtype
from llmkit.models.lstm_config import LSTMConfig
from llmkit.models.lstm_documents import State, StateCache, find_documents, whole_rows
from llmkit.models.lstm_layers import GlobalAttention, LSTMStack, init_lstm_weights


class LSTMCache(StateCache):
    """Also the memory that the next tokens attend to."""

    def __init__(self, like: State, n_rows: int, max_len: int) -> None:
        super().__init__(like, n_rows, max_len)
        self.memory_BSR = like.h.new_zeros(n_rows, max_len, like.h.shape[2])
        self.last_BR = torch.zeros_like(self.memory_BSR[:, 0])  # what the last layer gave for the last token

    def keep(self, rows_B: Tensor) -> None:
        """Go on with these of the rows, in this order; one may be there several times."""
        super().keep(rows_B)
        self.memory_BSR, self.last_BR = self.memory_BSR[rows_B], self.last_BR[rows_B]


class LSTMLanguageModel(nn.Module):
    """Parameters are uninitialised until ``init_weights`` or a checkpoint fills them.

    Dropout is on the embedding, between layers and on the output, never on what a layer hands on in time (Zaremba et
    al. 2014). With attention, position t attends to the states of its document before its own, s_0 = 0, s_1 ...
    s_(t-1), as in attentive language models (Daniluk et al. 2017, section 2; Salton et al. 2017, section 3), all of
    them or the last ``attention_window``; score and combination are Luong's.
    """

    logit_softcap: float | None = None  # these logits are never capped

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.config = config
        D, R = config.d_model, config.width
        self.embedding = Embedding(config.vocab_rows, D)
        self.lstm = LSTMStack(D, R, config.n_layers, config.dropout)
        self.attention = GlobalAttention(R, D) if config.attention else None
        self.projection = Linear(R, D, bias=False) if config.projected else None
        self.head = None if config.tie_embeddings else Linear(D, config.vocab_rows, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    @property
    def max_seq_len(self) -> int:
        return self.config.max_seq_len

    @property
    def output_weight_VD(self) -> Tensor:
        """The matrix that turns hidden states into logits: the embedding itself when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def output_bias_V(self) -> Tensor | None:
        return None

    def output_states(self, hidden_PD: Tensor) -> Tensor:
        """The hidden states themselves."""
        return hidden_PD

    def hidden_states(self, batch: Batch) -> Tensor:
        """BTD in the compute type."""
        return self._hidden(batch.input_ids, batch.document_ids, None)

    def forward(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: LSTMCache | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Logits BTV, or those of the last position alone (T = 1).

        An LSTM does not use positions; when they are left out, ``ConfigError`` is raised past ``max_seq_len``, as a
        decoder does. Without ``document_ids_BT`` every row is one document; tokens added to a cache without it belong
        to document 0.
        """
        if position_ids_BT is None:
            check_length(input_ids_BT.shape[1] + (0 if cache is None else cache.length), self.max_seq_len)
        hidden_BTD = self._hidden(input_ids_BT, document_ids_BT, cache)
        return nn.functional.linear(hidden_BTD[:, -1:] if last_only else hidden_BTD, self.output_weight_VD)

    def init_weights(self, seed: int) -> None:
        """See ``init_lstm_weights``."""
        init_lstm_weights(self, seed, self.config.init_range)

    def compile_blocks(self) -> None:
        """Compile the attention in place. The LSTM itself is one kernel of cuDNN or oneDNN and is not compiled."""
        if self.attention is not None:
            self.attention.compile()

    def set_activation_checkpointing(self, on: bool) -> None:
        """Keep only the input of each layer and compute the rest again in the backward pass."""
        self.lstm.recompute = on

    def new_cache(self, batch_size: int, max_len: int) -> LSTMCache:
        """An empty cache for ``max_len`` tokens a row, in the type and on the device of the weights."""
        zeros = self.embedding.weight.new_zeros(self.config.n_layers, 1, self.config.width)
        return LSTMCache(State(zeros, zeros), batch_size, max_len)

    def _hidden(self, input_ids_BT: Tensor, document_ids_BT: Tensor | None, cache: LSTMCache | None) -> Tensor:
        x_BTD = self.dropout(self.embedding(input_ids_BT))
        if cache is not None:
            return self._read_cached(x_BTD, document_ids_BT, cache)
        documents = None if document_ids_BT is None else find_documents(document_ids_BT)
        states_BTR, _ = self.lstm(x_BTD, documents)
        if self.attention is None:
            return self._project(states_BTR)
        mask = None if document_ids_BT is None else dense_mask(document_ids_BT, document_ids_BT)
        mask = self._windowed(mask, states_BTR, states_BTR.shape[1])
        memory_BTR = past_states(states_BTR, document_ids_BT)
        hidden_BTD: Tensor = self.dropout(self.attention(states_BTR, memory_BTR, mask, causal=True))
        return hidden_BTD

    def _project(self, states_BTR: Tensor) -> Tensor:
        """Without attention."""
        states_BTR = states_BTR.to(compute_dtype(states_BTR))
        hidden_BTD: Tensor = self.dropout(states_BTR if self.projection is None else self.projection(states_BTR))
        return hidden_BTD

    def _windowed(self, mask: Tensor | None, states_BTR: Tensor, S: int) -> Tensor | None:
        """The causal mask (None: no documents to tell apart) without what lies before the window."""
        T, window = states_BTR.shape[1], self.config.attention_window
        if window is None:
            return mask
        ones_TS = torch.ones(T, S, dtype=torch.bool, device=states_BTR.device)
        band_TS = ones_TS.tril(S - T) & ones_TS.triu(S - T - window + 1)
        return band_TS[None, None] if mask is None else mask & band_TS

    def _read_cached(self, x_BTD: Tensor, document_ids_BT: Tensor | None, cache: LSTMCache) -> Tensor:
        """Hidden states of the next tokens of every row, after those in the cache."""
        (B, T), begin = x_BTD.shape[:2], cache.length
        stop = begin + T
        mask = cache.mask_of(document_ids_BT, T)
        documents_BT, goes_on_B1 = cache.document_ids_BS[:, begin:stop], cache.goes_on()
        several = cache.isolated and T > 1
        documents = find_documents(documents_BT) if several else whole_rows(B, T)
        zeros_L1R = torch.zeros_like(cache.state_LBR.h)[:, :1]
        start = documents.carry_on(cache.state_LBR, goes_on_B1, State(zeros_L1R, zeros_L1R))
        states_BTR, final = self.lstm(x_BTD, documents if several else None, start)
        states_BTR = states_BTR.masked_fill((documents_BT == NO_DOCUMENT)[..., None], 0.0)
        last_BR, cache.last_BR = cache.last_BR, states_BTR[:, -1]
        cache.state_LBR, cache.length = documents.last_of_rows(final), stop
        if self.attention is None:
            return self._project(states_BTR)
        memory_BTR = past_states(states_BTR, documents_BT)
        memory_BTR[:, 0] = last_BR.masked_fill(~goes_on_B1, 0.0)
        cache.memory_BSR[:, begin:stop] = memory_BTR
        # Not through a compiled __call__: every length would be a new shape to compile for.
        memory_BSR = cache.memory_BSR[:, :stop]
        return self.attention.forward(states_BTR, memory_BSR, self._windowed(mask, states_BTR, stop), causal=True)


def past_states(states_BTR: Tensor, document_ids_BT: Tensor | None) -> Tensor:
    """Entry t is the state before token t: that of the token before it, or zero where its document begins.

    So the causal mask over the entries, entry t included, is attention to the past states alone, and no token is
    without one.
    """
    before_BTR = nn.functional.pad(states_BTR[:, :-1], (0, 0, 1, 0))
    if document_ids_BT is None:
        return before_BTR
    begins_BT = nn.functional.pad(document_ids_BT[:, 1:] != document_ids_BT[:, :-1], (1, 0), value=True)
    return before_BTR.masked_fill(begins_BT[..., None], 0.0)
