"""The loss over a batch's labelled tokens, which every objective has. Imports without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmkit.interfaces import Batch, LossSum, Model, Roles
from llmkit.objectives.chunks import auto_chunk_size
from llmkit.objectives.places import predicted_states

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TokenPrediction:
    """Cross entropy of labelled tokens, with optional smoothing and z-loss (formulas in ``linear_cross_entropy.py``).

    What an objective adds is which tokens it labels: ``window`` and ``collate``.
    """

    reads: ClassVar[str] = "windows"
    scores_all_text: ClassVar[bool] = False

    label_smoothing: float
    z_loss: float
    chunk_size: int | None

    def problems(self) -> list[tuple[str, str]]:
        found = []
        if not 0 <= self.label_smoothing < 1:
            found.append(("label_smoothing", "must be in [0, 1)"))
        if not self.z_loss >= 0:
            found.append(("z_loss", "must be at least 0"))
        if self.chunk_size is not None and self.chunk_size < 1:
            found.append(("chunk_size", "must be null or at least 1"))
        return found

    @property
    def predicted_share(self) -> float:
        return 1.0

    def target_len(self, seq_len: int) -> int:
        return 0

    def lacks(self, ids: Roles, seq_len: int) -> tuple[str, str] | None:
        return None

    def logit_rows(self, n_rows: int, vocab_size: int) -> int:
        """Of ``n_rows`` tokens, those whose logits are held at once; null chunks as on a GPU, which takes most."""
        return min(n_rows, self.chunk_size or auto_chunk_size(vocab_size, "cuda"))

    def loss(self, model: Model, batch: Batch) -> LossSum:
        """Summed over the labelled tokens of the batch."""
        return self.token_loss(model, *predicted_states(model, batch), batch.n_targets)

    def token_loss(self, model: Model, hidden_PD: Tensor, labels_P: Tensor, n_targets: int) -> LossSum:
        """``loss`` from hidden states, ``n_targets`` of which have a label; the others cost no product."""
        from llmkit.objectives.linear_cross_entropy import linear_cross_entropy

        parts = linear_cross_entropy(
            model.output_states(hidden_PD),
            model.output_weight_VD,
            labels_P,
            bias_V=model.output_bias_V,
            softcap=model.logit_softcap,
            n_targets=n_targets,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            chunk_size=self.chunk_size,
        )
        sums = {"nll": parts.nll, "n_correct": parts.n_correct} | ({"z_loss": parts.z_loss} if self.z_loss else {})
        return LossSum({"token": parts.loss}, sums)

    @property
    def sum_names(self) -> tuple[str, ...]:
        return ("nll", "n_correct", "z_loss") if self.z_loss else ("nll", "n_correct")

    def metrics(self, sums: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
        """``loss`` in nats and ``accuracy`` in 0 .. 1, both per labelled token."""
        n_targets = max(counts["token"], 1)
        names = {"nll": "loss", "n_correct": "accuracy", "z_loss": "z_loss"}
        return {names[name]: value / n_targets for name, value in sums.items() if name in names}
