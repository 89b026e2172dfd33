"""The encoder: embeddings and their norm, blocks that see both sides, and the heads of masked LM and sentence pairs.

Who may see whom: a token sees every token of its own document; in a local layer only those within its window, measured
in columns. Padding is a document of its own (``NO_DOCUMENT``), so that no row of the softmax is empty and nothing real
ever sees padding. The masks are dense, B1TT in the compute type, made once per forward pass: a square of the sequence
length, small beside the logits at lengths encoders are trained with. A row of one document needs none in global layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmkit.errors import ConfigError
from llmkit.interfaces import Batch
from llmkit.models.attention import attend
from llmkit.models.cache import dense_mask
from llmkit.models.encoder_config import EncoderConfig
from llmkit.models.layers import (
    PLAIN,
    Embedding,
    FeedForward,
    LayerNorm,
    Linear,
    Rotation,
    at,
    compute_dtype,
    init_normal,
    next_positions,
    residual_std,
    rotate,
    rotation,
)


class View(NamedTuple):
    """What the layers of one kind, global or local, see of the batch."""

    rotation: Rotation | None
    mask: Tensor | None  # B1TT or 11TT, 0 where seen and -inf elsewhere; None when everything is seen


class EncoderAttention(nn.Module):
    """Self-attention over both sides (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        D, bias = config.d_model, config.attention_bias
        self.width, self.dropout = config.head_width, config.dropout
        self.q, self.k, self.v, self.o = (Linear(D, D, bias=bias) for _ in range(4))

    def forward(self, x_BTD: Tensor, view: View, places_P: Tensor | None = None) -> Tensor:
        """BTD, or PD of the places alone."""
        q_BTHK, k_BTHK, v_BTHK = (self._heads(linear(x_BTD)) for linear in (self.q, self.k, self.v))
        if view.rotation is not None:
            q_BTHK, k_BTHK = rotate(q_BTHK, view.rotation), rotate(k_BTHK, view.rotation)
        q_BHTK, k_BHTK, v_BHTK = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
        dropout = self.dropout if self.training else 0.0
        mixed_BHTK = attend(q_BHTK, k_BHTK, v_BHTK, view.mask, dropout, causal=False)
        out_BTD: Tensor = self.o(at(mixed_BHTK.transpose(1, 2).flatten(2), places_P))
        return out_BTD

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.width)


class EncoderBlock(nn.Module):
    """Attention and feed-forward, each added to the residual stream.

    post: the norm of the sum, as in BERT. pre: the sum with what comes of the norm, as in ModernBERT, whose first block
    has no norm before its attention, since the embeddings have just had theirs.
    """

    def __init__(self, config: EncoderConfig, *, first: bool) -> None:
        super().__init__()
        self.post = config.norm_position == "post"
        has_norm = not first or config.norms_first_block
        self.attention_norm = layer_norm(config, keep_type=self.post) if has_norm else None
        self.attention = EncoderAttention(config)
        self.mlp_norm = layer_norm(config, keep_type=self.post)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, view: View, places_P: Tensor | None = None) -> Tensor:
        """The stream goes in and out in its own type; matrices get it in the compute type, cast once.

        With ``places_P`` only these positions come out, PD: the others are read, and nothing more is made of them.
        """
        if self.post and self.attention_norm is not None:
            attended_BTD = self.attention(_for_matrices(x_BTD), view, places_P)
            x_BTD = self.attention_norm(at(x_BTD, places_P) + self.dropout(attended_BTD))
            y_BTD: Tensor = self.mlp_norm(x_BTD + self.dropout(self.mlp(_for_matrices(x_BTD))))
            return y_BTD
        before_BTD = _for_matrices(x_BTD) if self.attention_norm is None else self.attention_norm(x_BTD)
        x_BTD = at(x_BTD, places_P) + self.dropout(self.attention(before_BTD, view, places_P))
        added_BTD: Tensor = self.dropout(self.mlp(self.mlp_norm(x_BTD)))
        return x_BTD + added_BTD


