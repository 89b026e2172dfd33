"""R-Drop (Wu et al. 2021): two passes with different dropout should say the same.

The batch passes twice through the model. With p and q what the two passes say of a target, and w the weight, the loss
of the target is ::

    (loss_p + loss_q) / 2 + w (KL(p || q) + KL(q || p)) / 2

which is half of the paper's equation 4 with alpha = 2 w, so that its size is that of one pass. It is a penalty of
training: without dropout, as in evaluation, one pass is all there is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit.interfaces import IGNORE_INDEX, LossSum, Model
from llmkit.objectives.chunks import auto_chunk_size

if TYPE_CHECKING:
    from torch import Tensor, nn


def problems(weight: float) -> list[tuple[str, str]]:
    """What is wrong with a weight, as objectives report it."""
    return [] if weight >= 0 else [("r_drop", "must be at least 0")]


def passes_twice(model: Model, weight: float) -> bool:
    """Whether a loss is to be taken from two passes: in training, when there is a weight."""
    return weight > 0 and bool(getattr(model, "training", False))


def has_dropout(model: nn.Module) -> bool:
    """Whether two passes of training can differ at all."""
    values = [item for module in model.modules() for item in vars(module).items()]
    return any(value > 0 for name, value in values if isinstance(value, float) and ("dropout" in name or name == "p"))


def joined(one: LossSum, two: LossSum, divergence: Tensor, weight: float) -> LossSum:
    """The loss of two passes; of their sums the means, and ``r_drop``, the divergence without its weight."""
    losses = {name: (loss + two.losses[name]) / 2 + weight * divergence for name, loss in one.losses.items()}
    sums = {name: (value + two.sums[name]) / 2 for name, value in one.sums.items()}
    return LossSum(losses, sums | {"r_drop": divergence.detach()})


def symmetric_divergence(logs_p: Tensor, logs_q: Tensor) -> Tensor:
    """(KL(p || q) + KL(q || p)) / 2 in nats, summed over all distributions, from their log-probabilities.

    The two divergences add up to ``sum (p - q) (log p - log q)``. Entries that are no choice are 0 in both.
    """
    return ((logs_p.exp() - logs_q.exp()) * (logs_p - logs_q)).sum() / 2


def token_divergence(
    model: Model, one_PD: Tensor, two_PD: Tensor, labels_P: Tensor, n_targets: int, chunk_size: int | None
) -> Tensor:
    """``symmetric_divergence`` over the vocabulary, at the ``n_targets`` labelled ones of two passes' hidden states.

    Logits are made chunk by chunk, and again in the backward pass, so that few are held at once.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    weight_VD = model.output_weight_VD
    rows_N = torch.nonzero_static(labels_P != IGNORE_INDEX, size=n_targets).squeeze(1)
    states = [hidden_PD.index_select(0, rows_N) for hidden_PD in (one_PD, two_PD)]
    size = chunk_size or auto_chunk_size(weight_VD.shape[0], weight_VD.device.type)

    def of_chunk(one_CD: Tensor, two_CD: Tensor) -> Tensor:
        return symmetric_divergence(*(_log_probabilities(model, hidden) for hidden in (one_CD, two_CD)))

    total = states[0].new_zeros((), dtype=torch.promote_types(states[0].dtype, torch.float32))
    for start in range(0, n_targets, size):
        chunks = [hidden_ND[start : start + size] for hidden_ND in states]
        part: Tensor = checkpoint(of_chunk, *chunks, use_reentrant=False, preserve_rng_state=False)
        total = total + part
    return total


def _log_probabilities(model: Model, hidden_CD: Tensor) -> Tensor:
    """CV in fp32 at least, from logits with the model's bias and soft cap."""
    import torch

    logits_CV = torch.nn.functional.linear(model.output_states(hidden_CD), model.output_weight_VD)
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    if model.output_bias_V is not None:
        logits_CV = logits_CV + model.output_bias_V
    if (cap := model.logit_softcap) is not None:
        logits_CV = cap * torch.tanh(logits_CV / cap)
    return logits_CV.log_softmax(1)
