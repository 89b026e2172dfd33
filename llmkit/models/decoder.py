"""The decoder: token (and position) embedding, blocks, final norm, output head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmkit.interfaces import Batch
from llmkit.models.attention import Attention, AttentionMask, attention_mask, use_flex
from llmkit.models.cache import KVCache, LayerCache
from llmkit.models.config import DecoderConfig
from llmkit.models.layers import (
    Embedding,
    FeedForward,
    Linear,
    Rotation,
    at,
    build_norm,
    compute_dtype,
    init_normal,
    next_positions,
    residual_std,
    rotation,
    soft_cap,
)
from llmkit.models.rope import scaled_rotation

View = tuple[Rotation | None, AttentionMask]  # what differs between layers with and without a window


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (pre-norm, Radford et al. 2019), or where the config says so:

    post x + norm(f(x)) (OLMo 2), both x + norm(f(norm(x))) (Gemma 2), parallel x + attention(norm(x)) + mlp(norm(x))
    (GPT-NeoX).
    """

    def __init__(self, config: DecoderConfig, layer: int = 0) -> None:
        super().__init__()
        both = config.norm_position == "both"
        self.norm_first, self.parallel = config.norm_position != "post", config.parallel_residual
        self.attention_norm, self.attention = build_norm(config), Attention(config, layer)
        self.attention_post_norm = build_norm(config) if both else None
        self.mlp_norm, self.mlp = build_norm(config), FeedForward(config)
        self.mlp_post_norm = build_norm(config) if both else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Rotation | None,
        mask: AttentionMask,
        cache: LayerCache | None = None,
        start: int = 0,
        places_P: Tensor | None = None,
    ) -> Tensor:
        """With ``places_P`` only these positions come out, PD: the others are read, nothing more is made of them."""
        inner_BTD = self._before(x_BTD, self.attention_norm)
        inner_BTD = self.attention(inner_BTD, rotation, mask, cache, start, places_P)
        x_BTD = at(x_BTD, places_P)
        attended_BTD = x_BTD + self._after(inner_BTD, self.attention_norm, self.attention_post_norm)
        inner_BTD = self.mlp(self._before(x_BTD if self.parallel else attended_BTD, self.mlp_norm))
        return attended_BTD + self._after(inner_BTD, self.mlp_norm, self.mlp_post_norm)

    def _before(self, x_BTD: Tensor, norm: nn.Module) -> Tensor:
        """What a layer reads, in the compute type."""
        return norm(x_BTD) if self.norm_first else x_BTD.to(compute_dtype(x_BTD))

    def _after(self, x_BTD: Tensor, norm: nn.Module, post_norm: nn.Module | None) -> Tensor:
        """What a layer adds."""
        if post_norm is not None:
            x_BTD = post_norm(x_BTD)
        elif not self.norm_first:
            x_BTD = norm(x_BTD)
        added_BTD: Tensor = self.dropout(x_BTD)
        return added_BTD


