"""Causal self-attention: one call for every kernel, one mask per forward pass.

Who may see whom is one rule: a token sees the earlier tokens of its own document and itself; with a window, only those
of them that are near. Padding is a document of its own (``NO_DOCUMENT``), so that no row of the softmax is empty and
nothing real ever sees padding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from llmkit.models.cache import LayerCache, dense_mask
from llmkit.models.config import MIN_FLEX_WIDTH, DecoderConfig
from llmkit.models.layers import Linear, RMSNorm, Rotation, at, rotate, soft_cap

# None: causal, one document a row. Tensor: B1TS, true where seen. BlockMask: the same for flex_attention.
AttentionMask = Tensor | BlockMask | None

WRITTEN_OUT_LIMIT = 1024**2  # scores of a head, above which they would take too much memory
_written_out = False


def block_mask(document_ids_BT: Tensor, window: int | None = None) -> BlockMask:
    """The same rule for flex_attention, which skips blocks in which nothing is seen."""

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        earlier = (q >= k) & (document_ids_BT[b, q] == document_ids_BT[b, k])
        return earlier if window is None else earlier & (q - k < window)

    B, T = document_ids_BT.shape
    return create_block_mask(seen, B, None, T, T, device=document_ids_BT.device)


def attention_mask(document_ids_BT: Tensor | None, *, flex: bool, window: int | None = None) -> AttentionMask:
    """The mask of a forward pass without a cache; a window needs document ids."""
    if document_ids_BT is None:
        return None
    if flex:
        return block_mask(document_ids_BT, window)
    return dense_mask(document_ids_BT, document_ids_BT, window=window)


def attend(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    mask: AttentionMask,
    dropout: float = 0.0,
    *,
    causal: bool = True,
    scale: float | None = None,
    cap: float | None = None,
) -> Tensor:
    """Scaled dot-product attention; query head h reads key/value head h // (H / G). Returns BHTK.

    A boolean mask (true where seen), a float mask (added to the scores) or None runs on SDPA, a ``BlockMask`` on
    flex_attention. Without a mask and with ``causal``, fewer queries than keys means one new token after a cache, which
    sees everything. ``scale`` multiplies the products; None is 1 / sqrt(K). ``cap`` caps the scores softly before the
    mask; SDPA cannot do it, so that without a ``BlockMask`` all scores are held (boolean mask or None only). They are
    held too on a CPU that is faster so (``use_written_out``), up to ``WRITTEN_OUT_LIMIT`` of them a head.
    """
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    if isinstance(mask, BlockMask):

        def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return soft_cap(score, cap)

        kernel, change = _flex_kernel(q_BHTK.is_cuda), None if cap is None else capped
        result: Tensor = kernel(
            q_BHTK, k_BGSK, v_BGSK, score_mod=change, block_mask=mask, enable_gqa=grouped, scale=scale
        )
        return result
    T, S = q_BHTK.shape[2], k_BGSK.shape[2]
    is_causal = causal and mask is None and T == S
    few = _written_out and q_BHTK.device.type == "cpu" and T * S <= WRITTEN_OUT_LIMIT
    if cap is not None or few:
        seen = torch.ones(T, S, dtype=torch.bool, device=q_BHTK.device).tril() if is_causal else mask
        return attend_written_out(q_BHTK, k_BGSK, v_BGSK, mask=seen, dropout=dropout, scale=scale, cap=cap)
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, enable_gqa=grouped, scale=scale
    )


def attend_written_out(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    *,
    mask: Tensor | None,
    dropout: float = 0.0,
    scale: float | None = None,
    cap: float | None = None,
) -> Tensor:
    """``attend`` as two products with a softmax between them, in fp32 at least; holds all scores."""
    B, H, T, K = q_BHTK.shape
    G = k_BGSK.shape[1]
    q_BGRTK = q_BHTK.reshape(B, G, -1, T, K) * (K**-0.5 if scale is None else scale)
    scores_BGRTS = q_BGRTK @ k_BGSK[:, :, None].transpose(-1, -2)
    scores_BGRTS = scores_BGRTS.to(torch.promote_types(scores_BGRTS.dtype, torch.float32))
    if cap is not None:
        scores_BGRTS = soft_cap(scores_BGRTS, cap)
    if mask is not None:
        if mask.dim() == 4:
            mask = mask.reshape(mask.shape[0], min(G, mask.shape[1]), -1, *mask.shape[2:])
        hides = mask.dtype == torch.bool
        scores_BGRTS = scores_BGRTS.masked_fill(~mask, float("-inf")) if hides else scores_BGRTS + mask
    weights_BGRTS = F.dropout(scores_BGRTS.softmax(-1), dropout).to(v_BGSK.dtype)
    return (weights_BGRTS @ v_BGSK[:, :, None]).reshape(B, H, T, K)


def use_written_out(on: bool) -> None:
    """Whether ``attend`` takes two products in place of torch's kernel where both can be had; for the whole process."""
    global _written_out
    _written_out = on


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
    """Grouped-query self-attention (Ainslie et al. 2023).

    Queries and keys may be normed head by head (Qwen3) or over their whole width (OLMo 2), scores capped (Gemma 2) or
    divided by the number of the layer, which counts from 1 (GPT-2 of Mistral, Karamcheti et al. 2021).
    """

    def __init__(self, config: DecoderConfig, layer: int = 0) -> None:
        super().__init__()
        D, K, bias = config.d_model, config.head_width, config.attention_bias
        self.width, self.dropout, self.cap = K, config.dropout, config.attention_softcap
        scale_dim, divisor = config.attention_scale_dim or K, layer + 1 if config.scale_attention_by_layer else 1
        self.scale = None if (scale_dim, divisor) == (K, 1) else scale_dim**-0.5 / divisor
        self.norm_by_head = config.qk_norm == "head"
        self.q = Linear(D, config.n_heads * K, bias=bias)
        self.k = Linear(D, config.kv_heads * K, bias=bias)
        self.v = Linear(D, config.kv_heads * K, bias=bias)
        self.o = Linear(config.n_heads * K, D, bias=config.attention_out_bias)
        q_width, k_width = config.qk_norm_widths
        self.q_norm = RMSNorm(q_width, config.norm_eps) if q_width else None
        self.k_norm = RMSNorm(k_width, config.norm_eps) if k_width else None

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Rotation | None,
        mask: AttentionMask,
        cache: LayerCache | None = None,
        start: int = 0,
        places_P: Tensor | None = None,
    ) -> Tensor:
        """BTD, or PD of the places alone."""
        q_BTHK, k_BTGK = self._heads(self.q(x_BTD), self.q_norm), self._heads(self.k(x_BTD), self.k_norm)
        v_BTGK = self._heads(self.v(x_BTD), None)
        if rotation is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, rotation), rotate(k_BTGK, rotation)
        q_BHTK, k_BGSK, v_BGSK = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
        if cache is not None:
            k_BGSK, v_BGSK = cache.append(k_BGSK, v_BGSK, start)
        dropout = self.dropout if self.training else 0.0
        mixed_BHTK = attend(q_BHTK, k_BGSK, v_BGSK, mask, dropout, scale=self.scale, cap=self.cap)
        out_BTD: Tensor = self.o(at(mixed_BHTK.transpose(1, 2).flatten(2), places_P))
        return out_BTD

    def _heads(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """The heads of a projection, normed before or after it is split into them."""
        if norm is not None and not self.norm_by_head:
            x = norm(x)
        heads = x.view(*x.shape[:-1], -1, self.width)
        return norm(heads) if norm is not None and self.norm_by_head else heads
