"""Reads ``key=value`` arguments with Hydra's own grammar, and as plain text what that grammar refuses."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from llmkit.errors import Problem

COMMAND_LINE = "command line"
_SURROGATE = re.compile("[\ud800-\udfff]")  # how Python spells a byte of an argument that it cannot decode


@dataclass(frozen=True)
class Override:
    """One argument. ``raw`` is the value as typed; ``hydra`` is the argument in a spelling that Hydra reads."""

    text: str
    key: str
    kind: Literal["set", "delete"]
    value: Any
    raw: str
    hydra: str
    choices: tuple[str, ...] = ()  # every value of a sweep, as text


def parse(text: str, *, sweep: bool = False) -> Override | Problem:
    """``text`` as an override. Several values (``a=1,2``) are an error unless ``sweep``."""
    if _SURROGATE.search(text):
        return Problem(
            text.encode("ascii", "backslashreplace").decode()[:80], "holds bytes that are not UTF-8", COMMAND_LINE
        )
    key, equals, raw = text.partition("=")
    if not equals and not text.startswith("~"):
        return _not_an_override(text)
    if not key.strip("+~"):
        return Problem(text[:80], "an argument needs a key before '='", COMMAND_LINE)
    spellings = (text, f"{key}={_quoted_list(raw)}", f"{key}={quoted(raw)}")
    hydra, parsed = next(((words, found) for words in spellings if (found := _hydra_parse(words))), ("", None))
    if parsed is None:
        return Problem(key, "not a config key", COMMAND_LINE, "keys are words joined by dots, as in optim.lr=1e-3")
    name = key.lstrip("+~").strip()
    if parsed.is_delete():
        return Override(text, name, "delete", None, raw, hydra)
    if not parsed.is_sweep_override():
        return Override(text, name, "set", parsed.value(), raw, hydra)
    if sweep:
        return Override(text, name, "set", None, raw, hydra, _sweep_values(parsed))
    if os.path.exists(raw):  # one path with a comma in its name
        return Override(text, name, "set", raw, raw, f"{key}={quoted(raw)}")
    fix = f"write {name}=[{raw[:80]}] for a list, or add -m to run each"
    return Problem(name, f"several values: {raw[:80]}", COMMAND_LINE, fix)


def _not_an_override(text: str) -> Problem:
    if text.endswith((".yaml", ".yml")) or re.fullmatch(r"\w+", text):
        return Problem(text[:80], "not a key=value argument", COMMAND_LINE, f"did you mean recipe={text[:80]}?")
    return Problem(text[:80], "not a key=value argument", COMMAND_LINE)


def _hydra_parse(text: str) -> Any:
    from hydra.errors import HydraException

    try:
        return _parser().parse_override(text)
    except HydraException:
        return None


@cache
def _parser() -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


def quoted(raw: str) -> str:
    """``raw`` as a quoted string of the grammar, where a backslash escapes only quotes and runs before a quote."""
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", raw)
    return "'" + re.sub(r"(\\+)$", lambda match: match[1] * 2, escaped) + "'"


def _quoted_list(raw: str) -> str:
    """A plain list with each item quoted: ``[<mask>,<s>]`` holds signs that the grammar has no use for."""
    items = re.fullmatch(r"\[([^\[\]{}'\"]*)\]", raw.strip())
    return "[" + ",".join(quoted(item.strip()) for item in items[1].split(",")) + "]" if items else raw


def _sweep_values(parsed: Any) -> tuple[str, ...]:
    """Values of a finite sweep as override text; empty for one that only Hydra or a sweeper can enumerate."""
    if not parsed.is_discrete_sweep() or parsed.value_type.name == "GLOB_CHOICE_SWEEP":
        return ()
    return tuple(parsed.sweep_string_iterator())
