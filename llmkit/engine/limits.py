"""How long a run is: steps, tokens, epochs and hours brought to one number of optimizer steps. Free of torch."""

from __future__ import annotations

import math

from llmkit.errors import ConfigError
from llmkit.settings import EngineConfig


def global_batch_size(engine: EngineConfig, world_size: int) -> int:
    """Sequences per optimizer step over all processes."""
    return engine.micro_batch_size * engine.grad_accum_steps * world_size


def steps_to_run(engine: EngineConfig, *, batch_size: int, seq_len: int, n_sequences: int | None) -> int:
    """The smallest of ``max_steps``, ``max_tokens`` and ``max_epochs``, in steps, the last step rounded up.

    ``batch_size`` is the global batch in sequences. ``n_sequences`` is the size of one epoch, None when not known.
    """
    limits = []
    if engine.max_steps is not None:
        limits.append(engine.max_steps)
    if engine.max_tokens is not None:
        limits.append(math.ceil(engine.max_tokens / (batch_size * seq_len)))
    if engine.max_epochs is not None and n_sequences is not None:
        limits.append(math.ceil(engine.max_epochs * n_sequences / batch_size))
    if not limits:
        raise ConfigError(
            "nothing says when to stop",
            where="engine.max_steps",
            fix="set engine.max_steps, engine.max_tokens or engine.max_epochs",
        )
    return min(limits)


def grad_accum_steps_for(saved_batch_size: int, engine: EngineConfig, world_size: int) -> int:
    """Micro-batches per process that keep the checkpoint's global batch on ``world_size`` processes."""
    per_round = engine.micro_batch_size * world_size
    if saved_batch_size % per_round:
        choices = [m for m in range(1, saved_batch_size + 1) if saved_batch_size % (m * world_size) == 0]
        raise ConfigError(
            f"the checkpoint was written with {saved_batch_size} sequences a step, which {world_size} process(es) "
            f"cannot make from micro-batches of {engine.micro_batch_size}",
            where="engine.micro_batch_size",
            fix=f"set engine.micro_batch_size to one of {choices}"
            if choices
            else f"use a number of processes that divides {saved_batch_size}",
        )
    return saved_batch_size // per_round
