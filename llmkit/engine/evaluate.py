"""Metrics over a validation set: every row exactly once, weighted by tokens, whatever the batch size or world size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llmkit.interfaces import Batch, LossSum, Model, Objective
from llmkit.metrics.language_modelling import bits_per_byte, perplexity

COUNTED = {"token": "n_targets", "pair": "n_pairs", "example": "n_examples"}  # ``Batch.counts`` as metrics call them
SumOverRanks = Callable[[Sequence[float]], list[float]]


@dataclass(frozen=True)
class EvalSet:
    """Text to score during training: ``batches`` begins a pass over this rank's share of it.

    ``score`` adds the metrics of answers that the model gives on its own, the same on every rank; None from it says
    that a stop cut it short.
    """

    batches: Callable[[], Iterator[Batch]]
    n_bytes: int
    score: Callable[[], dict[str, float] | None] | None = None


class TrainModule(nn.Module):
    """Model and objective as one module, so that a forward pass under DDP covers the loss as well."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> LossSum:
        model: Model = self.model  # type: ignore[assignment]
        return self.objective.loss(model, batch)


@torch.no_grad()
def evaluate(
    module: TrainModule,
    batches: Iterable[Batch],
    *,
    n_bytes: int,
    device: torch.device,
    prefix: str = "val",
    sum_over_ranks: SumOverRanks = list,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """``<prefix>/...`` metrics, or None when ``should_stop`` cut the pass short on any rank.

    ``batches`` are this rank's share. The sums stay on the device and are added in float64 at the end: one host sync an
    evaluation.
    """
    was_training = module.training
    module.eval()
    names, rows = module.objective.sum_names, []
    counts = dict.fromkeys(COUNTED, 0)
    cut_short = False
    try:
        for batch in batches:
            cut_short = should_stop()
            if cut_short:
                break
            sums = module(batch.to(device, non_blocking=True)).sums
            rows.append(torch.stack([sums[name].float() for name in names]))
            counts = {name: n + batch.counts[name] for name, n in counts.items()}
    finally:
        module.train(was_training)
    own = torch.stack(rows).cpu().double().sum(0).tolist() if rows else [0.0] * len(names)
    *totals, n_cut_short = sum_over_ranks([*own, *counts.values(), cut_short])
    if n_cut_short:
        return None
    sums = dict(zip(names, totals, strict=False))  # the counts come after the sums
    counts = {name: int(n) for name, n in zip(counts, totals[len(names) :], strict=True)}
    metrics = validation_metrics(module.objective, sums, counts, n_bytes)
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def validation_metrics(
    objective: Objective, sums: dict[str, float], counts: dict[str, int], n_bytes: int
) -> dict[str, float]:
    """The objective's metrics, and what follows from the likelihood of the tokens."""
    metrics = objective.metrics(sums, counts)
    if counts["token"]:
        metrics["ppl"] = perplexity(sums["nll"] / counts["token"])
    if objective.scores_all_text and n_bytes:
        metrics["bpb"] = bits_per_byte(sums["nll"], n_bytes)
    found = {COUNTED[name]: n for name, n in counts.items() if n or name == "token"}
    return metrics | found
