"""Every mistake is found, all of them at once, and a right configuration passes unchanged."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.config.check import check, known_keys
from llmkit.config.compose import compose, leaves
from llmkit.config.schema import ROOTS
from llmkit.config.yaml_file import dump, read_yaml
from tests.unit.config.helpers import checked, problems

NEEDED = {
    "evaluate": ("init=x", "data.path=x"),
    "generate": ("init=x",),
    "export": ("init=x", "out=y"),
    "finetune": ("task=sentiment",),
    "evaluate_task": ("task=sentiment", "init=x"),
    "predict": ("init=x",),
    "chat": ("init=x",),
    "data_show": ("task=sentiment",),
}


def all_keys(command: str) -> list[str]:
    return known_keys(compose(command, NEEDED.get(command, ())))


@pytest.mark.parametrize("command", ROOTS)
def test_the_defaults_are_right(command: str) -> None:
    assert isinstance(checked(*NEEDED.get(command, ()), command=command), ROOTS[command])


def misspelt(key: str) -> str:
    """One letter of the last word doubled or, where that would be another key, dropped."""
    section, dot, leaf = key.rpartition(".")
    return f"{section}{dot}{leaf[:-1]}{leaf[-1] * 2}"


@pytest.mark.parametrize("command", ["pretrain", "finetune", "evaluate", "generate"])
def test_every_key_misspelt_by_one_letter_is_caught_with_the_right_suggestion(command: str) -> None:
    keys = all_keys(command)
    assert len(keys) > 10
    found = problems(*NEEDED.get(command, ()), *(f"{misspelt(key)}=1" for key in keys), command=command)
    unknown = {path: problem.fix for path, problem in found.items() if "unknown" in problem.what}
    assert unknown == {misspelt(key): f"did you mean {key}?" for key in keys}


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("lr=1", "optim.lr"),
        ("learning_rate=1", "optim.lr"),
        ("engine.batch_size=1", "engine.micro_batch_size"),
        ("n_embd=1", "model.d_model"),
        ("mdl.d_model=1", "model.d_model"),
        ("tracking.wndb.mode=offline", "tracking.wandb.mode"),
        ("model.block_size=1", "model.max_seq_len"),
    ],
)
def test_suggestions_know_other_names_and_sections(override: str, suggestion: str) -> None:
    (problem,) = problems(override).values()
    assert problem.fix == f"did you mean {suggestion}?"


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("engine.compile='true'", "one of auto, true, false"),
        ("engine.max_steps=many", "whole number >= 1 or null, is 'many'"),
        ("engine.max_steps=true", "whole number"),
        ("engine.max_steps=0", ">= 1"),
        ("engine.max_steps=1.5", "whole number"),
        ("optim.lr=nan", "a number"),
        ("optim.lr=0", "above 0"),
        ("data.val_fraction=0.7", "from 0 to 0.5"),
        ("run.resume=Auto", "one of auto, never, must"),
        ("run.seed=null", "is null"),
        ("engine.precision=16", "one of auto, fp32, bf16, fp16"),
        ("optim.betas=[0.9]", "two numbers"),
        ("optim.betas=0.9", "a list of numbers"),
        ("tracking.wandb.tags=a", "a list of texts"),
        ("model.n_heads=7", "must divide d_model (256)"),
        ("data=files", "a value is needed"),
        ("engine=3", "no option"),
        ("data.seq_len=512", "model.max_seq_len is 256"),
    ],
)
def test_wrong_values(override: str, what: str) -> None:
    (problem,) = problems(override).values()
    assert what in problem.what
    assert problem.path.split(".")[0] in (override.split(".")[0].split("=")[0], "data")


def test_right_values_are_fitted() -> None:
    cfg = checked("engine.max_steps=1e3", "optim.lr='1e-4'", "run.name=007", "data.path=[a,b]", "optim.betas=[0,0.9]")
    assert (cfg.engine.max_steps, cfg.optim["lr"], cfg.run.name) == (1000, 1e-4, "007")
    assert (cfg.data.path, cfg.optim["betas"]) == (["a", "b"], [0.0, 0.9])


def test_nodes() -> None:
    assert "not under" in problems("model._target_=os.system")["model._target_"].what
    assert "cannot import" in problems("optim._target_=llmkit.engine.optim.Adm")["optim._target_"].what
    wrong_place = problems("schedule._target_=llmkit.engine.optim.AdamW")
    assert "unknown key" in wrong_place["schedule.min_lr_ratio"].what
    cfg_problem = problems("+callbacks.x={_target_: llmkit.tracking.console.ConsoleTracker, live: true}")
    assert "no on_evaluation" in cfg_problem["callbacks.x._target_"].what
    assert "must be a section" in problems("engine={max_steps: 3}", "run=x")["run"].what
    assert problems("++callbacks.more=3")["callbacks.more"].what.startswith("callbacks has no node 'more'")
    assert "unknown key" in problems("+callbacks.sample_text.tokenizer=x")["callbacks.sample_text.tokenizer"].what


def test_keys_of_the_class_that_was_there_before(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("schedule:\n  _target_: llmkit.engine.schedule.Constant\n  warmup_stps: 3\n")
    found = problems(f"recipe={recipe}")
    assert found["schedule.min_lr_ratio"].origin.endswith("cosine.yaml:4")
    assert "as a group option, schedule=" in found["schedule.min_lr_ratio"].fix
    assert found["schedule.warmup_stps"].fix == "did you mean schedule.warmup_steps?"


def test_trackers_can_be_taken_out_and_added() -> None:
    assert list(checked("~tracking.wandb").tracking) == ["console"]
    extra = "+tracking.more={_target_: llmkit.tracking.console.ConsoleTracker, live: false}"
    assert list(checked(extra).tracking) == ["console", "wandb", "more"]
    assert checked("callbacks=none", "tracking=none").callbacks == {}


def test_twelve_mistakes_at_once(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("engine:\n  sav_every: 3\nrun:\n  seed: -1\n")
    found = problems(
        f"recipe={recipe}",
        "optim.lrr=1",
        "engine.max_steps=many",
        "engine.compile='yes'",
        "model.n_heads=7",
        "data.seq_len=2048",
        "run.name=..",
        "engine.device=gpu",
        "schedule=cosin",
        "tracking.wandb.mode=${oc.env:LLMKIT_NOT_SET}",
        "lr",
    )
    assert set(found) == {
        "engine.sav_every", "run.seed", "optim.lrr", "engine.max_steps", "engine.compile", "model.n_heads",
        "data.seq_len", "run.name", "engine.device", "schedule", "tracking.wandb.mode", "lr",
    }  # fmt: skip


INTS = st.integers(1, 10**6)
CHOICES = {
    "model": st.sampled_from(["gpt2", "llama"]),
    "optim": st.sampled_from(["adamw", "muon"]),
    "schedule": st.sampled_from(["constant", "cosine", "linear", "wsd", "inverse_sqrt"]),
    "data": st.sampled_from(["python_docs", "python_source"]),
    "run.seed": st.integers(0, 2**63 - 1),
    "run.name": st.text("abc019._-", min_size=1, max_size=20).filter(lambda name: name.strip(".")),
    "engine.max_steps": st.integers(100, 10**9),
    "engine.max_epochs": st.none() | st.floats(1e-3, 1e3),
    "engine.micro_batch_size": INTS,
    "engine.precision": st.sampled_from(["fp32", "bf16"]),
    "engine.compile": st.booleans(),
    "optim.lr": st.floats(1e-8, 10, exclude_min=True),
    "data.seq_len": st.integers(2, 256),
    "data.text_field": st.text(max_size=12).filter(lambda text: "${" not in text and "\0" not in text),
    "data.val_fraction": st.floats(0, 0.5),
}


def as_text(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@settings(derandomize=True, max_examples=20, deadline=None)
@given(values=st.fixed_dictionaries({}, optional=CHOICES))
def test_compose_check_dump_and_reload_are_equal(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]
) -> None:
    overrides = [f"{key}={as_text(value)}" for key, value in values.items()]
    composed = compose("pretrain", overrides)
    plain = asdict(check("pretrain", composed))
    for key, value in values.items():
        if "." in key and isinstance(value, int | float | type(None)):
            assert dict(leaves(plain))[key] == value
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(dump(plain), encoding="utf-8")
    assert read_yaml(path).tree == plain
