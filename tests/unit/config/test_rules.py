"""Values that are right alone and wrong together."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.config.choices import recipes_dir
from llmkit.config.rules import RULES
from tests.unit.config.helpers import checked, problems

BROKEN = {
    "run_name": (["run.name=a/b"], "run.name"),
    "run_root": (["run.root="], "run.root"),
    "device": (["engine.device=gpu"], "engine.device"),
    "half_precision": (["engine.device=cpu", "engine.precision=fp16"], "engine.precision"),
    "stop_rule": (["engine.max_steps=null"], "engine.max_steps"),
    "zero_limits": (["engine.max_epochs=0"], "engine.max_epochs"),
    "warmup": (["schedule.warmup_steps=201"], "schedule.warmup_steps"),
    "best_is_saved": (["engine.patience=2", "engine.save_every=30"], "engine.save_every"),
    "context": (["data.seq_len=512"], "data.seq_len"),
    "vocabulary": (["model.vocab_size=4000"], "model.vocab_size"),
    "trainable": (["objective=masked_lm", "tokenizer=wordpiece"], "objective"),
    "pair_rows": (["recipe=bert_tiny", "data.seq_len=15"], "data.seq_len"),
    "symbols": (["objective=fill_in_the_middle"], "tokenizer"),
    "architecture": (["model=transformers"], "model.model_type"),
    "weights": (["data.path=[a,b]", "data.weights=[1]"], "data.weights"),
    "paths": (["data.path=[]"], "data.path"),
    "added_tokens": (["add_tokens=[<|user|>]"], "add_tokens"),
    "old_text": (["data.old_val_path=old.txt"], "data.old_val_path"),
    "held_out_twice": (["data.val_path=b.txt", "data.val_fraction=0.2"], "data.val_fraction"),
    "init_decides": (["init=runs/x", "model.d_model=512"], "model.d_model"),
}


def test_every_rule_has_a_case() -> None:
    # of other commands: below, tests/integration, test_export.py
    elsewhere = {"beams", "samples", "evaluates_everything", "exported_types"}
    assert {rule.__name__ for rule in RULES} == set(BROKEN) | elsewhere


@pytest.mark.parametrize("rule", BROKEN)
def test_broken(rule: str) -> None:
    overrides, path = BROKEN[rule]
    assert list(problems(*overrides)) == [path]


@pytest.mark.parametrize(
    "overrides",
    [
        ["run.name=" + "a" * 128],
        ["engine.device=cuda:3", "engine.precision=fp16"],
        ["engine.max_steps=null", "engine.max_epochs=0.5"],
        ["schedule.warmup_steps=200"],
        ["engine.max_grad_norm=null"],
        ["engine.patience=2", "engine.save_every=50"],
        ["engine.patience=2", "engine.save_every=null", "engine.eval_every=null"],
        ["model.max_seq_len=256"],
        ["model.vocab_size=4096"],
        ["data.path=[a,b]", "data.weights=[1,2]"],
        ["init=runs/x", "optim.lr=1"],
        ["init=runs/x", "recipe=gpt_small"],
        ["init=runs/x", "model=transformers", "model.task=causal_lm", "model.max_seq_len=512"],
        ["model=transformers", "model.model_type=gpt_neo", "model.settings={num_layers: 2}"],
        ["init=runs/x", "data.seq_len=4096"],
        ["init=runs/x", "model.max_seq_len=4096", "~tracking.wandb"],
    ],
)
def test_allowed_unless_it_has_no_effect(overrides: list[str]) -> None:
    found = problems(*overrides)
    assert set(found) <= {"model.max_seq_len"}
    assert bool(found) == ("model.max_seq_len=4096" in overrides)


def test_init_still_decides_what_a_wrapped_model_is() -> None:
    found = problems("init=runs/x", "model=transformers", "model.model_type=opt", "model.settings={num_layers: 2}")
    assert set(found) == {"model.model_type", "model.settings", "model.settings.num_layers"}


@pytest.mark.parametrize("name", [".", "..", "...", "a/b", "/a", "a\\b", "", "a" * 129, "ü", "a b"])
def test_run_names_that_are_no_folder_name(name: str) -> None:
    assert list(problems(f"run.name={name}")) == ["run.name"]


def test_warmup_is_compared_with_the_tokens_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 sequences of 256 tokens a step and process: 409,600 tokens are 100 steps, on two processes 50."""
    line = ["engine.max_steps=null", "engine.max_tokens=409600"]
    assert checked(*line, "schedule.warmup_steps=100")
    assert "after 100" in problems(*line, "schedule.warmup_steps=101")["schedule.warmup_steps"].what
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "after 50" in problems(*line, "schedule.warmup_steps=100")["schedule.warmup_steps"].what


def test_a_rule_whose_value_is_already_wrong_is_silent() -> None:
    assert list(problems("engine.max_steps=none", "schedule.warmup_steps=10000")) == ["engine.max_steps"]


