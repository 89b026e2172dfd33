"""Finds every mistake in a composed configuration at once, and turns a right one into its root dataclass.

Three kinds are found: keys and values that do not fit their field, nodes whose class is not allowed or refuses its
values, and values that are right alone and wrong together (``rules.py``). Torch is never imported here.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from llmkit.config import rules
from llmkit.config.build import TARGET, is_node
from llmkit.config.choices import recipes_of
from llmkit.config.compose import Composed, leaves, recipes_dir
from llmkit.config.interpolate import BROKEN
from llmkit.config.overrides import COMMAND_LINE
from llmkit.config.schema import CHECKED_AS, ROOTS, Node
from llmkit.config.suggest import did_you_mean, nearest_key
from llmkit.config.targets import Field, config_fields, is_late, resolve
from llmkit.config.values import Unfit, describe, fit
from llmkit.errors import ConfigError, Problem

MISSING = "???"
NODES = Mapping[str, Node]

# What the parts of a run are asked to do (``llmkit/interfaces.py``).
METHODS = {
    "model": ("build", "with_vocab"),
    "objective": ("collate", "loss"),
    "tokenizer": ("open", "train", "key"),
    "optim": ("build",),
    "schedule": ("factor",),
    "callbacks": ("on_evaluation",),
    "tracking": ("start", "log", "finish"),
}


def check(command: str, composed: Composed, *, resuming: bool = True) -> Any:
    """The root dataclass of ``command``; raises ConfigError with all problems.

    ``resuming`` also compares with the run that is already in the folder ``run.root/run.name``.
    """
    checker = _Checker(composed)
    root = checker.section("", CHECKED_AS[command], composed.plain)
    problems = [*composed.problems, *checker.problems]
    if composed.partial:  # a choice is missing, so only what the command line says of itself can be judged
        problems = [problem for problem in problems if problem.origin == COMMAND_LINE]
    else:
        problems += rules.broken_rules(composed, checker.values, checker.objects, resuming=resuming)
    if problems:
        raise config_error(problems)
    return ROOTS[command](**{field.name: getattr(root, field.name) for field in fields(ROOTS[command])})


def config_error(problems: list[Problem]) -> ConfigError:
    unique = tuple(dict.fromkeys(problems))
    n = len(unique)
    return ConfigError(f"{n} mistake{'' if n == 1 else 's'} in the configuration", problems=unique)


class _Checker:
    """Walks the tree along the dataclasses. ``values`` has what fitted, by path; ``objects`` the sound nodes."""

    def __init__(self, composed: Composed) -> None:
        self.composed = composed
        self.problems: list[Problem] = []
        self.values: dict[str, Any] = {}
        self.objects: dict[str, Any] = {}

    def report(self, path: str, what: str, fix: str = "") -> None:
        self.problems.append(Problem(path, what, self.composed.origin(path), fix))

    # -- closed sections --------------------------------------------------------------------------------------------

    def section(self, prefix: str, cls: type, raw: Any) -> Any:
        """An instance of the dataclass ``cls``, or BROKEN when a problem was reported."""
        if not isinstance(raw, Mapping):
            self.report(prefix.rstrip("."), f"must be a section, is {_shown(raw)}")
            return BROKEN
        hints = typing.get_type_hints(cls, include_extras=True)
        known = [field.name for field in fields(cls)]
        self.refuse_unknown(prefix, raw, known)
        given = {name: self.field(f"{prefix}{name}", hints[name], raw.get(name, MISSING)) for name in known}
        return BROKEN if any(value is BROKEN for value in given.values()) else cls(**given)

    def field(self, path: str, hint: Any, raw: Any) -> Any:
        if raw is BROKEN:
            return BROKEN
        if hint == NODES:
            return self.nodes(path, raw)
        if hint == Node | None and raw in (None, MISSING, {}):  # a group of which no option, or `none`, was chosen
            return None
        if hint in (Node, Node | None):
            return self.node(path, raw)
        if is_dataclass(hint) and isinstance(hint, type):
            return self.section(f"{path}.", hint, raw)
        return self.value(path, hint, raw)

    def value(self, path: str, hint: Any, raw: Any) -> Any:
        if raw is BROKEN or (isinstance(raw, list) and BROKEN in raw):
            return BROKEN
        if isinstance(raw, str) and raw == MISSING:
            self.report(path, "a value is needed", f"set {path}=..., {describe(hint)}")
            return BROKEN
        try:
            value = fit(raw, hint, self.composed.typed.get(path))
        except Unfit:
            self.report(path, f"must be {describe(hint)}, is {_shown(raw)}")
            return BROKEN
        self.values[path] = value
        return value

    def refuse_unknown(self, prefix: str, raw: Mapping[str, Any], known: list[str]) -> None:
        unknown = [path for key in raw if key not in known for path in self.spelt(f"{prefix}{key}", raw[key])]
        strangers = [path for path in unknown if self.is_of_another_option(path)]
        if strangers:
            self.report_other_recipe(prefix.partition(".")[0], strangers)
        for path in unknown:
            if path not in strangers:
                guess = did_you_mean(nearest_key(path, known_keys(self.composed)))
                self.report(path, "unknown key", guess or self.left_over(prefix, path) or _list_keys(prefix, known))

    def is_of_another_option(self, path: str) -> bool:
        """Whether a recipe wrote the key for the option that it chooses, and the command line chose another."""
        group, file = path.partition(".")[0], Path(self.composed.origin(path).rpartition(":")[0])
        recipe = self.composed.chosen.get("recipe", "")
        is_recipes = file.parent.name == "recipe" or (file.name == Path(recipe).name and bool(recipe))
        return group in self.composed.chosen and group in self.composed.from_command_line and is_recipes

    def report_other_recipe(self, group: str, keys: list[str]) -> None:
        """One problem for all keys that the recipe has and the chosen option has not."""
        option, recipe = self.composed.chosen[group], self.composed.chosen["recipe"]
        fits = "|".join(recipes_of(self.composed.command, group, option))
        fix = f"use a recipe of {group}={option}, recipe={fits}, or" if fits else "write a recipe of your own, or"
        what = f"{group}={option} has no {', '.join(keys)}, which recipe={recipe} sets"
        fix = f"{fix} leave {group}={option} out"
        if self.composed.plain.get("init") is not None and self.opens_init(group):
            fix = f"leave recipe={recipe} out, and give what else you want of it, such as objective=..."
        self.report(group, what, fix)

    def opens_init(self, group: str) -> bool:
        """Whether the option of a group says how to open the model of ``init``, so that a recipe is not needed."""
        target = self.composed.plain[group].get(TARGET)
        return isinstance(target, str) and bool(getattr(resolve(target), "with_init", ()))

    def left_over(self, prefix: str, path: str) -> str:
        """How to mend a key of the class that stood here before another ``_target_`` was written over it."""
        target, key = (self.composed.origin(name).rpartition(":")[0] for name in (f"{prefix}{TARGET}", path))
        if not target or target == key or "/recipe/" in key or self.composed.origin(path) == COMMAND_LINE:
            return ""
        group = prefix.partition(".")[0]
        return f"it belongs to the class that was here before: choose the new one as a group option, {group}=..."

    def spelt(self, path: str, raw: Any) -> list[str]:
        """An unknown section by its own name, or by the keys in it that the command line spelt out."""
        below = [key for key, _ in leaves({path: raw})]
        return [key for key in below if key in self.composed.from_command_line] or [path]

    # -- nodes ------------------------------------------------------------------------------------------------------

    def nodes(self, path: str, raw: Any) -> Any:
        """A section whose entries are nodes under names of the user's choice."""
        if not isinstance(raw, Mapping):
            self.report(path, f"must be a section, is {_shown(raw)}", f"to have none: {path}=none")
            return BROKEN
        found = {name: self.node(f"{path}.{name}", node) for name, node in raw.items()}
        return BROKEN if any(value is BROKEN for value in found.values()) else found

    def node(self, path: str, raw: Any) -> Any:
        """The node with its values fitted to its class."""
        if not is_node(raw):
            self.report_no_target(path, raw)
            return BROKEN
        try:
            cls = None if is_late(str(raw[TARGET])) else resolve(raw[TARGET])
        except ConfigError as error:
            self.report(f"{path}.{TARGET}", error.what, error.fix)
            return BROKEN
        if cls is None:
            return dict(raw)
        fitted = self.arguments(f"{path}.", cls, raw)
        if fitted is BROKEN or not self.has_methods(path, cls):
            return BROKEN
        return {TARGET: raw[TARGET]} | fitted if self.accepts(path, cls, fitted) else BROKEN

    def report_no_target(self, path: str, raw: Any) -> None:
        section, _, name = path.rpartition(".")
        if not section:
            options = "|".join(sorted(file.stem for file in (recipes_dir() / path).glob("*.yaml")))
            absent = raw in (None, MISSING)
            what = "one must be chosen" if absent else f"needs a {TARGET} that names its class, is {_shown(raw)}"
            self.report(path, what, f"{path}={options}" if options else "")
            return
        for key in self.spelt(path, raw):
            guess = nearest_key(key, known_keys(self.composed))
            self.report(key, f"{section} has no node {name!r} with a {TARGET}", did_you_mean(guess))

    def arguments(self, prefix: str, cls: type, raw: Mapping[str, Any]) -> Any:
        known, takes_any = config_fields(cls)
        given = {key: value for key, value in raw.items() if key != TARGET}
        if not takes_any:
            self.refuse_unknown(prefix, given, list(known))
        fitted = {name: self.argument(f"{prefix}{name}", field, given) for name, field in known.items()}
        extra = {key: value for key, value in given.items() if key not in known} if takes_any else {}
        if any(value is BROKEN for value in fitted.values()):
            return BROKEN
        return {name: value for name, value in fitted.items() if name in given} | extra

    def argument(self, path: str, field: Field, given: Mapping[str, Any]) -> Any:
        if field.name not in given:
            if field.required:
                self.report(path, "a value is needed", f"set {path}=..., {describe(field.hint)}")
            return BROKEN if field.required else None
        raw = given[field.name]
        return self.node(path, raw) if is_node(raw) else self.value(path, field.hint, raw)

    def has_methods(self, path: str, cls: type) -> bool:
        wanted = METHODS.get(path.partition(".")[0], ())
        absent = [name for name in wanted if not callable(getattr(cls, name, None))]
        if absent:
            self.report(f"{path}.{TARGET}", f"{cls.__qualname__} cannot stand here: it has no {', '.join(absent)}")
        return not absent

    def accepts(self, path: str, cls: type, fitted: dict[str, Any]) -> bool:
        """Ask the class itself, which knows what contradicts what."""
        if not is_dataclass(cls) or any(is_node(value) for value in fitted.values()):
            return True
        made = cls(**fitted)
        found = made.problems() if hasattr(made, "problems") else []
        for name, what in found:
            self.report(f"{path}.{name}", f"{what}, is {_shown(fitted.get(name))}")
        if not found:
            self.objects[path] = made
        return not found


