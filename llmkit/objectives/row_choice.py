"""What objectives share that answer each example by a choice: a class, or places in the text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from llmkit.errors import ConfigError
from llmkit.interfaces import Batch, Examples, LossSum, Model, Roles
from llmkit.objectives import r_drop as regularised

if TYPE_CHECKING:
    from torch import Tensor


class Choices(NamedTuple):
    """Scores of what N examples may answer to Q questions each, C choices at most."""

    logits_NQC: Tensor  # minus infinity where an example has no such choice
    labels_NQ: Tensor  # the right ones

    @property
    def real_NQC(self) -> Tensor:
        """False where there is no choice."""
        return ~self.logits_NQC.isneginf()

    def logs(self) -> Tensor:
        """NQC log-probabilities, 0 where there is no choice."""
        return self.logits_NQC.log_softmax(2).masked_fill(~self.real_NQC, 0.0)


@dataclass(frozen=True)
class RowChoice(ABC):
    """Cross entropy of the answers of a task head, per example. The vocabulary has no part in it.

    In training with R-Drop the sums have ``r_drop`` too, which is no name of an evaluation's.
    """

    reads: ClassVar[str] = "rows"
    scores_all_text: ClassVar[bool] = False
    sum_names: ClassVar[tuple[str, ...]] = ("nll", "n_correct")

    label_smoothing: float
    r_drop: float

    @abstractmethod
    def choices(self, model: Model, batch: Batch) -> Choices:
        """What the model says of each example, and what is right."""

    def problems(self) -> list[tuple[str, str]]:
        found = [] if 0 <= self.label_smoothing < 1 else [("label_smoothing", "must be in [0, 1)")]
        return found + regularised.problems(self.r_drop)

    @property
    def predicted_share(self) -> float:
        return 0.0

    def window(self, seq_len: int) -> tuple[int, int]:
        """Rows are examples; none goes on in the next."""
        return seq_len, 0

    def target_len(self, seq_len: int) -> int:
        return 0

    def lacks(self, ids: Roles, seq_len: int) -> tuple[str, str] | None:
        return None

    def logit_rows(self, n_rows: int, vocab_size: int) -> int:
        """Of logits over the vocabulary none are held."""
        return 0

    def loss(self, model: Model, batch: Batch) -> LossSum:
        """Summed over the examples; of an example the mean over its questions."""
        chosen = self.choices(model, batch)
        result = self._summed(chosen)
        if not regularised.passes_twice(model, self.r_drop):
            return result
        again = self.choices(model, batch)
        divergence = regularised.symmetric_divergence(chosen.logs(), again.logs()) / chosen.logits_NQC.shape[1]
        return regularised.joined(result, self._summed(again), divergence, self.r_drop)

    def _summed(self, chosen: Choices) -> LossSum:
        """Smoothing e takes 1 - e of the answer's loss and e of the mean over all choices (Szegedy et al. 2016).

        ``n_correct`` counts examples in which no choice is likelier than the right one, in any question.
        """
        logits_NQC, labels_NQ1 = chosen.logits_NQC, chosen.labels_NQ.unsqueeze(2)
        nll = -logits_NQC.log_softmax(2).gather(2, labels_NQ1).squeeze(2).mean(1).sum()
        loss = nll
        if self.label_smoothing:
            every = -(chosen.logs().sum(2) / chosen.real_NQC.sum(2)).mean(1).sum()
            loss = (1 - self.label_smoothing) * nll + self.label_smoothing * every
        right_NQ = logits_NQC.gather(2, labels_NQ1).squeeze(2) >= logits_NQC.amax(2)
        return LossSum({"example": loss}, {"nll": nll.detach(), "n_correct": right_NQ.all(1).sum()})

    def metrics(self, sums: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
        """``loss`` in nats and ``accuracy`` in 0 .. 1, both per example; ``r_drop`` where it was trained."""
        n_examples = max(counts["example"], 1)
        names = {"nll": "loss", "n_correct": "accuracy", "r_drop": "r_drop"}
        return {names[name]: value / n_examples for name, value in sums.items() if name in names}


def examples_of(batch: Batch) -> Examples:
    """What the batch asks of its examples."""
    assert batch.examples is not None, "a batch of examples says where they are"
    return batch.examples


def head_logits(model: Model, states_PD: Tensor) -> Tensor:
    """What the task head says of states, in fp32 at least. Raises ``ConfigError`` for a model without one."""
    import torch

    head = getattr(model, "task_head", None)
    if head is None:
        raise ConfigError("the model has no head for this task", where="init", fix="fine-tune it on the task first")
    logits: Tensor = head(states_PD)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
