"""An objective and a model together: may the one train the other, and what does a token cost?

Free of torch: the config check and the plan ask before anything is built.
"""

from __future__ import annotations

from typing import Any

from llmkit.interfaces import Objective


def misfit(objective: Objective, model: Any) -> tuple[str, str] | None:
    """(what is wrong, how to mend it) where ``objective`` cannot train a model of the config ``model``."""
    name, wanted = type(objective).__name__, " or ".join(objective.trains)
    if model.kind not in objective.trains:
        return f"{name} trains a model of the kind {wanted}, {type(model).__name__} is of the kind {model.kind}", ""
    if objective.reads == "rows":  # a task's head is put onto whatever model there is
        return None
    reads_pairs, has_head = objective.reads != "windows", getattr(model, "pooler", False)
    if reads_pairs and not has_head:
        return f"{name} needs a model with a head for pairs", "set model.pooler=true"
    if reads_pairs and model.n_segments == 1:
        return f"{name} gives two segments, the model has a table for one", "set model.n_segments=2 (or 0: no table)"
    if has_head and not reads_pairs:
        return f"{name} does not train the model's head for pairs", "set model.pooler=false"
    return None


def flops_per_token(objective: Objective, model: Any, seq_len: int) -> int:
    """FLOPs of one training token, forward and backward (``flops_per_token`` of the model has the formula).

    An objective that predicts some of the tokens only spares the others the head: ``6 (1 - share) head_params``.
    """
    every_token: int = model.flops_per_token(seq_len, objective.target_len(seq_len))
    spared = 1 - objective.predicted_share
    return every_token - (round(6 * spared * _head_params(model)) if spared else 0)


def _head_params(model: Any) -> int:
    """Weights between the hidden states and the logits over the vocabulary."""
    if hasattr(model, "head_params"):
        return int(model.head_params())
    return int(model.vocab_rows * model.d_model)
