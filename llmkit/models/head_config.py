"""A task head as data: what it answers, and the layers it has. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["class", "span"]


@dataclass(frozen=True)
class HeadConfig:
    """What a head answers: one of ``labels`` for a whole text, or the first and last token of a span.

    ``dropout`` before the output layer; None takes the model's own for classes and none for spans, as BERT has it.
    """

    kind: Kind
    labels: tuple[str, ...] = ()  # of classes, in the order of the logits; empty for spans
    dropout: float | None = None

    @property
    def n_labels(self) -> int:
        """C: logits for every state; 2 for spans, start and end."""
        return len(self.labels) if self.kind == "class" else 2

    @property
    def generic(self) -> bool:
        """Whether the labels are only numbered, as transformers names those that nobody named."""
        return self.labels == numbered_labels(len(self.labels))

    def answers_as(self, other: HeadConfig) -> bool:
        """Whether weights of this head mean the same as those of ``other``: equal labels, or numbered here."""
        same_size = self.kind == other.kind and self.n_labels == other.n_labels
        return same_size and (self.labels == other.labels or self.generic)

    def for_model(self, dropout: float) -> HeadConfig:
        """The same with its dropout settled, in a model whose own is ``dropout``."""
        own = dropout if self.kind == "class" else 0.0
        return replace(self, dropout=own if self.dropout is None else self.dropout)

    def problems(self) -> list[tuple[str, str]]:
        """Every value that is out of range or contradicts another: (field, message)."""
        found = []
        if self.kind == "class" and len(self.labels) < 2:
            found.append(("labels", f"must be at least 2, got {len(self.labels)}"))
        if self.kind == "span" and self.labels:
            found.append(("labels", "have no meaning for spans"))
        if len(set(self.labels)) < len(self.labels):
            found.append(("labels", "must differ from one another"))
        if self.dropout is not None and not 0 <= self.dropout < 1:
            found.append(("dropout", "must be null or in [0, 1)"))
        return found


@dataclass(frozen=True)
class HeadShape:
    """The layers: dropout, dense, activation and norm where there is an activation; dropout; output.

    BERT, RoBERTa: tanh (Devlin et al. 2019, Liu et al. 2019, published code). DistilBERT: ReLU. ELECTRA: GELU.
    ModernBERT: GELU and a norm. Decoders: the output alone, without a bias.
    """

    activation: Literal["tanh", "relu", "gelu"] | None = None
    drop_input: bool = False  # dropout before the dense layer too
    dense_bias: bool = True
    norm_eps: float | None = None  # None: no norm
    norm_bias: bool = True
    out_bias: bool = True

    def same_function(self, other: HeadShape) -> bool:
        """Whether the same weights give the same logits, dropout aside."""
        return replace(self, drop_input=other.drop_input) == other


def numbered_labels(n: int) -> tuple[str, ...]:
    """LABEL_0, LABEL_1 ..."""
    return tuple(f"LABEL_{i}" for i in range(n))
