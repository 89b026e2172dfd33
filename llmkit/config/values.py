"""Fits one configured value to the type of the field it is for, or says what the field takes."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from llmkit.settings import Range

NONE = type(None)
_LISTS = (list, tuple, Sequence)
_UNBOUNDED = 2.0**62  # a limit above this is one of the machine, and not worth showing


class Unfit(Exception):
    """The value is not of the type, or outside the range."""


def fit(value: Any, hint: Any, typed: str | None = None) -> Any:
    """``value`` as ``hint`` wants it; raises Unfit.

    Whole floats become ints (``1e5``), numeric text becomes a number (what YAML reads ``1e-4`` as, and environment
    variables), lists become tuples where the hint says so. Text never becomes a bool. ``typed`` is the value as it
    stood on the command line: a text field takes that, so that ``run.name=007`` keeps its zeros.
    """
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *marks = get_args(hint)
        return _in_range(fit(value, inner, typed), marks)
    if origin in (Union, types.UnionType):
        return _fit_union(value, get_args(hint), typed)
    if origin is Literal:
        return _fit_literal(value, get_args(hint), typed)
    if origin in _LISTS or hint in _LISTS:
        return _fit_list(value, hint, origin or hint)
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        return _fit_mapping(value, hint)
    return _SCALARS.get(hint, _anything)(value, typed)


def _in_range(value: Any, marks: Sequence[Any]) -> Any:
    for mark in marks:
        if isinstance(mark, Range) and value is not None and not mark.low <= value <= mark.high:
            raise Unfit
    return value


def _fit_union(value: Any, hints: Sequence[Any], typed: str | None) -> Any:
    if value is None and NONE in hints:
        return None
    for hint in (hint for hint in hints if hint is not NONE):
        try:
            return fit(value, hint, typed)
        except Unfit:
            continue
    raise Unfit


def _fit_literal(value: Any, allowed: Sequence[Any], typed: str | None) -> Any:
    for candidate in (value, typed):
        for option in allowed:
            if candidate == option and type(candidate) is type(option):
                return option
    raise Unfit


def _fit_list(value: Any, hint: Any, kind: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise Unfit
    args = get_args(hint)
    if kind is not tuple:
        return [fit(item, args[0]) for item in value] if args else list(value)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(fit(item, args[0]) for item in value)
    if args and len(args) != len(value):
        raise Unfit
    return tuple(fit(item, arg) for item, arg in zip(value, args, strict=True)) if args else tuple(value)


def _fit_mapping(value: Any, hint: Any) -> Any:
    if not isinstance(value, Mapping):
        raise Unfit
    inner = get_args(hint)[1] if get_args(hint) else Any
    return {str(key): fit(item, inner, _digits(item)) for key, item in value.items()}


def _digits(value: Any) -> str | None:
    """A whole number as it was written, for a field of texts: ``data.columns.text=1``."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _bool(value: Any, typed: str | None) -> bool:
    if isinstance(value, bool):
        return value
    raise Unfit


def _int(value: Any, typed: str | None) -> int:
    number = _float(value, typed)
    if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
        return int(value)  # exact, also above 2**53
    if isinstance(value, int):
        return value
    if number != int(number):
        raise Unfit
    return int(number)


def _float(value: Any, typed: str | None) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise Unfit
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise Unfit from None
    if not math.isfinite(number):
        raise Unfit
    return number


def _text(value: Any, typed: str | None) -> str:
    if isinstance(value, str):
        return value
    if value is not None and typed is not None and not isinstance(value, list | dict):
        return typed
    raise Unfit


def _path(value: Any, typed: str | None) -> Path:
    return Path(_text(value, typed))


def _nothing(value: Any, typed: str | None) -> None:
    if value is not None:
        raise Unfit


def _anything(value: Any, typed: str | None) -> Any:
    return value


_SCALARS: dict[Any, Callable[[Any, str | None], Any]] = {
    bool: _bool,
    int: _int,
    float: _float,
    str: _text,
    Path: _path,
    NONE: _nothing,
}

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    NONE: "null",
}


def describe(hint: Any) -> str:
    """What a field takes, in words: ``a whole number >= 1 or null``."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *marks = get_args(hint)
        return _describe_ranged(inner, "".join(_bounds(mark) for mark in marks if isinstance(mark, Range)))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(part) for part in get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(str(word).lower() if isinstance(word, bool) else word for word in get_args(hint))
    if origin in _LISTS or hint in _LISTS:
        return _describe_list(hint, origin)
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        return "a section"
    return _WORDS.get(hint, "a value")


def _describe_ranged(hint: Any, bounds: str) -> str:
    """The bounds belong to the number, not to the null beside it."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe(part) + ("" if part is NONE else bounds) for part in get_args(hint))
    return describe(hint) + bounds


def _bounds(mark: Range) -> str:
    if mark.high >= _UNBOUNDED:
        return f" >= {mark.low:g}"
    return f" from {mark.low:g} to {mark.high:.7g}"


def _describe_list(hint: Any, kind: Any) -> str:
    items = [arg for arg in get_args(hint) if arg is not Ellipsis]
    if kind is tuple and len(items) > 1 and Ellipsis not in get_args(hint):
        return f"a list of {len(items)} values"
    words: dict[Any, str] = {bool: "booleans", int: "whole numbers", float: "numbers", str: "texts"}
    return f"a list of {words.get(items[0] if items else None, 'values')}"
