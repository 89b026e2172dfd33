"""What objectives share that train a model to write the answer of a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from llmkit.interfaces import Batch, LossSum, Model
from llmkit.objectives import r_drop as regularised
from llmkit.objectives.places import predicted_states
from llmkit.objectives.token_loss import TokenPrediction


@dataclass(frozen=True)
class SupervisedText(TokenPrediction):
    """The loss over the tokens of answers, with optional smoothing and R-Drop.

    In training with R-Drop the sums have ``r_drop`` too, which is no name of an evaluation's.
    """

    reads: ClassVar[str] = "rows"

    z_loss: float = field(init=False, default=0.0)
    r_drop: float

    def problems(self) -> list[tuple[str, str]]:
        return super().problems() + regularised.problems(self.r_drop)

    def window(self, seq_len: int) -> tuple[int, int]:
        """Rows are examples; none goes on in the next."""
        return seq_len, 0

    def loss(self, model: Model, batch: Batch) -> LossSum:
        """Summed over the tokens of the answers."""
        if not regularised.passes_twice(model, self.r_drop):
            return super().loss(model, batch)
        n_targets = batch.n_targets
        (one_PD, labels_P), (two_PD, _) = (predicted_states(model, batch) for _ in range(2))
        one, two = (self.token_loss(model, states_PD, labels_P, n_targets) for states_PD in (one_PD, two_PD))
        divergence = regularised.token_divergence(model, one_PD, two_PD, labels_P, n_targets, self.chunk_size)
        return regularised.joined(one, two, divergence, self.r_drop)

    def metrics(self, sums: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
        """``loss`` in nats and ``accuracy`` in 0 .. 1, both per token of an answer; ``r_drop`` where it was trained."""
        found = super().metrics(sums, counts)
        return found | ({"r_drop": sums["r_drop"] / max(counts["token"], 1)} if "r_drop" in sums else {})
