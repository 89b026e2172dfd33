"""Only allowed classes are built, and only from arguments that they name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from llmkit.config import targets
from llmkit.config.build import build
from llmkit.engine.callbacks import SampleText
from llmkit.engine.optim import AdamW
from llmkit.errors import ConfigError

ADAMW = {"_target_": "llmkit.engine.optim.AdamW", "lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
ADAMW |= {"layer_decay": 1.0}


@pytest.fixture(autouse=True)
def _allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_allowed", list(targets.allowed_prefixes()))
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_node_of_llmkit() -> None:
    assert build(ADAMW) == AdamW(lr=1e-3, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, layer_decay=1.0)


def test_runtime_arguments_go_to_those_that_name_them() -> None:
    tokenizer = object()
    node = {"prompts": [], "max_new_tokens": 1, "temperature": 0, "top_k": None, "seed": 0}
    made = build({"_target_": "llmkit.engine.callbacks.SampleText"} | node, tokenizer=tokenizer)
    assert isinstance(made, SampleText)
    assert made.tokenizer is tokenizer
    assert build(ADAMW, tokenizer=tokenizer) == build(ADAMW)


def test_an_optimizer_of_torch() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2))]
    made = build({"_target_": "torch.optim.SGD", "lr": 0.5, "momentum": 0.9}, params=weights)
    assert isinstance(made, torch.optim.SGD)
    assert made.param_groups[0]["momentum"] == 0.9
    with pytest.raises(ConfigError, match="no argument 'momentumm'"):
        build({"_target_": "torch.optim.SGD", "lr": 0.5, "momentumm": 0.9}, params=weights)
    with pytest.raises(ConfigError, match="Invalid momentum"):
        build({"_target_": "torch.optim.SGD", "lr": 0.5, "momentum": -1.0}, params=weights)


def test_missing_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="'lr' is missing"):
        build({key: value for key, value in ADAMW.items() if key != "lr"})


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "logging.os.system",
        "subprocess.Popen",
        "builtins.eval",
        "functools.partial",
        "llmkit.cli.os.system",
        "llmkit.cli.Path",
        "llmkit.cli.main",
        "llmkit.config.build.Mapping",
        "llmkit.commands.recipes.argparse.Namespace",
        "llmkitx.evil.Class",
        "torch.optimizer.Evil",
        "torch.hub.load",
        "torch.optim.adamw.torch.load",
        "llmkit..cli.X",
        "llmkit.",
        "llmkit",
        "",
        None,
        3,
        "llmkit.engine.optim.AdamW()",
        "llmkit.engine.optim.AdamW\n",
    ],
)
def test_forbidden_targets(target: object) -> None:
    with pytest.raises(ConfigError):
        build({"_target_": target})
    with pytest.raises(ConfigError):
        build(ADAMW | {"lr": {"_target_": target}})


PACKAGE = """
from dataclasses import dataclass
from os import path
from subprocess import Popen

@dataclass
class Mine:
    size: int
    inner: object = None

class Loose:
    def __init__(self, a, **rest):
        self.a, self.rest = a, rest
"""


def test_a_package_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own_parts.py").write_text(PACKAGE)
    node = {"_target_": "my_own_parts.Mine", "size": 3, "inner": {"_target_": "my_own_parts.Loose", "a": 1, "b": [2]}}
    with pytest.raises(ConfigError, match="not under") as caught:
        build(node)
    assert caught.value.fix.startswith("--allow my_own_parts")
    targets.allow("my_own_parts")
    made = build(node)
    assert (made.size, made.inner.a, made.inner.rest) == (3, 1, {"b": [2]})
    with pytest.raises(ConfigError, match=r"really subprocess\.Popen"):
        build({"_target_": "my_own_parts.Popen", "args": "true"})
    (tmp_path / "my_broken_parts.py").write_text("1 +")
    targets.allow("my_broken_parts.")
    with pytest.raises(ConfigError, match="SyntaxError"):
        build({"_target_": "my_broken_parts.X"})
    sys.modules.pop("my_own_parts")
