"""Values are fitted to types, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest

from llmkit.config.values import Unfit, describe, fit
from llmkit.settings import Range


@pytest.mark.parametrize(
    ("value", "hint", "fitted"),
    [
        (1, int, 1),
        (1e5, int, 100_000),
        ("12", int, 12),
        (str(2**63 - 1), int, 2**63 - 1),
        (1, float, 1.0),
        ("1e-4", float, 1e-4),
        (True, bool, True),
        ("x", str, "x"),
        (None, int | None, None),
        ("auto", Literal["auto", "never"], "auto"),
        ([1, "2"], list[float], [1.0, 2.0]),
        ([1, 2], tuple[int, int], (1, 2)),
        ([1, 2, 3], tuple[int, ...], (1, 2, 3)),
        ("a", str | list[str], "a"),
        (["a"], str | list[str], ["a"]),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ({"a": 1}, Mapping[str, Any], {"a": 1}),
        ({"text": 1, "label": "l"}, dict[str, str], {"text": "1", "label": "l"}),
        (3, Annotated[int, Range(1)], 3),
        (None, Annotated[int | None, Range(1)], None),
        (object, Any, object),
    ],
)
def test_fits(value: Any, hint: Any, fitted: Any) -> None:
    found = fit(value, hint)
    assert found == fitted
    assert type(found) is type(fitted)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (True, int),
        (False, float),
        (1.5, int),
        ("1.5", int),
        ("many", int),
        (None, int),
        (float("nan"), float),
        (float("inf"), float),
        ("nan", float),
        ("true", bool),
        (1, bool),
        (3, str),
        (None, str),
        ("Auto", Literal["auto", "never"]),
        (True, Literal[1]),
        ("ab", list[str]),
        ([True], list[float]),
        ([1], tuple[int, int]),
        ([1], dict[str, int]),
        (0, Annotated[int, Range(1)]),
        (9, Annotated[int, Range(1, 8)]),
        (10**400, float),
        ([1], str | list[str]),
    ],
)
def test_unfit(value: Any, hint: Any) -> None:
    with pytest.raises(Unfit):
        fit(value, hint)


def test_text_fields_take_what_was_typed() -> None:
    assert fit(7, str, "007") == "007"
    assert fit(1000.0, str | None, "1e3") == "1e3"
    assert fit(False, Literal["off", "on"], "off") == "off"
    assert fit(None, str | None, "null") is None


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Annotated[int | None, Range(1)], "a whole number >= 1 or null"),
        (Annotated[float, Range(0, 0.5)], "a number from 0 to 0.5"),
        (Annotated[int, Range(0, 2**63 - 1)], "a whole number >= 0"),
        (Literal["a", "b"], "one of a, b"),
        (str | list[str], "text or a list of texts"),
        (list[float], "a list of numbers"),
        (tuple[float, float], "a list of 2 values"),
        (bool, "true or false"),
    ],
)
def test_described(hint: Any, words: str) -> None:
    assert describe(hint) == words
