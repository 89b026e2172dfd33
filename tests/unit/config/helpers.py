"""Compose and check in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmkit.config.check import check
from llmkit.config.compose import compose
from llmkit.errors import ConfigError, Problem


def checked(*overrides: str, command: str = "pretrain", config_dir: Path | None = None) -> Any:
    return check(command, compose(command, overrides, config_dir))


def problems(*overrides: str, command: str = "pretrain", config_dir: Path | None = None) -> dict[str, Problem]:
    """Problems by config path; empty for a right configuration."""
    try:
        checked(*overrides, command=command, config_dir=config_dir)
    except ConfigError as error:
        return {problem.path: problem for problem in error.problems}
    return {}
