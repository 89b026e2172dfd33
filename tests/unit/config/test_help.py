"""The help page shows every group, option and key with its meaning."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.config.check import known_keys
from llmkit.config.choices import Choices
from llmkit.config.compose import compose
from llmkit.config.help import config_help
from llmkit.config.schema import ROOTS
from llmkit.errors import ConfigError


@pytest.mark.parametrize("command", ["pretrain", "evaluate", "generate", "export"])
def test_every_key_and_option_is_there(command: str) -> None:
    page = config_help(command, [], None)
    keys = known_keys(compose(command, []))
    rows = {line.split()[0]: line for line in page.splitlines() if line.startswith("  ")}
    assert set(keys) <= set(rows)
    for group, options in Choices(command, None).options.items():
        shown = page.partition(f"\n  {group} ")[2].split()  # a long list goes on in the next line
        assert set(options) <= {word.strip("[]") for word in shown[: len(options)]}
    assert max(map(len, page.splitlines())) <= 120


def test_values_types_and_meanings() -> None:
    page = config_help("pretrain", ["recipe=gpt_small", "optim=muon"], None)
    (lr,) = (line for line in page.splitlines() if line.startswith("  optim.lr "))
    assert lr.split(maxsplit=2)[1] == "0.0006"
    assert "peak learning rate of Muon" in lr
    assert "(float)" in lr
    assert "optim.adamw_lr" in page
    assert "[muon]" in page


def test_prepare_shows_the_part_that_it_reads() -> None:
    page = config_help("prepare", [], None)
    assert "data.path" in page
    assert "optim.lr " not in page


def test_a_wrong_choice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        config_help("pretrain", ["model=gpt3"], None)


NEED_INIT = ("evaluate", "generate", "export", "evaluate_task", "predict", "chat")


@pytest.mark.parametrize("command", ROOTS)
def test_needed_values_are_marked(command: str) -> None:
    assert ("needed" in config_help(command, [], None)) == (command in NEED_INIT)