class Transform(nn.Module):
    """Between the hidden states and the output matrix: dense, activation, norm (Devlin et al. 2019, published code)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = config.embedding_width
        self.dense = Linear(config.d_model, width, bias=config.transform_bias)
        self.norm = layer_norm(config, keep_type=False, width=width)
        self.activation = PLAIN[config.transform_function]

    def forward(self, hidden_PD: Tensor) -> Tensor:
        states_PE: Tensor = self.norm(self.activation(self.dense(hidden_PD)))
        return states_PE


class Encoder(nn.Module):
    """An encoder with its pretraining heads, its parameters uninitialised until ``init_weights`` or a checkpoint.

    With ``share_layers`` there is one block, used ``n_layers`` times (ALBERT, Lan et al. 2020, section 3.1). Embeddings
    of another width E than the blocks' (ELECTRA, Clark et al. 2020, appendix A) go through a dense layer first.
    """

    logit_softcap: float | None = None  # these logits are never capped

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        D, E, rows = config.d_model, config.embedding_width, config.vocab_rows
        self.embedding = Embedding(rows, E)
        self.position_embedding = Embedding(config.max_seq_len, E) if config.position == "learned" else None
        self.segment_embedding = Embedding(config.n_segments, E) if config.n_segments else None
        self.embedding_norm = layer_norm(config, keep_type=True, width=E)
        self.embedding_projection = Linear(E, D) if config.projected else None
        self.blocks = nn.ModuleList(EncoderBlock(config, first=i == 0) for i in range(config.n_blocks))
        self.norm = layer_norm(config, keep_type=False) if config.norm_position == "pre" else None
        self.transform = Transform(config)
        self.head = None if config.tie_embeddings else Linear(E, rows, bias=False)
        self.output_bias = nn.Parameter(torch.empty(rows)) if config.head_bias else None
        self.pooler = Linear(D, D) if config.pooler else None
        self.pair_head = Linear(D, 2) if config.pooler else None
        self.dropout = nn.Dropout(config.dropout)

    @property
    def max_seq_len(self) -> int:
        return self.config.max_seq_len

    @property
    def output_weight_VD(self) -> Tensor:
        """The matrix that turns output states into logits: the embedding itself when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def output_bias_V(self) -> Tensor | None:
        """Added to the logits; None when the architecture has none."""
        return self.output_bias

    def hidden_states(self, batch: Batch) -> Tensor:
        """BTD after the last norm, in the compute type."""
        return self._hidden(batch.input_ids, batch.position_ids, batch.document_ids, batch.segment_ids)

    def states_at(self, batch: Batch, places_P: Tensor) -> Tensor:
        """PD of ``hidden_states`` at these places; the last block computes only what they need."""
        return self._hidden(batch.input_ids, batch.position_ids, batch.document_ids, batch.segment_ids, places_P)

    def output_states(self, hidden_PD: Tensor) -> Tensor:
        """PE: the states that the output matrix reads. Only positions that are predicted need it."""
        states_PE: Tensor = self.transform(hidden_PD)
        return states_PE

    def pair_logits(self, hidden_ND: Tensor) -> Tensor:
        """N2 from the hidden states of each pair's first token: 0 says the second segment follows, 1 that it does not.

        A dense layer with tanh, the pooler, and two outputs (Devlin et al. 2019, section 3.1). Raises ``ConfigError``
        for a model without a pooler.
        """
        if self.pooler is None or self.pair_head is None:
            raise ConfigError("the model has no head for sentence pairs", where="model.pooler", fix="set it to true")
        logits_N2: Tensor = self.pair_head(torch.tanh(self.pooler(hidden_ND)))
        return logits_N2

    def forward(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        segment_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits BTV. Without positions they count from 0, and ``ConfigError`` is raised past ``max_seq_len``.

        Without ``document_ids_BT`` every row is one document without padding; without ``segment_ids_BT`` all is
        segment 0.
        """
        hidden_BTD = self._hidden(input_ids_BT, position_ids_BT, document_ids_BT, segment_ids_BT)
        return F.linear(self.output_states(hidden_BTD), self.output_weight_VD, self.output_bias)

    def init_weights(self, seed: int) -> None:
        """Matrices and embeddings normal with ``init_std``, biases 0, norms 1.

        BERT: 0.02 (Devlin et al. 2019, appendix A.2, in the form ``transformers`` gives it: not truncated). ModernBERT:
        0.02, divided by sqrt(2 L) in the matrices that write to the residual stream (Warner et al. 2024,
        after Shoeybi et al. 2019), with ``residual_init_scale``.
        """
        config = self.config
        scaled = config.residual_init_scale
        init_normal(self, seed, residual_std(config.init_std, config.n_layers, scaled=scaled))

    def compile_blocks(self) -> None:
        """Compile each block in place: parameter names stay, and one compilation serves all blocks."""
        for block in self.blocks:
            block.compile()

    def set_activation_checkpointing(self, on: bool) -> None:
        """Keep only the input of each layer and compute the rest again in the backward pass."""
        self.activation_checkpointing = on

    def _hidden(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None,
        document_ids_BT: Tensor | None,
        segment_ids_BT: Tensor | None,
        places_P: Tensor | None = None,
    ) -> Tensor:
        if position_ids_BT is None:
            position_ids_BT = next_positions(input_ids_BT, 0, self.max_seq_len)
        x_BTD = self._embedded(input_ids_BT, position_ids_BT, segment_ids_BT)
        views = self._views(position_ids_BT, document_ids_BT, compute_dtype(x_BTD))
        x_BTD = self._run_blocks(x_BTD, *views, places_P)
        hidden_BTD: Tensor = _for_matrices(x_BTD) if self.norm is None else self.norm(x_BTD)
        return hidden_BTD

    def _embedded(self, input_ids_BT: Tensor, position_ids_BT: Tensor, segment_ids_BT: Tensor | None) -> Tensor:
        """The sum of the embeddings, after norm and dropout. A table of one segment has all tokens in it."""
        x_BTE: Tensor = self.embedding(input_ids_BT)
        if self.segment_embedding is not None:
            if segment_ids_BT is None or self.config.n_segments == 1:
                segment_ids_BT = torch.zeros_like(input_ids_BT)
            x_BTE = x_BTE + self.segment_embedding(segment_ids_BT)
        if self.position_embedding is not None:
            x_BTE = x_BTE + self.position_embedding(position_ids_BT)
        embedded_BTE: Tensor = self.dropout(self.embedding_norm(x_BTE))
        if self.embedding_projection is None:
            return embedded_BTE
        # as wide as the stream, and in its type: autocast would give the compute type
        embedded_BTD: Tensor = self.embedding_projection(embedded_BTE).to(embedded_BTE.dtype)
        return embedded_BTD

    def _views(self, position_ids_BT: Tensor, document_ids_BT: Tensor | None, dtype: torch.dtype) -> tuple[View, View]:
        """What global layers see, and what local layers see."""
        config, T = self.config, position_ids_BT.shape[1]
        theta, width = config.rope_theta, config.head_width
        seen = None if document_ids_BT is None else dense_mask(document_ids_BT, document_ids_BT, causal=False)
        turn = None if theta is None else rotation(position_ids_BT, width, theta)
        everything = View(turn, _added(seen, dtype))
        if config.reach is None:
            return everything, everything
        near = _near(T, config.reach, position_ids_BT.device)
        local_theta = config.local_rope_theta
        local_turn = turn if local_theta is None else rotation(position_ids_BT, width, local_theta)
        return everything, View(local_turn, _added(near if seen is None else near & seen, dtype))

    def _run_blocks(self, x_BTD: Tensor, everything: View, nearby: View, places_P: Tensor | None) -> Tensor:
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer in range(self.config.n_layers):
            block = self.blocks[layer % len(self.blocks)]
            view = everything if self.config.is_global(layer) else nearby
            seen = (x_BTD, view, places_P if layer == self.config.n_layers - 1 else None)
            x_BTD = checkpoint(block, *seen, use_reentrant=False) if recompute else block(*seen)
        return x_BTD


def layer_norm(config: EncoderConfig, *, keep_type: bool, width: int | None = None) -> LayerNorm:
    return LayerNorm(width or config.d_model, config.norm_eps, bias=config.norm_bias, keep_type=keep_type)


def _for_matrices(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x))


def _near(T: int, reach: int, device: torch.device) -> Tensor:
    """11TT: true up to ``reach`` columns away, on both sides."""
    columns = torch.arange(T, device=device)
    return ((columns[:, None] - columns[None, :]).abs() <= reach)[None, None]


def _added(seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as numbers to add to the scores: made once, where SDPA would make one of the booleans in every layer."""
    if seen is None:
        return None
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
