"""Causal self-attention: one call for every kernel, one mask per forward pass.

Who may see whom is one rule: a token sees the earlier tokens of its own document and itself. Padding is a document of
its own (``NO_DOCUMENT``), so that no row of the softmax is empty and nothing real ever sees padding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from llmkit.models.cache import LayerCache, dense_mask
from llmkit.models.config import DecoderConfig
from llmkit.models.layers import Linear, RMSNorm, Rotation, rotate

# None: causal, one document a row. Tensor: B1TS, true where seen. BlockMask: the same for flex_attention.
AttentionMask = Tensor | BlockMask | None

MIN_FLEX_WIDTH = 16  # flex_attention's kernels need heads at least this wide


def block_mask(document_ids_BT: Tensor) -> BlockMask:
    """The same rule for flex_attention, which skips blocks in which nothing is seen."""

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (document_ids_BT[b, q] == document_ids_BT[b, k])

    B, T = document_ids_BT.shape
    return create_block_mask(seen, B, None, T, T, device=document_ids_BT.device)


def attention_mask(document_ids_BT: Tensor | None, *, flex: bool) -> AttentionMask:
    """The mask of a forward pass without a cache."""
    if document_ids_BT is None:
        return None
    return block_mask(document_ids_BT) if flex else dense_mask(document_ids_BT, document_ids_BT)


def attend(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    mask: AttentionMask,
    dropout: float = 0.0,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention; query head h reads key/value head h // (H / G). Returns BHTK.

    A boolean mask (true where seen), a float mask (added to the scores) or None runs on SDPA, a ``BlockMask`` on
    flex_attention. Without a mask and with ``causal``, fewer queries than keys means one new token after a cache, which
    sees everything. ``scale`` multiplies the products; None is 1 / sqrt(K).
    """
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    if isinstance(mask, BlockMask):
        kernel = _flex_kernel(q_BHTK.is_cuda)
        result: Tensor = kernel(q_BHTK, k_BGSK, v_BGSK, block_mask=mask, enable_gqa=grouped, scale=scale)
        return result
    is_causal = causal and mask is None and q_BHTK.shape[2] == k_BGSK.shape[2]
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, enable_gqa=grouped, scale=scale
    )


def use_flex(q_width: int, dropout: float, device: torch.device) -> bool:
    """flex_attention pays on CUDA only, knows no dropout, and needs heads of a certain width."""
    return device.type == "cuda" and dropout == 0 and q_width >= MIN_FLEX_WIDTH


def _flex_kernel(compiled: bool) -> Callable[..., Tensor]:
    """Uncompiled flex_attention is correct but holds all scores: on CUDA it is compiled, once per process."""
    if compiled and not torch.compiler.is_compiling():
        return _compiled_flex()
    return flex_attention


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    kernel: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return kernel


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023) with optional per-head RMSNorm of q and k (as in Qwen3)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        D, K, bias = config.d_model, config.head_width, config.attention_bias
        self.width, self.dropout = K, config.dropout
        self.q = Linear(D, config.n_heads * K, bias=bias)
        self.k = Linear(D, config.kv_heads * K, bias=bias)
        self.v = Linear(D, config.kv_heads * K, bias=bias)
        self.o = Linear(config.n_heads * K, D, bias=bias)
        self.q_norm = RMSNorm(K, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(K, config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Rotation | None,
        mask: AttentionMask,
        cache: LayerCache | None = None,
        start: int = 0,
    ) -> Tensor:
        q_BTHK, k_BTGK, v_BTGK = (self._heads(linear(x_BTD)) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        if rotation is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, rotation), rotate(k_BTGK, rotation)
        q_BHTK, k_BGSK, v_BGSK = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
        if cache is not None:
            k_BGSK, v_BGSK = cache.append(k_BGSK, v_BGSK, start)
        mixed_BHTK = attend(q_BHTK, k_BGSK, v_BGSK, mask, self.dropout if self.training else 0.0)
        out_BTD: Tensor = self.o(mixed_BHTK.transpose(1, 2).flatten(2))
        return out_BTD

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.width)
