"""Every recipe that ships composes, is right, and says what it is."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from llmkit.commands.recipes import listing, recipe_files, run
from tests.unit.config.helpers import checked

N_RECIPES = 14
RECIPES = recipe_files(None)


def test_none_is_missing() -> None:
    assert len(RECIPES) == N_RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_right_and_names_its_run(name: str) -> None:
    """Some want to be told the text; nothing else may be missing."""
    assert checked(f"recipe={name}", "data.path=x.txt").run.name == name


def test_the_list_has_a_line_for_each() -> None:
    lines = list(listing(None))
    for name in RECIPES:
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert len(line.removeprefix(name).strip()) > 20


def test_published_sizes() -> None:
    """As transformers counts them: 124 M in GPT-2 (Radford et al. 2019), 1.1 B in TinyLlama (Zhang et al. 2024)."""
    from llmkit.config.build import build

    small = build(checked("recipe=gpt_small").model | {"vocab_size": 50257})
    assert small.n_params() == 124_439_808
    encoders = {"bert_base": 30522, "roberta_base": 50265, "modern_bert_base": 50368}
    sizes = {
        name: build(checked(f"recipe={name}").model | {"vocab_size": rows}).n_params()
        for name, rows in encoders.items()
    }
    assert sizes["bert_base"] == 110_106_428, "transformers counts as many in BertForPreTraining"
    assert sizes["roberta_base"] == 124_697_433 - 2 * 768, "and two position rows more, which no token uses"
    assert sizes["modern_bert_base"] == 149_655_232
    t5 = build(checked("recipe=t5_small").model | {"vocab_size": 32128})
    assert t5.n_params() == 76_961_152
    large = build(checked("recipe=llama_1b").model | {"vocab_size": 32000})
    assert large.n_params() == 1_100_048_384


def test_published_batches() -> None:
    cfg = checked("recipe=gpt_small")
    assert cfg.engine.micro_batch_size * cfg.engine.grad_accum_steps * cfg.data.seq_len == 2**19
    for name, sequences in (("bert_base", 256), ("roberta_base", 8000), ("modern_bert_base", 4608), ("t5_small", 128)):
        engine = checked(f"recipe={name}").engine
        assert engine.micro_batch_size * engine.grad_accum_steps == sequences
    cfg = checked("recipe=llama_1b")
    assert cfg.engine.micro_batch_size * cfg.engine.grad_accum_steps * cfg.data.seq_len == 2**21


def test_show(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "ours.yaml").write_text("# @package _global_\n# What we train.\nrun:\n  name: ours\n")
    assert run(None, argparse.Namespace(overrides=["show", "ours"], config_dir=str(tmp_path))) == 0
    shown = capsys.readouterr().out
    assert "# What we train." in shown
    assert "  name: ours\n  root: runs" in shown
    assert run(None, argparse.Namespace(overrides=["show", "shakespeare"], config_dir=None)) == 0
    assert "path: ???" in capsys.readouterr().out, "a recipe that wants to be told the text is shown all the same"
    assert run(None, argparse.Namespace(overrides=[], config_dir=str(tmp_path))) == 0
    assert "ours" in capsys.readouterr().out
