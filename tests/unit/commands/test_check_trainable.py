"""An objective for a model that is there already: what is wrong is mended by what the command has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmkit.commands import finetuning
from llmkit.commands.training import check_trainable, load_text
from llmkit.config.build import build
from llmkit.errors import ConfigError
from llmkit.models.hf import save_model
from tests.unit.config.helpers import checked
from tests.unit.models.tiny import built, llama


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


@pytest.mark.parametrize(
    ("change", "where", "fix"),
    [
        ("objective=masked_lm", "objective", "objective=causal_lm|fill_in_the_middle fits the model"),
        ("data.seq_len=33", "data.seq_len", "set data.seq_len to 32 or less"),
    ],
)
def test_a_model_that_is_opened_is_checked_before_any_text_is_read(
    change: str, where: str, fix: str, tmp_path: Path
) -> None:
    """There is no text, and no tokenizer either, of which the errors would be others."""
    save_model(built(llama(max_seq_len=32)), tmp_path)
    cfg = checked("recipe=gpt_tiny", f"init={tmp_path}", f"data.path={tmp_path / 'none.txt'}", change)
    with pytest.raises(ConfigError) as caught:
        load_text(cfg, progress=False)
    assert (caught.value.where, caught.value.fix) == (where, fix)


def test_rows_that_are_longer_than_the_model_takes_are_refused_before_any_is_read(tmp_path: Path) -> None:
    save_model(built(llama(max_seq_len=32)), tmp_path)
    cfg = checked(
        "task=sentiment",
        f"init={tmp_path}",
        f"data.path={tmp_path / 'none.csv'}",
        "data.seq_len=33",
        command="finetune",
    )
    with pytest.raises(ConfigError, match="at most 32") as caught:
        finetuning.make_trainer(cfg, tmp_path, None, lambda: False)  # type: ignore[arg-type]
    assert caught.value.where == "data.seq_len"
