"""``llmkit <command> --help``: the groups with their options, and every key with its value, meaning and type."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from llmkit.config.build import TARGET, is_node
from llmkit.config.check import MISSING, config_error
from llmkit.config.choices import Choices
from llmkit.config.compose import Composed, compose
from llmkit.config.schema import ROOTS, Node
from llmkit.config.targets import config_fields, is_late, resolve
from llmkit.config.values import describe
from llmkit.config.yaml_file import dump

_WIDTH = 118
_INDENT = 50  # where the meaning of a key begins
_WORDS = {"a whole number": "int", "a number": "float", "true or false": "bool", " or null": "|null"}
_SHORT = re.compile("|".join(_WORDS))
_TRAPS = """\
values:
  null switches a value off; 1e-4 is a number; write a list as [a,b], in quotes for the shell: 'data.path=[a.txt,b.txt]'
  key=a,b is a sweep and needs -m; ~tracking.wandb takes a tracker out; a value may hold spaces and any letters"""


def config_help(command: str, overrides: Sequence[str], config_dir: Path | None) -> str:
    """What stands below the flags. Choices on the line (``model=gpt2``) decide which keys are shown."""
    composed = compose(command, overrides, config_dir)
    if composed.problems:
        raise config_error(composed.problems)
    groups = "\n".join(_groups(command, config_dir, composed))
    return "\n\n".join([*([groups] if groups else []), "\n".join(_keys(composed)), _TRAPS])


def _groups(command: str, config_dir: Path | None, composed: Composed) -> Iterator[str]:
    """A group and its options, the chosen one first."""
    options_of = Choices(command, config_dir).options
    if options_of:
        yield "groups (group=option):"
    for group, options in options_of.items():
        chosen = composed.chosen.get(group)
        rest = [option for option in options if option != chosen]
        options_text = f"{f'[{chosen}] ' if chosen else ''}{' '.join(rest)}"
        yield textwrap.fill(f"  {group:<10} {options_text}", _WIDTH, subsequent_indent=" " * 13, break_on_hyphens=False)


def _keys(composed: Composed) -> Iterator[str]:
    yield "keys (key=value): value now, meaning, and what they take in brackets"
    hints = get_type_hints(ROOTS[composed.command], include_extras=True)
    for field in fields(ROOTS[composed.command]):
        hint, value = hints[field.name], composed.plain.get(field.name)
        if hint != Node | None or is_node(value):  # else a group of which no option was chosen
            yield from _part(composed, field.name, hint, value)


def _part(composed: Composed, path: str, hint: Any, value: Any) -> Iterator[str]:
    """A section, a node, a section of nodes, or one value."""
    if is_dataclass(hint) and isinstance(hint, type):
        yield f"\n{path}"
        for name, inner in get_type_hints(hint, include_extras=True).items():
            yield from _line(composed, f"{path}.{name}", inner, value.get(name, MISSING))
    elif is_node(value):
        yield f"\n{path}: {value[TARGET]}"
        yield from _node(composed, path, value)
    elif isinstance(value, Mapping):
        for name, node in value.items():
            yield from _part(composed, f"{path}.{name}", None, node)
    else:
        yield from _line(composed, path, hint, value)


def _node(composed: Composed, path: str, node: Mapping[str, Any]) -> Iterator[str]:
    known = {} if is_late(node[TARGET]) else config_fields(resolve(node[TARGET]))[0]
    for name in [*known, *(key for key in node if key not in known and key != TARGET)]:
        hint = known[name].hint if name in known else None
        yield from _line(composed, f"{path}.{name}", hint, node.get(name, MISSING))


def _line(composed: Composed, path: str, hint: Any, value: Any) -> Iterator[str]:
    """``key  value  meaning (what it takes)``, wrapped under the meaning."""
    head = f"  {path:<34} {_shown(value):<12}"
    takes = "" if get_origin(hint) is Literal else f" ({_SHORT.sub(lambda match: _WORDS[match[0]], describe(hint))})"
    lines = textwrap.wrap(f"{composed.meaning(path)}{takes}".strip(), _WIDTH - _INDENT)
    if len(head) >= _INDENT:
        yield head
        head = ""
    for line in lines:
        yield f"{head:<{_INDENT}}{line}"
        head = ""


def _shown(value: Any) -> str:
    if value == MISSING:
        return "needed"
    return str(value) if isinstance(value, list | dict) else dump(value).removesuffix("\n").removesuffix("\n...")
