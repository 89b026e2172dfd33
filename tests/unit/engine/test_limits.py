"""Steps, tokens, epochs and the global batch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmkit.engine.limits import global_batch_size, grad_accum_steps_for, steps_to_run
from llmkit.errors import ConfigError
from tests.unit.engine.settings import ENGINE


def test_smallest_limit_wins_and_rounds_up() -> None:
    engine = replace(ENGINE, max_steps=100, max_tokens=1001, max_epochs=None)
    assert steps_to_run(engine, batch_size=2, seq_len=10, n_sequences=50) == 51
    engine = replace(ENGINE, max_steps=100, max_tokens=None, max_epochs=1.5)
    assert steps_to_run(engine, batch_size=2, seq_len=10, n_sequences=51) == 39
    assert steps_to_run(replace(engine, max_epochs=None), batch_size=2, seq_len=10, n_sequences=None) == 100


def test_no_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match="when to stop"):
        steps_to_run(replace(ENGINE, max_steps=None), batch_size=1, seq_len=1, n_sequences=1)


def test_global_batch_is_kept_on_another_number_of_processes() -> None:
    engine = replace(ENGINE, micro_batch_size=2, grad_accum_steps=4)
    saved = global_batch_size(engine, world_size=2)
    assert saved == 16
    assert [grad_accum_steps_for(saved, engine, world) for world in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(ConfigError, match="16 sequences") as caught:
        grad_accum_steps_for(saved, replace(engine, micro_batch_size=3), 2)
    assert "[1, 2, 4, 8]" in caught.value.fix
    with pytest.raises(ConfigError) as caught:
        grad_accum_steps_for(saved, engine, 3)
    assert "divides 16" in caught.value.fix
