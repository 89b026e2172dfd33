"""The LSTM encoder-decoder: bidirectional encoder, decoder that begins with the encoder's last states, attention.

Luong et al. 2015, global attention with the score "general", without input feeding: the attended state is not an input
of the next step, so that the decoder's LSTM runs over all steps at once in training. Rows hold several documents on
both sides; a target token sees the source tokens of its own document.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from llmkit.errors import ConfigError
from llmkit.interfaces import Batch, Tokens
from llmkit.models.cache import source_mask
from llmkit.models.layers import Embedding, Linear, check_length
from llmkit.models.lstm_documents import Documents, State, StateCache, find_documents, whole_rows
from llmkit.models.lstm_layers import BidirectionalStack, GlobalAttention, LSTMStack, init_lstm_weights
from llmkit.models.lstm_seq2seq_config import LSTMSeq2SeqConfig


class LSTMMemory(NamedTuple):
    """What the encoder made of the source."""

    states_BSR: Tensor
    document_ids_BS: Tensor | None
    documents: Documents
    final: State  # LNR, of each document and layer

    def of_rows(self, rows_B: Tensor) -> LSTMMemory:
        """That of these rows, in this order, of sources that are one document a row."""
        states_BSR, final = self.states_BSR[rows_B], State(self.final.h[:, rows_B], self.final.c[:, rows_B])
        ids_BS = None if self.document_ids_BS is None else self.document_ids_BS[rows_B]
        documents = whole_rows(*states_BSR.shape[:2]) if ids_BS is None else find_documents(ids_BS)
        return LSTMMemory(states_BSR, ids_BS, documents, final)


class LSTMSeq2Seq(nn.Module):
    """Parameters are uninitialised until ``init_weights`` or a checkpoint fills them.

    Each direction of the encoder has half the decoder's width, and as many layers: layer l of the decoder begins with
    the final states of layer l of the encoder, both directions side by side, as they are.
    """

    logit_softcap: float | None = None  # these logits are never capped

    def __init__(self, config: LSTMSeq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        D, R, L = config.d_model, config.width, config.n_layers
        self.embedding = Embedding(config.vocab_rows, D)
        self.encoder = BidirectionalStack(D, R, L, config.dropout)
        self.decoder = LSTMStack(D, R, L, config.dropout)
        self.attention = GlobalAttention(R, D)
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
        """BTD of the decoder, in the compute type. Raises ``ConfigError`` for a batch without a source."""
        if batch.source is None:
            raise ConfigError(
                "the objective gives an encoder-decoder nothing to read",
                where="objective",
                fix="choose an objective with a source and a target, such as span corruption",
            )
        return self._decode(self.encode(batch.source), batch.input_ids, batch.document_ids, None)

    def forward(
        self,
        source: Tokens,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits BTV of the target."""
        return self.decode(self.encode(source), input_ids_BT, position_ids_BT, document_ids_BT)

    def encode(self, source: Tokens) -> LSTMMemory:
        """Without document ids every row is one document."""
        ids_BS = source.document_ids
        x_BSD = self.dropout(self.embedding(source.input_ids))
        found = None if ids_BS is None else find_documents(ids_BS)
        states_BSR, final = self.encoder(x_BSD, found)
        return LSTMMemory(states_BSR, ids_BS, found or whole_rows(*source.input_ids.shape), final)

    def decode(
        self,
        memory: LSTMMemory,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: StateCache | None = None,
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
        hidden_BTD = self._decode(memory, input_ids_BT, document_ids_BT, cache)
        return nn.functional.linear(hidden_BTD[:, -1:] if last_only else hidden_BTD, self.output_weight_VD)

    def new_cache(self, memory: LSTMMemory, max_len: int) -> StateCache:
        """An empty cache for ``max_len`` target tokens a row."""
        return StateCache(memory.final, memory.states_BSR.shape[0], max_len)

    def init_weights(self, seed: int) -> None:
        """See ``init_lstm_weights``."""
        init_lstm_weights(self, seed, self.config.init_range)

    def compile_blocks(self) -> None:
        """Compile the attention in place. The LSTMs are kernels of cuDNN or oneDNN and are not compiled."""
        self.attention.compile()

    def set_activation_checkpointing(self, on: bool) -> None:
        """Keep only the input of each layer and compute the rest again in the backward pass."""
        self.encoder.recompute = self.decoder.recompute = on

    def _decode(
        self,
        memory: LSTMMemory,
        input_ids_BT: Tensor,
        document_ids_BT: Tensor | None,
        cache: StateCache | None,
    ) -> Tensor:
        x_BTD = self.dropout(self.embedding(input_ids_BT))
        if cache is None:
            found = None if document_ids_BT is None else find_documents(document_ids_BT)
            start = first_states(memory, found or whole_rows(*input_ids_BT.shape))
            states_BTR, _ = self.decoder(x_BTD, found, start)
        else:
            states_BTR, document_ids_BT = self._read_cached(memory, x_BTD, document_ids_BT, cache)
        n_source = memory.states_BSR.shape[1]
        mask, blind_B1T1 = source_mask(document_ids_BT, memory.document_ids_BS, input_ids_BT, n_source)
        blind_BT1 = None if blind_B1T1 is None else blind_B1T1[:, 0]
        # A compiled __call__ would compile for every length of a source that is generated from.
        attend = self.attention if cache is None else self.attention.forward
        hidden_BTD: Tensor = self.dropout(attend(states_BTR, memory.states_BSR, mask, blind_BT1, causal=False))
        return hidden_BTD

    def _read_cached(
        self, memory: LSTMMemory, x_BTD: Tensor, document_ids_BT: Tensor | None, cache: StateCache
    ) -> tuple[Tensor, Tensor | None]:
        """States of the next tokens of every row, after those in the cache, and their documents."""
        (B, T), begin = x_BTD.shape[:2], cache.length
        cache.mask_of(document_ids_BT, T)  # notes the documents; the attention is to the source
        documents_BT = cache.document_ids_BS[:, begin : begin + T] if cache.isolated else None
        found = None if documents_BT is None else find_documents(documents_BT)
        documents = found or whole_rows(B, T)
        start = documents.carry_on(cache.state_LBR, cache.goes_on(), first_states(memory, documents))
        states_BTR, final = self.decoder(x_BTD, found, start)
        cache.state_LBR, cache.length = documents.last_of_rows(final), begin + T
        return states_BTR, documents_BT


def first_states(memory: LSTMMemory, documents: Documents) -> State:
    """LNR: the final states of the source documents of the same rows and ids; zero where there is no such source."""
    source = memory.documents
    same_NM = (documents.rows_N[:, None] == source.rows_N) & (documents.ids_N[:, None] == source.ids_N)
    index_N = nn.functional.pad(same_NM.int(), (0, 1), value=1).argmax(1).to(memory.final.h.device)
    h_LNR, c_LNR = (nn.functional.pad(part, (0, 0, 0, 1))[:, index_N] for part in memory.final)
    return State(h_LNR, c_LNR)