def test_a_recipe_whose_model_was_exchanged() -> None:
    """What the recipe says of its own model is one mistake, and the recipes of the new one are offered."""
    found = problems("recipe=bert_tiny", "model=llama", "model.d_modell=3")
    assert set(found) == {"model", "model.d_modell", "objective"}
    assert "model.n_segments, model.pooler" in found["model"].what
    assert "recipe=bert_tiny" in found["model"].what
    assert "recipe=llama_1b|llama_tiny|shakespeare" in found["model"].fix
    assert "model.d_model?" in found["model.d_modell"].fix
    assert found["objective"].fix.startswith("recipe=llama_1b|llama_tiny|shakespeare is made for model=llama; else ")


def test_a_recipe_beside_a_wrapped_model_of_init() -> None:
    """What the recipe says of its own model is what is too much: the model is to be opened from ``init``."""
    found = problems("recipe=bert_tiny", "model=transformers", "init=runs/x")
    assert found["model"].fix.startswith("leave recipe=bert_tiny out, and")
    assert "leave model=transformers out" in problems("recipe=bert_tiny", "model=transformers")["model"].fix


def test_recipes_of_the_usual_option_are_offered_too() -> None:
    found = problems("recipe=gpt_tiny", "optim=adamw")
    assert set(found) == {"optim"}
    assert "gpt_small" in found["optim"].fix
    assert "gpt_tiny" not in found["optim"].fix


def test_a_recipe_without_a_home_is_left_out(tmp_path: Path) -> None:
    """No recipe is made for the model; and what the model's own file has wrong is no matter of the recipe."""
    found = problems("recipe=bert_tiny", "model=lstm_seq2seq")
    assert found["model"].fix == "write a recipe of your own, or leave model=lstm_seq2seq out"
    (tmp_path / "model").mkdir()
    lines = (recipes_dir() / "model" / "llama.yaml").read_text()
    (tmp_path / "model" / "mine.yaml").write_text(lines + "\nd_modell: 3\n")
    mine = problems("recipe=llama_tiny", "model=mine", config_dir=tmp_path)
    assert "model.d_model?" in mine["model.d_modell"].fix
    own = tmp_path / "own.yaml"
    own.write_text("defaults:\n  - override /model: bert\nmodel:\n  n_segments: 2\n")
    assert "model.n_segments" in problems(f"recipe={own}", "model=llama")["model"].what


@pytest.mark.parametrize(
    ("overrides", "command", "is_wrong"),
    [
        (["recipe=bert_tiny", "data.seq_len=16"], "pretrain", False),
        (["recipe=bert_tiny", "data.seq_len=null", "model.max_seq_len=12"], "pretrain", True),
        (["recipe=bert_tiny", "data.seq_len=8", "objective=sentence_order"], "pretrain", True),
        (["init=runs/x", "recipe=bert_tiny", "data.seq_len=8"], "pretrain", True),
        (["init=runs/x", "recipe=bert_tiny", "data.seq_len=null"], "pretrain", False),
        (["recipe=gpt_tiny", "data.seq_len=8"], "pretrain", False),
        (["init=runs/x", "objective=next_sentence", "data.seq_len=8"], "evaluate", True),
        (["init=runs/x", "data.seq_len=8"], "evaluate", False),
    ],
)
def test_rows_that_hold_no_pair(overrides: list[str], command: str, is_wrong: bool) -> None:
    found = problems(*overrides, command=command)
    assert set(found) == ({"data.seq_len"} if is_wrong else set())
    assert not is_wrong or found["data.seq_len"].fix == "set data.seq_len to at least 16"


@pytest.mark.parametrize(
    ("overrides", "wrong"),
    [
        (["n_beams=4"], []),
        (["n_beams=4", "temperature=0", "top_k=null", "length_penalty=0.6"], []),
        (["n_beams=4", "temperature=0.7", "top_k=5", "top_p=0.9"], ["temperature", "top_k", "top_p"]),
        (["temperature=0.7", "top_k=5"], []),
        (["length_penalty=1.0"], ["length_penalty"]),
        (["n_beams=0"], ["n_beams"]),
        (["no_repeat_ngram_size=0"], ["no_repeat_ngram_size"]),
    ],
)
def test_beams_need_no_temperature_and_take_none(overrides: list[str], wrong: list[str]) -> None:
    found = problems("init=runs/x", *(f"generation.{line}" for line in overrides), command="generate")
    assert list(found) == [f"generation.{name}" for name in wrong]


@pytest.mark.parametrize(
    ("overrides", "wrong"),
    [
        (["task.k=[1]"], None),
        (["task.k=[1,5]"], "generation.temperature"),
        (["task.k=[1,5]", "generation.temperature=0.8"], None),
        (["task.k=[1,5]", "generation.n_beams=2"], "generation.n_beams"),
        (["task.k=[1,5]", "task.run_code=false"], None),
    ],
)
def test_several_texts_for_a_question_must_differ(overrides: list[str], wrong: str | None) -> None:
    line = ["init=runs/x", "task=code", "data.path=x.jsonl", "task.run_code=true", *overrides]
    assert list(problems(*line, command="evaluate_task")) == ([] if wrong is None else [wrong])


def test_too_long_a_warm_up_comes_with_a_length_that_fits() -> None:
    found = problems("recipe=gpt_tiny", "engine.max_steps=40", "schedule.warmup_steps=41")["schedule.warmup_steps"]
    assert found.fix == "set schedule.warmup_steps=4, or let the run be longer"
