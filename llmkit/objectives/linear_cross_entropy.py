"""Output head and cross entropy in one operation that never holds all logits.

Rows are taken chunk by chunk: their logits are computed, turned into the loss and, in the same buffer, into the
gradient of the loss, which is multiplied into the gradients of hidden states and weight at once. So the memory is one
chunk of logits instead of several copies of all, and the backward pass has nothing left to do but scale.

With z the logits of a row, lse = log sum exp z, p = softmax z, e the label smoothing and c the z-loss weight::

    loss = (1 - e) (lse - z_label) + e (lse - mean z) + c lse^2
    d loss / d z = (1 + 2 c lse) p - (1 - e) onehot(label) - e / V

Smoothing as in Szegedy et al. 2016, section 7; z-loss as in Chowdhery et al. 2022 (PaLM), section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkit.interfaces import IGNORE_INDEX
from llmkit.objectives.chunks import auto_chunk_size


class LossParts(NamedTuple):
    """Sums over the labelled rows, in fp32 (fp64 for fp64 inputs). Only ``loss`` is differentiable."""

    loss: Tensor
    nll: Tensor  # nats, without smoothing and z-loss
    z_loss: Tensor  # already times its weight


@dataclass(frozen=True)
class Shape:
    """The form of the loss: smoothing share, z-loss weight, rows of a chunk."""

    label_smoothing: float
    z_loss: float
    chunk_size: int


def linear_cross_entropy(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    labels_P: Tensor,
    *,
    n_targets: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> LossParts:
    """Summed loss of ``hidden_PD @ weight_VD.T`` against ``labels_P``; rows labelled ``IGNORE_INDEX`` cost nothing.

    ``n_targets``, the number of other rows, saves a device synchronisation when given. Under autocast the products run
    in its type; the softmax, the loss and the sum of the weight's gradient are fp32 always.
    """
    if n_targets is None:
        n_targets = int((labels_P != IGNORE_INDEX).sum())
    rows_P = torch.nonzero_static(labels_P != IGNORE_INDEX, size=n_targets).squeeze(1)
    kind = hidden_PD.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else torch.promote_types(hidden_PD.dtype, weight_VD.dtype)
    shape = Shape(label_smoothing, z_loss, chunk_size or auto_chunk_size(weight_VD.shape[0], kind))
    with torch.autocast(kind, enabled=False):
        hidden_PD, weight = hidden_PD.to(dtype), weight_VD
        if torch.is_grad_enabled() and (hidden_PD.requires_grad or weight.requires_grad):
            parts = _LinearCrossEntropy.apply(hidden_PD, weight, labels_P, rows_P, shape)  # type: ignore[no-untyped-call]
            return LossParts(*parts)
        return LossParts(*_chunked(hidden_PD, weight.to(dtype), labels_P, rows_P, shape, None, None))


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, for an upstream gradient of 1."""

    @staticmethod
    def forward(
        ctx: Any, hidden_PD: Tensor, weight_VD: Tensor, labels_P: Tensor, rows_P: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        grad_hidden_PD = torch.zeros_like(hidden_PD) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=_sum_dtype(weight_VD)) if needs_weight else None
        weight = weight_VD.to(hidden_PD.dtype)
        parts = _chunked(hidden_PD, weight, labels_P, rows_P, shape, grad_hidden_PD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.save_for_backward(grad_hidden_PD, grad_weight_VD)
        ctx.mark_non_differentiable(*parts[1:])
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_PD, weight_VD = ctx.saved_tensors
        # Scaled in fp32: a factor such as 1 / n_targets, rounded to bf16, would bias the whole gradient.
        grad_hidden_PD = None if hidden_PD is None else (hidden_PD.to(grad.dtype) * grad).to(hidden_PD.dtype)
        grad_weight_VD = None if weight_VD is None else (weight_VD * grad).to(ctx.weight_dtype)
        return grad_hidden_PD, grad_weight_VD, None, None, None


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunked(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    labels_P: Tensor,
    rows_P: Tensor,
    shape: Shape,
    grad_hidden_PD: Tensor | None,
    grad_weight_VD: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, nll and z-loss summed over the rows; adds to the gradients that are wanted. All in one type of product."""
    n, V = rows_P.shape[0], weight_VD.shape[0]
    gradient = grad_hidden_PD is not None or grad_weight_VD is not None
    sums_3 = torch.zeros(3, dtype=_sum_dtype(hidden_PD), device=hidden_PD.device)
    products = hidden_PD.new_empty(min(n, shape.chunk_size), V)  # allocated once: fresh memory is slow memory
    single = products.dtype == sums_3.dtype  # else a second buffer holds the logits in fp32
    logits = products if single else torch.empty_like(products, dtype=sums_3.dtype)
    for start in range(0, n, shape.chunk_size):
        rows = rows_P[start : start + shape.chunk_size]
        hidden_CD = hidden_PD.index_select(0, rows)
        labels_C1 = labels_P.index_select(0, rows).unsqueeze(1)
        product_CV = torch.mm(hidden_CD, weight_VD.t(), out=products[: rows.shape[0]])
        logits_CV = product_CV if single else logits[: rows.shape[0]].copy_(product_CV)
        sums_3 += _loss_(logits_CV, labels_C1, shape, gradient=gradient)
        if gradient:
            grad_CV = logits_CV if single else product_CV.copy_(logits_CV)
            _multiply_in(grad_CV, hidden_CD, weight_VD, rows, grad_hidden_PD, grad_weight_VD)
    loss, nll, z_loss = sums_3.unbind()
    return loss, nll, z_loss


def _multiply_in(
    grad_CV: Tensor,
    hidden_CD: Tensor,
    weight_VD: Tensor,
    rows_C: Tensor,
    grad_hidden_PD: Tensor | None,
    grad_weight_VD: Tensor | None,
) -> None:
    """The gradients of one chunk's product."""
    if grad_hidden_PD is not None:
        grad_hidden_PD.index_copy_(0, rows_C, grad_CV @ weight_VD)
    if grad_weight_VD is None:
        return
    if grad_CV.dtype == grad_weight_VD.dtype:
        grad_weight_VD.addmm_(grad_CV.t(), hidden_CD)
    else:
        grad_weight_VD.add_(grad_CV.t() @ hidden_CD)


def _loss_(logits_CV: Tensor, labels_C1: Tensor, shape: Shape, *, gradient: bool) -> Tensor:
    """Loss, nll and z-loss, each summed over a chunk. Overwrites the logits, with their gradient if it is wanted.

    lse is taken from the softmax, as z - log p of the most probable entry (p >= 1 / V, so the logarithm is exact to
    rounding): torch's own logsumexp costs three times as much as its softmax.
    """
    smoothing, V = shape.label_smoothing, logits_CV.shape[1]
    label_logits_C1 = logits_CV.gather(1, labels_C1)
    top_C1 = logits_CV.amax(1, keepdim=True)
    mean_C1 = logits_CV.mean(1, keepdim=True) if smoothing else top_C1
    torch.softmax(logits_CV, 1, out=logits_CV)
    lse_C1 = top_C1 - logits_CV.amax(1, keepdim=True).log()
    nll_C1 = lse_C1 - label_logits_C1
    z_C1 = shape.z_loss * lse_C1.square()
    loss_C1 = (1 - smoothing) * nll_C1 + smoothing * (lse_C1 - mean_C1) + z_C1
    if gradient:
        if shape.z_loss:
            logits_CV.mul_(1 + 2 * shape.z_loss * lse_C1)
        if smoothing:
            logits_CV.sub_(smoothing / V)
        logits_CV.scatter_add_(1, labels_C1, torch.full_like(nll_C1, smoothing - 1))
    return torch.cat((loss_C1, nll_C1, z_C1), dim=1).sum(0)
