"""The encoder-decoder: one embedding, a stack that reads the source, a stack that writes the target, output head.

T5 (Raffel et al. 2020) and BART or Marian (Lewis et al. 2020; Vaswani et al. 2017) differ in ``EncoderDecoderConfig``
only. Rows hold several documents on both sides; a target token sees the source tokens of its own document.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmkit.errors import ConfigError
from llmkit.interfaces import Batch, Tokens
from llmkit.models.attention import attend
from llmkit.models.cache import KVCache, LayerCache, dense_mask, source_mask
from llmkit.models.encoder_decoder_config import EncoderDecoderConfig
from llmkit.models.layers import (
    Embedding,
    FeedForward,
    LayerNorm,
    Linear,
    RMSNorm,
    build_norm,
    compute_dtype,
    init_normal,
    next_positions,
)
from llmkit.models.position_tables import distance_buckets, sinusoids

KeysValues = tuple[Tensor, Tensor]  # BHSK each


class Sight(NamedTuple):
    """What the tokens of a stack see in one forward pass; the same in all of its blocks."""

    own: Tensor | None  # B1TS true where seen, or BHTS added to the scores; None: all (in the decoder all before)
    source: Tensor | None = None  # B1TS true where seen; None: all
    blind: Tensor | None = None  # B1T1 true for target tokens whose document has no source: they get zeros from it


class Memory(NamedTuple):
    """What the encoder made of the source."""

    states_BSD: Tensor
    document_ids_BS: Tensor | None

    def of_rows(self, rows_B: Tensor) -> Memory:
        """That of these rows, in this order."""
        ids_BS = self.document_ids_BS
        return Memory(self.states_BSD[rows_B], None if ids_BS is None else ids_BS[rows_B])


class Seq2SeqCache(KVCache):
    """The decoder's cache, its positions, and keys and values of the source, which stay the same."""

    def __init__(self, layers: list[LayerCache], document_ids_BS: Tensor, source: list[KeysValues]) -> None:
        super().__init__(layers, document_ids_BS)
        self.position_ids_BS, self.source = torch.zeros_like(document_ids_BS), source
        self._sources_B = torch.arange(len(document_ids_BS), device=document_ids_BS.device)  # that each row reads

    def keep(self, rows_B: Tensor) -> None:
        """Go on with these of the rows, in this order; one may be there several times. Sources that stay in their
        places, as when the beams of a search change theirs, are not copied."""
        super().keep(rows_B)
        self.position_ids_BS = self.position_ids_BS[rows_B]
        sources_B = self._sources_B[rows_B]
        if not torch.equal(sources_B, self._sources_B):
            self.source = [(k_BHSK[rows_B], v_BHSK[rows_B]) for k_BHSK, v_BHSK in self.source]
        self._sources_B = sources_B


