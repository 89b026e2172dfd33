"""An objective for a model that is there already: what is wrong is mended by what the command has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llmkit.commands.training import check_trainable
from llmkit.config.build import build
from llmkit.errors import ConfigError
from tests.unit.config.helpers import checked


@pytest.mark.parametrize(
    ("recipe", "objective", "changes", "fix"),
    [
        (
            "roberta_tiny",
            "next_sentence",
            {},
            "objective=masked_lm fits the model; recipe=bert_tiny pretrains a model with a head for pairs",
        ),
        ("bert_tiny", "masked_lm", {}, "objective=next_sentence|sentence_order fits the model"),
        ("gpt_tiny", "masked_lm", {}, "objective=causal_lm|fill_in_the_middle fits the model"),
        ("t5_tiny", "causal_lm", {}, "objective=prefix_lm|span_corruption fits the model"),
        (
            "bert_base",
            "sentence_order",
            {"n_segments": 1},
            "recipe=bert_tiny pretrains a model with a head for pairs",
        ),
    ],
)
def test_the_mend_is_no_key_of_the_model(recipe: str, objective: str, changes: dict[str, Any], fix: str) -> None:
    model = replace(build(checked(f"recipe={recipe}").model), **changes)
    with pytest.raises(ConfigError) as caught:
        check_trainable(build(checked("recipe=bert_tiny", "init=runs/x", f"objective={objective}").objective), model)
    assert caught.value.where == "objective"
    assert caught.value.fix == fix


def test_what_fits_is_let_through() -> None:
    for recipe in ("gpt_tiny", "bert_tiny", "roberta_tiny", "t5_tiny", "lstm_tiny"):
        cfg = checked(f"recipe={recipe}")
        check_trainable(build(cfg.objective), build(cfg.model))
