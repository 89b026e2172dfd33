"""The composed tree is Hydra's; origins and meanings are known; every mistake becomes a problem."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from llmkit.config.choices import recipes_dir, version_base
from llmkit.config.compose import compose, leaves
from llmkit.errors import ConfigError
from tests.unit.config.helpers import checked, problems

RECIPES = sorted(path.stem for path in (recipes_dir() / "recipe").glob("*.yaml"))

MINE = """\
# My own recipe.
defaults:
  - override /model: gpt2
  - gpt_tiny
  - _self_

run:
  name: mine
model:
  d_model: 96
"""


def mine(folder: Path, text: str = MINE) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def by_hydra(*overrides: str) -> object:
    with initialize_config_dir(str(recipes_dir()), **version_base()):
        return OmegaConf.to_container(hydra_compose("pretrain", list(overrides)), resolve=True)


@pytest.mark.parametrize(
    "overrides",
    [
        *[(f"recipe={name}",) for name in RECIPES],
        ("model=gpt2", "optim=muon", "schedule=wsd", "tracking=none", "callbacks=none", "data=python_source"),
        ("recipe=gpt_small", "model=llama", "model.d_model=64", "optim.betas=[0.8,0.9]", "data.path=[a,b]"),
        ("~tracking.wandb", "+callbacks.more={_target_: x}", "tracking.console={live: false}"),
    ],
)
def test_the_tree_is_the_one_that_hydra_composes(overrides: tuple[str, ...]) -> None:
    composed = compose("pretrain", overrides)
    assert not composed.problems
    assert composed.plain == by_hydra(*overrides)


def test_layers_group_then_recipe_then_command_line() -> None:
    assert checked().model["d_model"] == 256
    assert checked("recipe=gpt_small").model["d_model"] == 768
    assert checked("recipe=gpt_small", "model.d_model=96").model["d_model"] == 96
    assert checked("model.d_model=96", "recipe=gpt_small").model["d_model"] == 96
    assert checked("recipe=gpt_small", "model=llama").model["norm"] == "rmsnorm"


def test_a_recipe_of_the_users_own(tmp_path: Path) -> None:
    cfg = checked(f"recipe={mine(tmp_path)}", "optim.lr=1e-4")
    assert (cfg.run.name, cfg.model["d_model"], cfg.model["position"]) == ("mine", 96, "learned")
    assert cfg.engine.max_steps == checked("recipe=gpt_tiny").engine.max_steps


def test_origin_and_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    composed = compose("pretrain", [f"recipe={mine(tmp_path)}", "optim.lr=1e-4"])
    assert composed.origin("optim.lr") == "command line"
    assert composed.origin("model.d_model") == "mine.yaml:10"
    assert composed.origin("model.n_layers").endswith("recipes/model/gpt2.yaml:6")
    line = (recipes_dir() / "recipe" / "gpt_tiny.yaml").read_text().splitlines().index("engine:") + 2
    assert composed.origin("engine.max_steps").endswith(f"recipes/recipe/gpt_tiny.yaml:{line}")
    assert composed.meaning("optim.lr").startswith("peak learning rate")
    assert composed.meaning("model.d_model") == "width of the residual stream"


def test_differences_are_those_from_the_recipe() -> None:
    composed = compose("pretrain", ["recipe=gpt_small", "optim.lr=1e-4", "model.n_heads=8"])
    assert composed.differences() == [("model.n_heads", 12, 8), ("optim.lr", 6e-4, 1e-4)]
    assert compose("pretrain", ["recipe=gpt_tiny"]).differences() == []


@pytest.mark.parametrize(
    ("override", "path", "fix"),
    [
        ("recipe=gpt_tiy", "recipe", "did you mean gpt_tiny?"),
        ("model=lama", "model", "did you mean llama?"),
        ("schedule=zzz", "schedule", "one of constant, cosine"),
        ("data=notes/*.txt", "data", "did you mean data.path=notes/*.txt?"),
        ("model=null", "model", "one of bart, bert, gpt2, llama"),
        ("recipe=none.yaml", "recipe", ""),
        ("run.name.x=1", "run.name.x", "set run.name as a whole"),
        ("~model", "~model", ""),
        ("~optim.lr", "~optim.lr", "optim.lr=null"),
        ("~tracking.wand", "~tracking.wand", "~tracking.wandb"),
    ],
)
def test_wrong_choices_and_places(override: str, path: str, fix: str) -> None:
    found = problems(override)
    assert list(found) == [path]
    assert fix in found[path].fix
    assert found[path].origin == "command line"


def test_a_misspelt_recipe_does_not_hide_the_other_mistakes() -> None:
    found = problems("recipe=gpt_tiy", "model.d_modl=3", "optim.lr=fast")
    assert set(found) == {"recipe", "model.d_modl", "optim.lr"}
    found = problems("recipe=zzzzzz", "optim.lr=fast", "data=files")
    assert set(found) == {"recipe", "optim.lr"}, "data.path is not judged: the recipe meant may set it"


@pytest.mark.parametrize(
    ("text", "path", "line", "fix"),
    [
        ("run:\n  nam: x\n", "run.nam", 2, "run.name"),
        ("modle:\n  d_model: 3\n", "modle", 1, "model"),
        ("optim:\n  lr: fast\n", "optim.lr", 2, ""),
        ("defaults:\n  - override /model: gtp2\n", "model", 1, "gpt2"),
        ("defaults:\n  - override model: gpt2\n  - override /modle: gpt2\n", "defaults", 1, "override /model"),
        ("optim:\n  lr: ${oc.env:LLMKIT_NOT_SET}\n", "optim.lr", 2, ""),
    ],
)
def test_mistakes_in_a_recipe_are_located(tmp_path: Path, text: str, path: str, line: int, fix: str) -> None:
    found = problems(f"recipe={mine(tmp_path, text)}")
    assert list(found) == [path]
    assert found[path].origin.endswith(f"mine.yaml:{line}")
    assert fix in found[path].fix


def test_interpolations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_TEST_STEPS", "77")
    cfg = checked("engine.max_steps=${oc.env:LLMKIT_TEST_STEPS}", "run.name=s${run.seed}")
    assert (cfg.engine.max_steps, cfg.run.name) == (77, "s1337")
    found = problems(
        "run.name=${oc.env:LLMKIT_NOT_SET}",
        "data.path=${data.val_path}",
        "data.val_path=${data.path}",
        "init=${",
        "optim.betas=[0.9,${nothing.here}]",
    )
    assert set(found) == {"run.name", "data.path", "data.val_path", "init", "optim.betas.1"}
    assert "LLMKIT_NOT_SET" in found["run.name"].what


def test_a_config_folder_wins_over_the_packaged_one(tmp_path: Path) -> None:
    (tmp_path / "optim").mkdir()
    (tmp_path / "recipe").mkdir()
    sgd = "_target_: torch.optim.SGD\nlr: 0.1  # rate\nmomentum: 0.9\n"
    (tmp_path / "optim" / "sgd.yaml").write_text(sgd)
    (tmp_path / "recipe" / "gpt_tiny.yaml").write_text("# @package _global_\nrun:\n  name: ours\n")
    cfg = checked("recipe=gpt_tiny", "optim=sgd", config_dir=tmp_path)
    assert (cfg.run.name, cfg.optim) == ("ours", {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9})
    found = problems("optim=sg", config_dir=tmp_path)
    assert "sgd" in found["optim"].fix
    (tmp_path / "optim" / "bomb.yaml").write_text("a: !!python/name:os.system\n")
    with pytest.raises(ConfigError, match="tags"):
        compose("pretrain", [], tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        compose("pretrain", [], tmp_path / "none")


def test_a_broken_group_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "odd.yaml").write_text("defaults:\n  - nothing_here\n")
    with pytest.raises(ConfigError, match="nothing_here"):
        compose("pretrain", ["model=odd"], tmp_path)


def test_prepare_takes_the_line_of_the_pretrain_command() -> None:
    cfg = checked("recipe=gpt_small", "optim.lr=1e-3", command="prepare")
    assert (cfg.data.seq_len, cfg.tokenizer["vocab_size"]) == (1024, 50257)
    assert set(problems("optim.lrr=1", command="prepare")) == {"optim.lrr"}


def test_leaves() -> None:
    assert dict(leaves({"a": {"b": 1, "c": {}}, "d": [1]})) == {"a.b": 1, "a.c": {}, "d": [1]}
