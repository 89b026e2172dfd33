"""The positions of a batch that a loss looks at, and the hidden states of these alone.

The last block of a model needs keys and values of every position, but what comes after them only where somebody looks:
of a masked LM at 15 % of the positions, of a classifier at one a text. What is left out has no influence on the loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from llmkit.interfaces import IGNORE_INDEX, Batch, Model

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class LooksAtPlaces(Protocol):
    """A model that can leave out what only the other positions would need."""

    def states_at(self, batch: Batch, places_P: Tensor) -> Tensor:
        """PD: ``hidden_states(batch).flatten(0, 1)[places_P]``."""


def states_at(model: Model, batch: Batch, places_P: Tensor) -> Tensor:
    """PD: the hidden states at these of the B T positions, counted row by row."""
    if isinstance(model, LooksAtPlaces):
        return model.states_at(batch, places_P)
    return model.hidden_states(batch).flatten(0, 1).index_select(0, places_P)


def predicted_places(batch: Batch) -> Tensor | None:
    """The positions with a label, where less than half have one; None: take them all.

    The choice rests on a count known on the host, so that no device has to be waited for.
    """
    import torch

    labels_P = batch.labels.flatten()
    if 2 * batch.n_targets >= labels_P.shape[0]:
        return None
    return torch.nonzero_static(labels_P != IGNORE_INDEX, size=batch.n_targets).squeeze(1)


def predicted_states(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """(states PD, labels P) for a loss over the labelled positions; others may be among them, without a label."""
    places_P, labels_P = predicted_places(batch), batch.labels.flatten()
    if places_P is None:
        return model.hidden_states(batch).flatten(0, 1), labels_P
    return states_at(model, batch, places_P), labels_P.index_select(0, places_P)