class Attention(nn.Module):
    """Multi-head attention of one sequence over itself or over another (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        D, width, bias = config.d_model, config.n_heads * config.head_width, config.attention_bias
        self.width, self.dropout = config.head_width, config.weights_dropout
        self.scale = None if config.scale_attention else 1.0
        self.q, self.k, self.v = (Linear(D, width, bias=bias) for _ in range(3))
        self.o = Linear(width, D, bias=bias)

    def keys_values(self, source_BSD: Tensor) -> KeysValues:
        return self._heads(self.k(source_BSD)), self._heads(self.v(source_BSD))

    def forward(
        self,
        x_BTD: Tensor,
        keys_values: KeysValues,
        mask: Tensor | None,
        *,
        causal: bool = False,
        blind: Tensor | None = None,
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        q_BHTK = self._heads(self.q(x_BTD))
        mixed_BHTK = attend(q_BHTK, *keys_values, mask, dropout, causal=causal, scale=self.scale)
        if blind is not None:
            mixed_BHTK = mixed_BHTK.masked_fill(blind, 0.0)
        out_BTD: Tensor = self.o(mixed_BHTK.transpose(1, 2).flatten(2))
        return out_BTD

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.width).transpose(1, 2)


class Block(nn.Module):
    """Self-attention, in the decoder cross-attention, and feed-forward, each with its norm before or after it."""

    def __init__(self, config: EncoderDecoderConfig, *, decoder: bool) -> None:
        super().__init__()
        self.pre_norm, self.causal = config.norm_position == "pre", decoder
        self.attention_norm, self.attention = self._norm(config), Attention(config)
        self.cross_norm = self._norm(config) if decoder else None
        self.cross_attention = Attention(config) if decoder else None
        self.mlp_norm, self.mlp = self._norm(config), FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BTD: Tensor,
        sight: Sight,
        source: Tensor | KeysValues | None = None,
        cache: LayerCache | None = None,
        start: int = 0,
    ) -> Tensor:
        """``source``: the encoder's states BSD, or the keys and values already made of them."""
        y_BTD = self._read(x_BTD, self.attention_norm)
        keys_values = self.attention.keys_values(y_BTD)
        if cache is not None:
            keys_values = cache.append(*keys_values, start)
        y_BTD = self.attention(y_BTD, keys_values, sight.own, causal=self.causal)
        x_BTD = self._add(x_BTD, y_BTD, self.attention_norm)
        if self.cross_attention is not None and self.cross_norm is not None and source is not None:
            y_BTD = self._read(x_BTD, self.cross_norm)
            keys_values = self.cross_attention.keys_values(source) if isinstance(source, Tensor) else source
            y_BTD = self.cross_attention(y_BTD, keys_values, sight.source, blind=sight.blind)
            x_BTD = self._add(x_BTD, y_BTD, self.cross_norm)
        return self._add(x_BTD, self.mlp(self._read(x_BTD, self.mlp_norm)), self.mlp_norm)

    def _norm(self, config: EncoderDecoderConfig) -> LayerNorm | RMSNorm:
        return build_norm(config, keep_type=not self.pre_norm)

    def _read(self, x_BTD: Tensor, norm: nn.Module) -> Tensor:
        """What a layer reads of the residual stream: its norm, or the stream itself in the compute type."""
        y_BTD: Tensor = norm(x_BTD) if self.pre_norm else x_BTD.to(compute_dtype(x_BTD))
        return y_BTD

    def _add(self, x_BTD: Tensor, y_BTD: Tensor, norm: nn.Module) -> Tensor:
        """A layer's result, on the residual stream."""
        sum_BTD: Tensor = x_BTD + self.dropout(y_BTD)
        return sum_BTD if self.pre_norm else norm(sum_BTD)


