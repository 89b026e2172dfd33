"""The decoder: token (and position) embedding, pre-norm blocks, final norm, output head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmkit.errors import ConfigError
from llmkit.interfaces import Batch
from llmkit.models.attention import Attention, AttentionMask, attention_mask, use_flex
from llmkit.models.cache import KVCache, LayerCache
from llmkit.models.config import DecoderConfig
from llmkit.models.layers import (
    Embedding,
    FeedForward,
    Linear,
    Rotation,
    build_norm,
    init_normal,
    residual_std,
    rotation,
)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (pre-norm, Radford et al. 2019)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm, self.attention = build_norm(config), Attention(config)
        self.mlp_norm, self.mlp = build_norm(config), FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Rotation | None,
        mask: AttentionMask,
        cache: LayerCache | None = None,
        start: int = 0,
    ) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), rotation, mask, cache, start))
        added_BTD: Tensor = self.dropout(self.mlp(self.mlp_norm(x_BTD)))
        return x_BTD + added_BTD


class Decoder(nn.Module):
    """A decoder-only language model, its parameters uninitialised until ``init_weights`` or a checkpoint fills them."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        learned, rows = config.position == "learned", config.vocab_rows
        self.embedding = Embedding(rows, config.d_model)
        self.position_embedding = Embedding(config.max_seq_len, config.d_model) if learned else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = build_norm(config)
        self.head = None if config.tie_embeddings else Linear(config.d_model, rows, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    @property
    def max_seq_len(self) -> int:
        return self.config.max_seq_len

    @property
    def output_weight_VD(self) -> Tensor:
        """The matrix that turns hidden states into logits: the embedding itself when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def output_bias_V(self) -> None:
        """A decoder's logits have none."""

    def output_states(self, hidden_PD: Tensor) -> Tensor:
        """The hidden states themselves: nothing stands between them and the output matrix."""
        return hidden_PD

    def hidden_states(self, batch: Batch) -> Tensor:
        """BTD after the final norm, in the compute type."""
        return self._hidden(batch.input_ids, batch.position_ids, batch.document_ids, None)

    def forward(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Logits BTV, or those of the last position alone (T = 1).

        Positions count on from the cache when left out; then ``ConfigError`` is raised past ``max_seq_len``. Without
        ``document_ids_BT`` every row is one document; tokens added to a cache without it belong to document 0.
        """
        hidden_BTD = self._hidden(input_ids_BT, position_ids_BT, document_ids_BT, cache)
        return nn.functional.linear(hidden_BTD[:, -1:] if last_only else hidden_BTD, self.output_weight_VD)

    def init_weights(self, seed: int) -> None:
        """Normal with ``init_std``; matrices that write to the residual stream divided by sqrt(2 L) if asked for.

        GPT-2: 0.02 and the division (Radford et al. 2019, section 2.3; all embeddings 0.02 as ``transformers`` has it).
        Llama: 0.02 without it (the initialisation of ``transformers``; OLMo 2, arXiv 2501.00656, trains with the same).
        """
        config = self.config
        scaled = config.residual_init_scale
        init_normal(self, seed, residual_std(config.init_std, config.n_layers, scaled=scaled))

    def compile_blocks(self) -> None:
        """Compile each block in place: parameter names stay, and one compilation serves all blocks."""
        for block in self.blocks:
            block.compile()

    def set_activation_checkpointing(self, on: bool) -> None:
        """Keep only the input of each block and compute the rest again in the backward pass."""
        self.activation_checkpointing = on

    def new_cache(self, batch_size: int, max_len: int) -> KVCache:
        """An empty cache for ``max_len`` tokens a row, in the type and on the device of the keys."""
        config, weight = self.config, self.embedding.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        shape = (batch_size, config.kv_heads, max_len, config.head_width)

        def empty() -> Tensor:
            return torch.empty(shape, dtype=dtype, device=weight.device)

        layers = [LayerCache(empty(), empty()) for _ in range(config.n_layers)]
        return KVCache(layers, torch.zeros(batch_size, max_len, dtype=torch.int64, device=weight.device))

    def _hidden(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None,
        document_ids_BT: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        if position_ids_BT is None:
            position_ids_BT = self._next_positions(input_ids_BT, 0 if cache is None else cache.length)
        x_BTD = self.embedding(input_ids_BT)
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(position_ids_BT)
        x_BTD = self.dropout(x_BTD)
        turn = self._rotation(position_ids_BT)
        if cache is None:
            x_BTD = self._run_blocks(x_BTD, turn, self._mask(document_ids_BT))
        else:
            x_BTD = self._run_blocks_cached(x_BTD, turn, cache, document_ids_BT)
        hidden_BTD: Tensor = self.norm(x_BTD)
        return hidden_BTD

    def _next_positions(self, input_ids_BT: Tensor, start: int) -> Tensor:
        stop = start + input_ids_BT.shape[1]
        if stop > self.max_seq_len:
            what = f"{stop} tokens do not fit into {self.max_seq_len}"
            raise ConfigError(what, where="model.max_seq_len", fix="use shorter sequences")
        return torch.arange(start, stop, device=input_ids_BT.device)[None]

    def _rotation(self, position_ids_BT: Tensor) -> Rotation | None:
        config = self.config
        return None if config.rope_theta is None else rotation(position_ids_BT, config.head_width, config.rope_theta)

    def _mask(self, document_ids_BT: Tensor | None) -> AttentionMask:
        dropout = self.config.dropout if self.training else 0.0
        return attention_mask(
            document_ids_BT, flex=use_flex(self.config.head_width, dropout, self.embedding.weight.device)
        )

    def _run_blocks(self, x_BTD: Tensor, turn: Rotation | None, mask: AttentionMask) -> Tensor:
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            x_BTD = checkpoint(block, x_BTD, turn, mask, use_reentrant=False) if recompute else block(x_BTD, turn, mask)
        return x_BTD

    def _run_blocks_cached(
        self, x_BTD: Tensor, turn: Rotation | None, cache: KVCache, document_ids_BT: Tensor | None
    ) -> Tensor:
        mask, start = cache.mask_of(document_ids_BT, x_BTD.shape[1]), cache.length
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            # Not through a compiled __call__: every length would be a new shape to compile for.
            x_BTD = block.forward(x_BTD, turn, mask, layer, start)
        cache.length += x_BTD.shape[1]
        return x_BTD
