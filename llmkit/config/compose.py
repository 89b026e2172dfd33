"""Composes a command's configuration: groups and recipe through Hydra, single values by ourselves.

Hydra stops at the first thing it dislikes. So it is given only the choices (``model=llama``, ``recipe=gpt_tiny``),
whose spelling is checked before; values from the command line are then written into the plain tree, interpolations
are resolved one by one, and every mistake becomes a ``Problem``. What the tree may hold is ``check.py``'s business.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llmkit.config import choices
from llmkit.config.choices import Choices, merge, recipes_dir
from llmkit.config.interpolate import resolve
from llmkit.config.overrides import COMMAND_LINE, Override, parse
from llmkit.config.schema import CHECKED_AS, ROOTS
from llmkit.config.suggest import did_you_mean, nearest
from llmkit.config.yaml_file import YamlFile
from llmkit.errors import Problem

__all__ = ["Composed", "Origin", "compose", "leaves", "recipes_dir"]

OPEN_SECTIONS = ("tracking", "callbacks")


@dataclass(frozen=True)
class Origin:
    """Where a value was written, and the one-line meaning that stands behind it in its group's file."""

    where: str
    meaning: str = ""


@dataclass
class Composed:
    """A command's configuration as plain data, resolved, and what is wrong with it so far."""

    command: str
    overrides: tuple[str, ...]
    config_dir: Path | None
    plain: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    typed: dict[str, str] = field(default_factory=dict)  # values of the command line as typed, for text fields
    chosen: dict[str, str] = field(default_factory=dict)  # group -> option
    from_command_line: set[str] = field(default_factory=set)  # keys and groups that were named there
    problems: list[Problem] = field(default_factory=list)
    partial: bool = False  # a group was misspelt beyond guessing, so its values are not the ones meant

    def origin(self, path: str) -> str:
        """Where ``path``, or else its nearest parent, was written."""
        while path:
            if path in self.origins:
                return self.origins[path].where
            path = path.rpartition(".")[0]
        return ""

    def meaning(self, path: str) -> str:
        return self.origins[path].meaning if path in self.origins else ""

    def differences(self) -> list[tuple[str, Any, Any]]:
        """(path, value of the recipe alone, value of this run) of every key that the command line changed."""
        recipe = [text for text in self.overrides if text.startswith("recipe=")]
        before = dict(leaves(compose(self.command, recipe, self.config_dir).plain))
        now = dict(leaves(self.plain))
        return [(path, before.get(path), value) for path, value in now.items() if before.get(path) != value]


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything that is not a mapping; an empty mapping counts as a value."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def compose(command: str, overrides: Sequence[str], config_dir: Path | None = None) -> Composed:
    """The configuration of ``command``. Mistakes found on the way are in ``problems``; only what leaves nothing to
    look at (a config folder that is not there, a group file that is not YAML) raises ConfigError."""
    composed = Composed(command, tuple(overrides), config_dir)
    picked = Choices(command, config_dir)
    values: list[Override] = []
    for text in overrides:
        override = parse(text)
        if isinstance(override, Problem):
            composed.problems.append(override)
        elif picked.takes(override):
            picked.add(override)
            composed.from_command_line.add(override.key)
        else:
            values.append(override)
    tree, layers = choices.load(picked)
    composed.problems += picked.problems
    composed.partial = picked.incomplete
    composed.chosen = {group: option for group, option in picked.chosen.items() if option}
    composed.origins = _origins(layers)
    for override in values:
        composed.problems += _apply(override, tree, composed)

    def report(path: str, what: str) -> None:
        composed.problems.append(Problem(path, what, composed.origin(path)))

    composed.plain = resolve(_in_order(tree, CHECKED_AS[command]), report)
    return composed


def _origins(layers: Sequence[tuple[str, YamlFile]]) -> dict[str, Origin]:
    """Where each key was written last, and the last meaning given to it: groups and roots explain, recipes only set."""
    origins: dict[str, Origin] = {}
    for package, file in layers:
        is_recipe = not package and file.path.stem not in ROOTS
        for key, line in file.lines.items():
            if key == "defaults" or key.startswith("defaults."):
                continue
            path = f"{package}.{key}" if package else key
            earlier = origins[path].meaning if path in origins else ""
            meaning = earlier if is_recipe and earlier else file.comments[key] or earlier
            origins[path] = Origin(f"{_shown(file.path)}:{line}", meaning)
    return origins


def _shown(path: Path) -> str:
    """``path`` from the working folder where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


# -- values of the command line ------------------------------------------------------------------------------------


def _apply(override: Override, tree: dict[str, Any], composed: Composed) -> list[Problem]:
    """Write one override into ``tree``; a problem when there is no such place."""
    *parents, last = override.key.split(".")
    node: Any = tree
    for depth, name in enumerate(parents):
        if isinstance(node, dict):
            node = node.setdefault(name, {}) if override.kind == "set" else node.get(name, {})
        if not isinstance(node, dict):
            return [_not_a_section(override.key, ".".join(parents[: depth + 1]))]
    if override.kind == "delete":
        return _delete(override.key, last, node)
    if isinstance(override.value, dict) and isinstance(node.get(last), dict):
        merge(node[last], override.value)
    else:
        node[last] = copy.deepcopy(override.value)
    _note(override, composed)
    return []


def _not_a_section(key: str, parent: str) -> Problem:
    return Problem(key, f"{parent} is a value, not a section", COMMAND_LINE, f"set {parent} as a whole")


def _note(override: Override, composed: Composed) -> None:
    """Remember that this key, and all below it, come from the command line."""
    key = override.key
    composed.typed[key] = override.raw
    composed.from_command_line.add(key)
    meaning = composed.meaning(key)
    if not isinstance(override.value, dict):
        composed.origins = {p: origin for p, origin in composed.origins.items() if not p.startswith(f"{key}.")}
        composed.origins[key] = Origin(COMMAND_LINE, meaning)
        return
    for path, _ in leaves(override.value, f"{key}."):
        composed.origins[path] = Origin(COMMAND_LINE, composed.meaning(path))
        composed.from_command_line.add(path)


def _delete(key: str, last: str, node: dict[str, Any]) -> list[Problem]:
    section = key.rpartition(".")[0]
    if section not in OPEN_SECTIONS:
        fix = f"set {key}=null where null is allowed" if section else ""
        what = f"only entries of {' and '.join(OPEN_SECTIONS)} can be taken out"
        return [Problem(f"~{key}", what, COMMAND_LINE, fix)]
    if last not in node:
        guess = nearest(last, node)
        return [Problem(f"~{key}", "nothing there", COMMAND_LINE, did_you_mean(guess and f"~{section}.{guess}"))]
    del node[last]
    return []


def _in_order(tree: dict[str, Any], root: type) -> dict[str, Any]:
    """Sections as the schema lists them, then what it does not know."""
    known = [field.name for field in fields(root)]
    return {name: tree[name] for name in [*(n for n in known if n in tree), *(n for n in tree if n not in known)]}