def known_keys(composed: Composed) -> list[str]:
    """Every dotted key that the command takes with the classes now chosen."""
    found: list[str] = []
    root = CHECKED_AS[composed.command]
    for field in fields(root):
        hint = typing.get_type_hints(root)[field.name]
        raw = composed.plain.get(field.name)
        if is_dataclass(hint):
            found += [f"{field.name}.{part.name}" for part in fields(hint)]
        elif hint == Node:
            found += _node_keys(field.name, raw)
        elif hint == NODES and isinstance(raw, Mapping):
            found += [key for name, node in raw.items() for key in _node_keys(f"{field.name}.{name}", node)]
        else:
            found.append(field.name)
    return found


def _node_keys(path: str, node: Any) -> list[str]:
    if not is_node(node) or is_late(str(node[TARGET])):
        return []
    try:
        known, _ = config_fields(resolve(node[TARGET]))
    except ConfigError:
        return []
    return [f"{path}.{name}" for name in known]


def _list_keys(prefix: str, known: list[str]) -> str:
    return f"{prefix.rstrip('.') or 'the configuration'} has: {', '.join(known)}"


def _shown(value: Any) -> str:
    """The value as a user would write it, cut to 80 characters."""
    text = {None: "null", True: "true", False: "false"}.get(value, "") if isinstance(value, bool | None) else ""
    text = text or (repr(value) if isinstance(value, str) else str(value))
    return text if len(text) <= 80 else f"{text[:77]}..."
