"""Muon for matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), with a choice of the compute type.

``torch.optim.Muon`` iterates in bf16, which a CPU without bf16 units emulates at a hundredth of its fp32 speed. Given
the same type, the two give the same update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: steepest at zero, singular values end within 0.7 .. 1.2
NEWTON_SCHULZ_STEPS = 5
SMALLEST_NORM = 1e-7


class MuonOptimizer(torch.optim.Optimizer):
    """Nesterov momentum whose matrices are brought near the closest orthogonal one before the update.

    The update is scaled by ``0.2 sqrt(max(rows, columns))``, AdamW's typical root mean square (Liu et al. 2025,
    equation 4). ``dtype`` is the type of the Newton-Schulz products; None takes bf16 on a GPU and fp32 on a CPU.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update from the gradients at hand; parameters without one are left alone."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        direction = orthogonalise(gradient.lerp(average, group["momentum"]), self._dtype_on(parameter.device))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))

    def _dtype_on(self, device: torch.device) -> torch.dtype:
        return self.dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)


def orthogonalise(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """``U S' V^T`` with singular values near 1, for ``matrix = U S V^T``: five Newton-Schulz steps."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.to(dtype, copy=True)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x  # the smaller side first: smaller products
    x.div_(x.norm().clamp(min=SMALLEST_NORM))
    if dtype == torch.float32 and x.shape[1] >= 2 * x.shape[0]:
        x = _by_gram_matrix(x)
    else:
        for _ in range(NEWTON_SCHULZ_STEPS):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _by_gram_matrix(x: Tensor) -> Tensor:
    """The same five steps on the small square ``R = X X^T``, half the work for a matrix of four times its height.

    A step multiplies X from the left by the polynomial ``P = a + b R + c R^2``, and so R becomes ``P R P``. The product
    of all P meets X once, at the end. The rounding of R grows from step to step: in fp32 to at most 3e-4 of the largest
    singular value where the smallest is 1e-4 of it (the other way: 3e-6), in bf16 too far.
    """
    a, b, c = NEWTON_SCHULZ
    gram = x @ x.T
    product: Tensor | None = None
    for step in range(NEWTON_SCHULZ_STEPS):
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        product = polynomial if product is None else polynomial @ product
        if step < NEWTON_SCHULZ_STEPS - 1:
            gram = polynomial @ gram @ polynomial
    assert product is not None
    return product @ x
