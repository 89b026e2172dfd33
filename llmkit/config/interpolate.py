"""Replaces every ``${...}`` of a plain tree by its value, and collects those that have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Broken:
    """Stands for a value that was already reported; later checks pass over it."""

    def __repr__(self) -> str:
        return "<broken>"


BROKEN = Broken()
Report = Callable[[str, str], None]  # (config path, what is wrong)
Path = tuple[str | int, ...]


def resolve(tree: dict[str, Any], report: Report) -> dict[str, Any]:
    """A copy of ``tree`` with interpolations replaced; what does not resolve becomes BROKEN and is reported."""
    return _Resolver(tree, report).resolved


class _Resolver:
    def __init__(self, tree: dict[str, Any], report: Report) -> None:
        from omegaconf import OmegaConf

        self.report = report
        parsed = _map_texts(tree, self.parsed)
        self.config = OmegaConf.create(_map_broken(parsed))
        self.resolved: dict[str, Any] = _map_texts(parsed, self.value)

    def parsed(self, path: Path, text: str) -> Any:
        """``text`` when its grammar is right."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            OmegaConf.create([text])
        except OmegaConfBaseException:
            self.report(_dotted(path), f"{text[:80]!r} is not a valid interpolation")
            return BROKEN
        return text

    def value(self, path: Path, text: str) -> Any:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            value = self.config
            for key in path:
                value = value[key]
            return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException as error:
            self.report(_dotted(path), f"{text[:80]!r} has no value: {str(error).splitlines()[0]}")
        return BROKEN


def _map_texts(tree: Any, change: Callable[[Path, str], Any], path: Path = ()) -> Any:
    """A copy of ``tree`` with ``change`` applied to every text that holds an interpolation."""
    if isinstance(tree, dict):
        return {key: _map_texts(value, change, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_map_texts(value, change, (*path, index)) for index, value in enumerate(tree)]
    return change(path, tree) if isinstance(tree, str) and "${" in tree else tree


def _map_broken(tree: Any) -> Any:
    """A copy of ``tree`` with null in place of BROKEN, which OmegaConf could not hold."""
    if isinstance(tree, dict):
        return {key: _map_broken(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_map_broken(value) for value in tree]
    return None if tree is BROKEN else tree


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))
