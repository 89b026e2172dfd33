"""Loss over a validation set: every row exactly once, weighted by tokens, whatever the batch size or world size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from llmkit.interfaces import Batch, LossSum, Model, Objective
from llmkit.metrics.language_modelling import loss_metrics

SumOverRanks = Callable[[Sequence[float]], list[float]]


class TrainModule(nn.Module):
    """Model and objective as one module, so that a forward pass under DDP covers the loss as well."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> LossSum:
        model: Model = self.model  # type: ignore[assignment]
        return self.objective.loss(model, batch)


@torch.no_grad()
def evaluate_loss(
    module: nn.Module,
    batches: Iterable[Batch],
    *,
    n_bytes: int,
    device: torch.device,
    sum_over_ranks: SumOverRanks = list,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """``val/...`` metrics, or None when ``should_stop`` cut the pass short on any rank.

    ``batches`` are this rank's share. The sums stay on the device and are added in float64 at the end: one host sync an
    evaluation.
    """
    was_training = module.training
    module.eval()
    losses: list[Tensor] = []
    n_targets = 0
    cut_short = False
    try:
        for batch in batches:
            cut_short = should_stop()
            if cut_short:
                break
            losses.append(module(batch.to(device, non_blocking=True)).sums["nll"])
            n_targets += batch.n_targets
    finally:
        module.train(was_training)
    nll = torch.stack(losses).cpu().double().sum().item() if losses else 0.0
    total_nll, total_targets, n_cut_short = sum_over_ranks([nll, n_targets, cut_short])
    return None if n_cut_short else loss_metrics(total_nll, int(total_targets), n_bytes)
