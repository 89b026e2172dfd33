"""Reads one YAML file as plain data, within limits, and remembers the line and the comment of every key.

Only plain scalars, lists and mappings pass: no tags, no repeated keys, no self-reference, at most 1 MB, 100 levels
and 100,000 values once aliases are unfolded. The limits are checked on the event stream, before anything is built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmkit.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_DEPTH = 100
MAX_VALUES = 100_000

_SAFE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LINE_ENDS = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # as YAML 1.1 counts lines
_FLOAT = "tag:yaml.org,2002:float"
_TIME = "tag:yaml.org,2002:timestamp"


class _Loader(_SAFE):  # type: ignore[misc]
    """Reads scalars as Hydra does: ``1e-4`` is a number, a date is text."""


_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?\d[\d_]*\.?[\d_]*[eE][-+]?\d+$", re.ASCII), list("-+0123456789")
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIME]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


@dataclass(frozen=True)
class YamlFile:
    """``tree`` is the plain content; ``lines`` and ``comments`` are keyed by dotted path."""

    path: Path
    tree: dict[str, Any]
    lines: dict[str, int]
    comments: dict[str, str]
    header: str


def read_yaml(path: Path) -> YamlFile:
    """Read ``path``; raises ConfigError with the line where the file is not plain YAML or breaks a limit."""
    text = _read_text(path)
    try:
        _check_limits(text, path)
        root = yaml.compose(text, Loader=_Loader)
        tree = {} if root is None else _Loader("").construct_document(root)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"not valid YAML: {error.problem or error.context}", where=f"{path}:{line}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {str(error).splitlines()[0]}", where=str(path)) from None
    if not isinstance(tree, dict):
        raise ConfigError("the file must hold 'key: value' lines", where=f"{path}:1")
    rows = _LINE_ENDS.split(text)
    lines, comments = {}, {}
    for key, line, end_line, end_column in _keys(root):
        if key in lines:
            raise ConfigError(f"{key} stands here twice", where=f"{path}:{line + 1}")
        lines[key] = line + 1
        comments[key] = _comment(rows[end_line][end_column:])
    return YamlFile(path, _plain(tree), lines, comments, header_of(text))


def _plain(tree: Any) -> Any:
    """Lists and mappings of their own for each place that an alias filled; keys as text."""
    if isinstance(tree, dict):
        return {str(key): _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, list) else tree


def header_of(text: str) -> str:
    """First comment line that is not a Hydra package directive: what a recipe or group says of itself."""
    for row in text.splitlines():
        if not row.startswith("#"):
            return ""
        if "@package" not in row:
            return row.lstrip("# ").rstrip()
    return ""


def dump(tree: Any) -> str:
    """YAML text that ``read_yaml`` reads back equal: keys in order, no aliases, floats that stay floats."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    return text


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Line separators of Unicode are escaped: a reader would fold them into spaces."""
    style = '"' if _LINE_ENDS.search(text.replace("\n", "")) else None
    node: yaml.Node = dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)
    return node


_Dumper.add_representer(str, _text_node)


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"a config file may hold at most {MAX_BYTES:,} bytes", where=str(path))
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8: byte {error.start}", where=str(path)) from None
    except OSError as error:
        raise ConfigError(f"cannot read the file: {error.strerror}", where=str(path)) from None


@dataclass
class _Limits:
    """Counts values with aliases unfolded, in one pass over the events."""

    path: Path
    sizes: dict[str, int] = field(default_factory=dict)
    open_parts: list[tuple[str | None, int]] = field(default_factory=lambda: [(None, 0)])

    def refuse(self, what: str, event: yaml.Event) -> None:
        raise ConfigError(what, where=f"{self.path}:{event.start_mark.line + 1}")

    def add(self, n_values: int, event: yaml.Event) -> None:
        anchor, total = self.open_parts.pop()
        self.open_parts.append((anchor, total + n_values))
        if total + n_values > MAX_VALUES:
            self.refuse(f"more than {MAX_VALUES:,} values once aliases are unfolded", event)

    def take(self, event: yaml.Event) -> None:
        if getattr(event, "tag", None) is not None:
            self.refuse(f"YAML tags are not allowed: {str(event.tag)[:60]}", event)
        if isinstance(event, yaml.CollectionStartEvent):
            self.open_parts.append((event.anchor, 1))
            if len(self.open_parts) > MAX_DEPTH:
                self.refuse(f"nested deeper than {MAX_DEPTH} levels", event)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = self.open_parts.pop()
            self._close(anchor, size, event)
        elif isinstance(event, yaml.ScalarEvent):
            self._close(event.anchor, 1, event)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.sizes:
                self.refuse(f"the alias *{event.anchor} refers to nothing before it", event)
            self.add(self.sizes[event.anchor], event)

    def _close(self, anchor: str | None, size: int, event: yaml.Event) -> None:
        if anchor is not None:
            self.sizes[anchor] = size
        self.add(size, event)


def _check_limits(text: str, path: Path) -> None:
    limits = _Limits(path)
    for event in yaml.parse(text, Loader=_Loader):
        limits.take(event)


def _keys(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int, int, int]]:
    """Dotted key, its line, and the line and column after which its comment may stand."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        path = f"{prefix}{key.value}"
        one_line = value.start_mark.line == value.end_mark.line == key.start_mark.line
        end = value.end_mark if one_line else key.end_mark
        yield path, key.start_mark.line, end.line, end.column
        yield from _keys(value, f"{path}.")


def _comment(rest: str) -> str:
    """The comment in what follows a value on its line."""
    before, mark, text = rest.partition("#")
    return text.strip() if mark and not before.strip(" :") else ""