class Stack(nn.Module):
    """Positions and blocks of one side; the token embedding is shared by both."""

    def __init__(self, config: EncoderDecoderConfig, n_layers: int, *, decoder: bool) -> None:
        super().__init__()
        self.config, self.decoder = config, decoder
        D, pre_norm = config.d_model, config.norm_position == "pre"
        self.position_embedding = Embedding(config.max_seq_len, D) if config.position == "learned" else None
        self.n_buckets, self.furthest = config.n_position_buckets or 0, config.max_position_distance or 0
        self.position_bias = Embedding(self.n_buckets, config.n_heads) if config.position == "relative" else None
        self.embedding_norm = build_norm(config, keep_type=True) if config.embedding_norm else None
        self.blocks = nn.ModuleList(Block(config, decoder=decoder) for _ in range(n_layers))
        self.norm = build_norm(config) if pre_norm else None
        self.dropout = nn.Dropout(config.dropout)

    def start(self, embedded_BTD: Tensor, position_ids_BT: Tensor) -> Tensor:
        """The residual stream before the first block."""
        x_BTD = embedded_BTD * math.sqrt(self.config.d_model) if self.config.scale_embedding else embedded_BTD
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(position_ids_BT)
        if self.config.position == "sinusoidal":
            table = sinusoids(self.config.max_seq_len, self.config.d_model, x_BTD.device)
            x_BTD = x_BTD + table[position_ids_BT].to(x_BTD.dtype)
        if self.embedding_norm is not None:
            x_BTD = self.embedding_norm(x_BTD)
        started_BTD: Tensor = self.dropout(x_BTD)
        return started_BTD

    def own_mask(
        self, seen_B1TS: Tensor | None, queries_BT: Tensor, keys_BS: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """The bias of every score by the distance of the positions, ``-inf`` where nothing is seen; else ``seen``."""
        if self.position_bias is None:
            return seen_B1TS
        buckets_BTS = distance_buckets(
            queries_BT, keys_BS, n_buckets=self.n_buckets, furthest=self.furthest, both_ways=not self.decoder
        )
        bias_BHTS: Tensor = self.position_bias(buckets_BTS).permute(0, 3, 1, 2).to(dtype)
        if seen_B1TS is None and self.decoder:
            T, S = buckets_BTS.shape[1:]
            seen_B1TS = torch.ones(T, S, dtype=torch.bool, device=bias_BHTS.device).tril(S - T)[None, None]
        return bias_BHTS if seen_B1TS is None else bias_BHTS.masked_fill(~seen_B1TS, float("-inf"))

    def cross_attentions(self) -> list[Attention]:
        """By block; none in the encoder."""
        found = (getattr(block, "cross_attention", None) for block in self.blocks)
        return [attention for attention in found if isinstance(attention, Attention)]

    def finish(self, x_BTD: Tensor) -> Tensor:
        """The states after the last block, in the compute type."""
        y_BTD: Tensor = x_BTD.to(compute_dtype(x_BTD)) if self.norm is None else self.norm(x_BTD)
        return y_BTD


class EncoderDecoder(nn.Module):
    """Parameters are uninitialised until ``init_weights`` or a checkpoint fills them."""

    logit_softcap: float | None = None  # these logits are never capped

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embedding = Embedding(config.vocab_rows, config.d_model)
        self.encoder = Stack(config, config.n_layers, decoder=False)
        self.decoder = Stack(config, config.decoder_layers, decoder=True)
        self.head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_rows, bias=False)
        self.output_bias = nn.Parameter(torch.empty(config.vocab_rows)) if config.head_bias else None

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

    def output_states(self, hidden_PD: Tensor) -> Tensor:
        """Divided by sqrt(D) where T5 shares the embedding with the head, whose rows have length sqrt(D)."""
        return hidden_PD * self.config.d_model**-0.5 if self.config.scale_logits else hidden_PD

    def hidden_states(self, batch: Batch) -> Tensor:
        """BTD of the decoder, in the compute type. Raises ``ConfigError`` for a batch without a source."""
        if batch.source is None:
            raise ConfigError(
                "the objective gives an encoder-decoder nothing to read",
                where="objective",
                fix="choose an objective with a source and a target, such as span corruption",
            )
        memory = self.encode(batch.source)
        return self._decode(memory, batch.input_ids, batch.position_ids, batch.document_ids, None)

    def forward(
        self,
        source: Tokens,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits BTV of the target."""
        return self.decode(self.encode(source), input_ids_BT, position_ids_BT, document_ids_BT)

    def encode(self, source: Tokens) -> Memory:
        """Without document ids every row is one document, with the positions 0, 1, ..."""
        documents, positions = source.document_ids, source.position_ids
        x_BSD = self.encoder.start(self.embedding(source.input_ids), positions)
        seen = None if documents is None else dense_mask(documents, documents, causal=False)
        known = positions[:1] if documents is None else positions
        sight = Sight(self.encoder.own_mask(seen, known, known, compute_dtype(x_BSD)))
        return Memory(self._run_blocks(self.encoder, x_BSD, sight, None), documents)

    def decode(
        self,
        memory: Memory,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: Seq2SeqCache | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Logits BTV, or those of the last position alone (T = 1).

        Positions count on from the cache when left out; then ``ConfigError`` is raised past ``max_seq_len``. Without
        ``document_ids_BT`` every row is one document; tokens added to a cache without it belong to document 0.
        """
        if position_ids_BT is None:
            position_ids_BT = next_positions(input_ids_BT, 0 if cache is None else cache.length, self.max_seq_len)
        hidden_BTD = self._decode(memory, input_ids_BT, position_ids_BT, document_ids_BT, cache)
        states = self.output_states(hidden_BTD[:, -1:] if last_only else hidden_BTD)
        return nn.functional.linear(states, self.output_weight_VD, self.output_bias)

    def new_cache(self, memory: Memory, max_len: int) -> Seq2SeqCache:
        """An empty cache for ``max_len`` target tokens a row, with the keys and values of the source."""
        config, states = self.config, memory.states_BSD
        shape = (states.shape[0], config.n_heads, max_len, config.head_width)
        layers = [LayerCache(states.new_empty(shape), states.new_empty(shape)) for _ in self.decoder.blocks]
        source = [attention.keys_values(states) for attention in self.decoder.cross_attentions()]
        return Seq2SeqCache(layers, torch.zeros(shape[0], max_len, dtype=torch.int64, device=states.device), source)

    def init_weights(self, seed: int) -> None:
        """Normal: with ``init_std`` everywhere (BART), or with the deviations of T5 where it is null.

        Those are 1 for the embedding (then it and the scaled logits have unit size), 1 / sqrt(D) for position tables,
        1 / sqrt(inputs) for matrices, and for queries another 1 / sqrt(K) in place of the attention's scale (the
        published code, as ``transformers`` has it, whose untied head starts at 1; here at 1 / sqrt(D)).
        """
        init_normal(self, seed, lambda name, parameter: self.config.init_std or self._fan_in_std(name, parameter))

    def compile_blocks(self) -> None:
        """Compile each block in place: parameter names stay, and one compilation serves all blocks of a stack."""
        for block in [*self.encoder.blocks, *self.decoder.blocks]:
            block.compile()

    def set_activation_checkpointing(self, on: bool) -> None:
        """Keep only the input of each block and compute the rest again in the backward pass."""
        self.activation_checkpointing = on

    def _decode(
        self,
        memory: Memory,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        document_ids_BT: Tensor | None,
        cache: Seq2SeqCache | None,
    ) -> Tensor:
        x_BTD = self.decoder.start(self.embedding(self._started(input_ids_BT, position_ids_BT)), position_ids_BT)
        n_source = memory.states_BSD.shape[1]
        source, blind = source_mask(document_ids_BT, memory.document_ids_BS, input_ids_BT, n_source)
        dtype = compute_dtype(x_BTD)
        if cache is not None:
            own = self._cached_mask(cache, position_ids_BT, document_ids_BT, dtype)
            return self._run_blocks_cached(x_BTD, Sight(own, source, blind), cache)
        seen = None if document_ids_BT is None else dense_mask(document_ids_BT, document_ids_BT)
        known = position_ids_BT[:1] if document_ids_BT is None else position_ids_BT
        sight = Sight(self.decoder.own_mask(seen, known, known, dtype), source, blind)
        return self._run_blocks(self.decoder, x_BTD, sight, memory.states_BSD)

    def _started(self, input_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        """With the model's start id at the first position of every target, whatever the caller has put there."""
        start = self.config.start_id
        return input_ids_BT if start is None else input_ids_BT.masked_fill(position_ids_BT == 0, start)

    def _run_blocks(self, stack: Stack, x_BTD: Tensor, sight: Sight, source_BSD: Tensor | None) -> Tensor:
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for block in stack.blocks:
            if recompute:
                x_BTD = checkpoint(block, x_BTD, sight, source_BSD, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, sight, source_BSD)
        return stack.finish(x_BTD)

    def _cached_mask(
        self, cache: Seq2SeqCache, position_ids_BT: Tensor, document_ids_BT: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        stop = cache.length + position_ids_BT.shape[1]
        cache.position_ids_BS[:, cache.length : stop] = position_ids_BT
        seen = cache.mask_of(document_ids_BT, position_ids_BT.shape[1])
        return self.decoder.own_mask(seen, position_ids_BT, cache.position_ids_BS[:, :stop], dtype)

    def _run_blocks_cached(self, x_BTD: Tensor, sight: Sight, cache: Seq2SeqCache) -> Tensor:
        for block, layer, source in zip(self.decoder.blocks, cache.layers, cache.source, strict=True):
            # Not through a compiled __call__: every length would be a new shape to compile for.
            x_BTD = block.forward(x_BTD, sight, source, layer, cache.length)
        cache.length += x_BTD.shape[1]
        return self.decoder.finish(x_BTD)

    def _fan_in_std(self, name: str, parameter: Tensor) -> float:
        D, config = self.config.d_model, self.config
        if name == "embedding.weight":
            return D**-0.5 if config.scale_embedding else 1.0
        if name.endswith(("position_bias.weight", "position_embedding.weight")):
            return float(D**-0.5)
        query = name.endswith(".q.weight") and not config.scale_attention
        return float((parameter.shape[1] * (config.head_width if query else 1)) ** -0.5)
