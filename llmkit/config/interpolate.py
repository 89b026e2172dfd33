"""Replaces every ``${...}`` of a plain tree by its value, and collects those that have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


class Broken:
    """Stands for a value that was already reported; later checks pass over it."""

    def __repr__(self) -> str:
        return "<broken>"


BROKEN = Broken()
Report = Callable[[str, str], None]  # (config path, what is wrong)


def resolve(tree: dict[str, Any], report: Report) -> dict[str, Any]:
    """A copy of ``tree`` with interpolations replaced; what does not resolve becomes BROKEN and is reported."""
    parsed = _map_texts(tree, lambda path, text: _parsed(path, text, report))
    config = OmegaConf.create(_map_texts(parsed, lambda _, text: text, broken=None))
    resolved: dict[str, Any] = _map_texts(parsed, lambda path, text: _value(config, path, text, report))
    return resolved


def _map_texts(tree: Any, change: Callable[[tuple[Any, ...], str], Any], path: tuple[Any, ...] = (), **known: Any) -> Any:
    """A copy of ``tree`` with ``change`` applied to every text that holds an interpolation."""
    if isinstance(tree, dict):
        return {str(key): _map_texts(value, change, (*path, key), **known) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_map_texts(value, change, (*path, index), **known) for index, value in enumerate(tree)]
    if tree is BROKEN:
        return known.get("broken", BROKEN)
    return change(path, tree) if isinstance(tree, str) and "${" in tree else tree


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _parsed(path: tuple[Any, ...], text: str, report: Report) -> Any:
    try:
        OmegaConf.create([text])
    except OmegaConfBaseException:
        report(_dotted(path), f"{text[:80]!r} is not a valid interpolation")
        return BROKEN
    return text


def _value(config: Any, path: tuple[Any, ...], text: str, report: Report) -> Any:
    try:
        value = config
        for key in path:
            value = value[key]
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except RecursionError:
        report(_dotted(path), f"{text[:80]!r} refers to itself")
    except OmegaConfBaseException as error:
        report(_dotted(path), f"{text[:80]!r} has no value: {str(error).splitlines()[0]}")
    return BROKEN
