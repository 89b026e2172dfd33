"""What the configuration check imports never imports torch, and the command line imports nothing at all."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.architecture.test_yaml_fields import TARGETS

CONFIG = [f"llmkit.config.{name}" for name in ("check", "compose", "build", "help", "sweep", "rules", "resume")]


def loaded_by(module: str) -> set[str]:
    program = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_command_line_is_light() -> None:
    heavy = {"torch", "hydra", "omegaconf", "rich", "wandb", "numpy", "yaml", "accelerate", "sentencepiece"}
    assert not loaded_by("llmkit.cli") & heavy
    assert not loaded_by("llmkit") & heavy


@pytest.mark.parametrize("module", ["llmkit.config", *sorted({target.rpartition(".")[0] for target in TARGETS})])
def test_classes_named_by_a_target_import_without_torch(module: str) -> None:
    modules = ", ".join(CONFIG) if module == "llmkit.config" else module
    assert not loaded_by(modules) & {"torch", "wandb", "accelerate", "transformers"}
