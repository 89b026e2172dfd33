"""Output head and cross entropy in one operation that never holds all logits.

Rows are taken chunk by chunk: their logits are computed, turned into the loss and, in the same buffer, into the
gradient of the loss, which is multiplied into the gradients of hidden states, weight and bias at once. So the memory is
one chunk of logits instead of several copies of all, and the backward pass has nothing left to do but scale.

With z the logits of a row, lse = log sum exp z, p = softmax z, e the label smoothing and c the z-loss weight::

    loss = (1 - e) (lse - z_label) + e (lse - mean z) + c lse^2
    d loss / d z = (1 + 2 c lse) p - (1 - e) onehot(label) - e / V

The gradient of the bias is the sum of these rows. With a soft cap k (Gemma 2, arXiv 2408.00118, section 2) the z above
is ``k tanh(y / k)`` of the products y, and the rows are multiplied by ``dz / dy = 1 - (z / k)^2``.

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
    n_correct: Tensor  # rows in which no logit is larger than the label's


@dataclass(frozen=True)
class Shape:
    """The form of the loss: smoothing share, z-loss weight, rows of a chunk, soft cap of the logits."""

    label_smoothing: float
    z_loss: float
    chunk_size: int
    softcap: float | None


class _Grads(NamedTuple):
    """Where gradients are summed up; None where none is wanted."""

    hidden_PD: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


def linear_cross_entropy(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    labels_P: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    n_targets: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> LossParts:
    """Summed loss of ``hidden_PD @ weight_VD.T + bias_V`` against ``labels_P``; rows of ``IGNORE_INDEX`` cost nothing.

    ``softcap``: logits z become ``softcap * tanh(z / softcap)``, which takes a second chunk of memory in training.
    ``n_targets``, the number of other rows, saves a device synchronisation when given. Under autocast the products run
    in its type; bias, softmax, loss and the sums of the gradients of weight and bias are fp32 always.
    """
    if n_targets is None:
        n_targets = int((labels_P != IGNORE_INDEX).sum())
    rows_P = torch.nonzero_static(labels_P != IGNORE_INDEX, size=n_targets).squeeze(1)
    kind = hidden_PD.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else torch.promote_types(hidden_PD.dtype, weight_VD.dtype)
    shape = Shape(label_smoothing, z_loss, chunk_size or auto_chunk_size(weight_VD.shape[0], kind), softcap)
    inputs = (hidden_PD, weight_VD, bias_V)
    with torch.autocast(kind, enabled=False):
        hidden_PD = hidden_PD.to(dtype)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
            parts = _LinearCrossEntropy.apply(hidden_PD, weight_VD, bias_V, labels_P, rows_P, shape)  # type: ignore[no-untyped-call]
            return LossParts(*parts)
        nothing = _Grads(None, None, None)
        return LossParts(*_chunked(hidden_PD, weight_VD.to(dtype), bias_V, labels_P, rows_P, shape, nothing))


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, for an upstream gradient of 1."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_PD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_P: Tensor,
        rows_P: Tensor,
        shape: Shape,
    ) -> tuple[Tensor, ...]:
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grads = _Grads(
            torch.zeros_like(hidden_PD) if needs_hidden else None,
            torch.zeros_like(weight_VD, dtype=_sum_dtype(weight_VD)) if needs_weight else None,
            torch.zeros_like(bias_V, dtype=_sum_dtype(bias_V)) if needs_bias and bias_V is not None else None,
        )
        parts = _chunked(hidden_PD, weight_VD.to(hidden_PD.dtype), bias_V, labels_P, rows_P, shape, grads)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_PD, weight_VD, bias_V)]
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(*parts[1:])
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in fp32: a factor such as 1 / n_targets, rounded to bf16, would bias the whole gradient.
        scaled = [
            None if x is None else (x.to(grad.dtype) * grad).to(dtype)
            for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunked(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_P: Tensor,
    rows_P: Tensor,
    shape: Shape,
    grads: _Grads,
) -> tuple[Tensor, ...]:
    """The fields of ``LossParts``, summed over the rows; adds to the gradients. All in one type of product."""
    n, V = rows_P.shape[0], weight_VD.shape[0]
    gradient = any(grad is not None for grad in grads)
    sums_4 = torch.zeros(4, dtype=_sum_dtype(hidden_PD), device=hidden_PD.device)
    products = hidden_PD.new_empty(min(n, shape.chunk_size), V)  # allocated once: fresh memory is slow memory
    single = products.dtype == sums_4.dtype  # else a second buffer holds the logits in fp32
    logits = products if single else torch.empty_like(products, dtype=sums_4.dtype)
    for start in range(0, n, shape.chunk_size):
        rows = rows_P[start : start + shape.chunk_size]
        hidden_CD = hidden_PD.index_select(0, rows)
        labels_C1 = labels_P.index_select(0, rows).unsqueeze(1)
        product_CV = torch.mm(hidden_CD, weight_VD.t(), out=products[: rows.shape[0]])
        logits_CV = product_CV if single else logits[: rows.shape[0]].copy_(product_CV)
        if bias_V is not None:
            logits_CV.add_(bias_V)
        slopes_CV = None if shape.softcap is None else _cap_(logits_CV, shape.softcap, slopes=gradient)
        sums_4 += _loss_(logits_CV, labels_C1, shape, gradient=gradient)
        if slopes_CV is not None:
            logits_CV.mul_(slopes_CV)
        if grads.bias_V is not None:
            grads.bias_V.add_(logits_CV.sum(0))
        if gradient:
            grad_CV = logits_CV if single else product_CV.copy_(logits_CV)
            _multiply_in(grad_CV, hidden_CD, weight_VD, rows, grads)
    return sums_4.unbind()


def _cap_(logits_CV: Tensor, softcap: float, *, slopes: bool) -> Tensor | None:
    """Cap the logits in place; returns the derivatives of the capped ones if they are wanted."""
    logits_CV.div_(softcap).tanh_()
    derivatives_CV = torch.addcmul(logits_CV.new_ones(()), logits_CV, logits_CV, value=-1) if slopes else None
    logits_CV.mul_(softcap)
    return derivatives_CV


def _multiply_in(grad_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor, rows_C: Tensor, grads: _Grads) -> None:
    """The gradients of one chunk's product."""
    if grads.hidden_PD is not None:
        grads.hidden_PD.index_copy_(0, rows_C, grad_CV @ weight_VD)
    if grads.weight_VD is None:
        return
    if grad_CV.dtype == grads.weight_VD.dtype:
        grads.weight_VD.addmm_(grad_CV.t(), hidden_CD)
    else:
        grads.weight_VD.add_(grad_CV.t() @ hidden_CD)


def _loss_(logits_CV: Tensor, labels_C1: Tensor, shape: Shape, *, gradient: bool) -> Tensor:
    """``LossParts``, each summed over a chunk. Overwrites the logits, with their gradient if it is wanted.

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
    correct_C1 = (label_logits_C1 == top_C1).to(nll_C1.dtype)
    z_C1 = shape.z_loss * lse_C1.square()
    loss_C1 = (1 - smoothing) * nll_C1 + smoothing * (lse_C1 - mean_C1) + z_C1
    if gradient:
        if shape.z_loss:
            logits_CV.mul_(1 + 2 * shape.z_loss * lse_C1)
        if smoothing:
            logits_CV.sub_(smoothing / V)
        logits_CV.scatter_add_(1, labels_C1, torch.full_like(nll_C1, smoothing - 1))
    return torch.cat((loss_C1, nll_C1, z_C1, correct_C1), dim=1).sum(0)