class Decoder(nn.Module):
    """A decoder-only language model, its parameters uninitialised until ``init_weights`` or a checkpoint fills them."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        learned, rows = config.position == "learned", config.vocab_rows
        self.embedding = Embedding(rows, config.d_model)
        self.position_embedding = Embedding(config.max_seq_len, config.d_model) if learned else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = build_norm(config)
        self.head = None if config.tie_embeddings else Linear(config.d_model, rows, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    @property
    def max_seq_len(self) -> int:
        return self.config.max_seq_len

    @property
    def logit_softcap(self) -> float | None:
        """What ``forward`` caps the logits with, and a loss has to."""
        return self.config.logit_softcap

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

    def states_at(self, batch: Batch, places_P: Tensor) -> Tensor:
        """PD of ``hidden_states`` at these places; the last block computes only what they need."""
        return self._hidden(batch.input_ids, batch.position_ids, batch.document_ids, None, places_P)

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
        hidden_BTD = hidden_BTD[:, -1:] if last_only else hidden_BTD
        return soft_cap(nn.functional.linear(hidden_BTD, self.output_weight_VD), self.logit_softcap)

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

        layers = [LayerCache(empty(), empty(), window) for window in config.layer_windows]
        return KVCache(layers, torch.zeros(batch_size, max_len, dtype=torch.int64, device=weight.device))

    def _hidden(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None,
        document_ids_BT: Tensor | None,
        cache: KVCache | None,
        places_P: Tensor | None = None,
    ) -> Tensor:
        if position_ids_BT is None:
            position_ids_BT = next_positions(input_ids_BT, 0 if cache is None else cache.length, self.max_seq_len)
        x_BTD = self._embedded(input_ids_BT, position_ids_BT)
        windows = set(self.config.layer_windows)
        if cache is None:
            masks = self._masks(windows, input_ids_BT, document_ids_BT)
        else:
            masks = {window: cache.mask_of(document_ids_BT, x_BTD.shape[1], window) for window in windows}
        turns = self._rotations(windows, position_ids_BT, document_ids_BT)
        views = {window: (turns[window], masks[window]) for window in windows}
        if cache is None:
            x_BTD = self._run_blocks(x_BTD, views, places_P)
        else:
            x_BTD = self._run_blocks_cached(x_BTD, views, cache)
        hidden_BTD: Tensor = self.norm(x_BTD)
        return hidden_BTD

    def _embedded(self, input_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(input_ids_BT)
        if self.config.scale_embedding:
            x_BTD = x_BTD * self.config.d_model**0.5
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(position_ids_BT)
        embedded_BTD: Tensor = self.dropout(x_BTD)
        return embedded_BTD

    def _rotations(
        self, windows: set[int | None], position_ids_BT: Tensor, document_ids_BT: Tensor | None
    ) -> dict[int | None, Rotation | None]:
        """Angles for each window. Where layers with one have a theta of their own, they are not scaled."""
        config, width = self.config, self.config.rotary_width
        if config.rope_theta is None:
            return dict.fromkeys(windows)
        if config.rope_scaling is None:
            turn = rotation(position_ids_BT, width, config.rope_theta)
        else:
            turn = scaled_rotation(position_ids_BT, document_ids_BT, width, config.rope_theta, config.rope_scaling)
        local = turn
        if config.local_rope_theta is not None:
            local = rotation(position_ids_BT, width, config.local_rope_theta)
        return {window: turn if window is None else local for window in windows}

    def _masks(
        self, windows: set[int | None], input_ids_BT: Tensor, document_ids_BT: Tensor | None
    ) -> dict[int | None, AttentionMask]:
        """One mask for each window, and one in all for those that are no shorter than the sequence."""
        config, T = self.config, input_ids_BT.shape[1]
        dropout = config.dropout if self.training else 0.0
        flex = use_flex(config.head_width, dropout, self.embedding.weight.device)
        felt = {window: window if window is not None and window < T else None for window in windows}
        made: dict[int | None, AttentionMask] = {}
        for window in set(felt.values()):
            documents_BT = document_ids_BT
            if documents_BT is None and (window is not None or (flex and config.attention_softcap is not None)):
                documents_BT = torch.zeros_like(input_ids_BT[:1])  # one document; SDPA needs no mask for it
            made[window] = attention_mask(documents_BT, flex=flex, window=window)
        return {window: made[felt[window]] for window in windows}

    def _run_blocks(self, x_BTD: Tensor, views: dict[int | None, View], places_P: Tensor | None) -> Tensor:
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer, (block, window) in enumerate(zip(self.blocks, self.config.layer_windows, strict=True), 1):
            seen = (x_BTD, *views[window], None, 0, places_P if layer == self.config.n_layers else None)
            x_BTD = checkpoint(block, *seen, use_reentrant=False) if recompute else block(*seen)
        return x_BTD

    def _run_blocks_cached(self, x_BTD: Tensor, views: dict[int | None, View], cache: KVCache) -> Tensor:
        start = cache.length
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            turn, mask = views[layer.window]
            # Not through a compiled __call__: every length would be a new shape to compile for.
            x_BTD = block.forward(x_BTD, turn, mask, layer, start)
        cache.length += x_BTD.shape[1]
        return x_BTD
