"""Arguments are read with Hydra's grammar, and as text where it gives up."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.config.overrides import Override, parse
from llmkit.errors import Problem


def value_of(text: str) -> object:
    override = parse(text)
    assert isinstance(override, Override), override
    return override.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("optim.lr=1e-4", 1e-4),
        ("engine.max_steps=1_000", 1000),
        ("a=null", None),
        ("a=true", True),
        ("a=[1,b c]", [1, "b c"]),
        ("a=[<mask>,  <s>]", ["<mask>", "<s>"]),
        ("a={b:1}", {"b": 1}),
        ("a=", ""),
        ("data.path=notes/*.txt", "notes/*.txt"),
        ("run.name=a b", "a b"),
        ("data.path=naïve.txt", "naïve.txt"),
        ("data.path=/a b/ü, c.txt", "/a b/ü, c.txt"),
        ("a=it's", "it's"),
        ("a=x=y", "x=y"),
        ("a=\\'=\\\\'", "\\'=\\\\'"),
        ("a=hello (world)", "hello (world)"),
        ("a=C:\\dir\\", "C:\\dir\\"),
        ("a='1,2'", "1,2"),
        ("+a.b=3", 3),
        ("++a.b=3", 3),
    ],
)
def test_values(text: str, value: object) -> None:
    assert value_of(text) == value


@settings(derandomize=True, max_examples=200, deadline=None)
@given(raw=st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]), min_size=1))
def test_any_text_with_a_letter_outside_the_grammar_survives(raw: str) -> None:
    """The € sign makes Hydra's lexer give up, so the whole value has to come through as typed."""
    raw = f"€{raw}"
    override = parse(f"a={raw}")
    assert isinstance(override, Override)
    assert override.value == raw
    assert OverridesParser.create().parse_override(override.hydra).value() == raw


@pytest.mark.parametrize(
    ("text", "path", "fix"),
    [
        ("gpt_tiny", "gpt_tiny", "recipe=gpt_tiny"),
        ("mine/a.yaml", "mine/a.yaml", "recipe=mine/a.yaml"),
        ("=3", "=3", ""),
        ("a b=3", "a b", "words joined by dots"),
        ("optim.lr=1,2", "optim.lr", "-m"),
        ("optim.lr=range(1,3)", "optim.lr", "-m"),
        ("a=\udcff", "a=\\udcff", ""),
    ],
)
def test_not_an_override(text: str, path: str, fix: str) -> None:
    problem = parse(text)
    assert isinstance(problem, Problem)
    assert problem.path == path
    assert fix in problem.fix


def test_a_comma_in_the_name_of_a_file_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a,b.txt"
    path.touch()
    assert value_of(f"data.path={path}") == str(path)


def test_sweeps() -> None:
    assert parse("optim.lr=1e-3,3e-4", sweep=True).choices == ("0.001", "0.0003")  # type: ignore[union-attr]
    assert parse("a=range(1,4)", sweep=True).choices == ("1", "2", "3")  # type: ignore[union-attr]
    assert parse("a=interval(0,1)", sweep=True).choices == ()  # type: ignore[union-attr]


def test_deletion() -> None:
    override = parse("~tracking.wandb")
    assert isinstance(override, Override)
    assert (override.kind, override.key) == ("delete", "tracking.wandb")
