"""Which classes a ``_target_`` may name, and what their fields are.

A target must lie under an allowed prefix, by its dotted path and again by the module that really defines it, and must
be a class: ``llmkit.cli.os.system`` is refused twice. Names found in checkpoints or data files never come here.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
import typing
from typing import Any

from llmkit.errors import ConfigError

TORCH_OPTIMIZERS = "torch.optim."
OWN = "llmkit."
_allowed: list[str] = [OWN, TORCH_OPTIMIZERS]
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)


def allow(prefix: str) -> None:
    """Let the user's own package be named: what ``--allow mypackage`` asks for."""
    prefix = prefix.rstrip(".") + "."
    if prefix not in _allowed:
        _allowed.append(prefix)


def allowed_prefixes() -> tuple[str, ...]:
    return tuple(_allowed)


def is_late(target: str) -> bool:
    """Classes of torch, which are looked up only when torch is imported anyway."""
    return target.startswith(TORCH_OPTIMIZERS)


def resolve(target: Any) -> type:
    """The class that ``target`` names; raises ConfigError when it is not allowed, not there or not a class."""
    prefix = _prefix_of(target)
    module_name, _, class_name = target.rpartition(".")
    if prefix not in (OWN, TORCH_OPTIMIZERS) and "" not in sys.path:
        sys.path.append("")  # a package in the working folder, which `python -m llmkit` finds and `llmkit` does not
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # whatever importing the user's module does
        raise ConfigError(f"cannot import {target}: {type(error).__name__}: {error}") from error
    if not isinstance(found, type):
        raise ConfigError(f"{target} is not a class")
    if not f"{found.__module__}.".startswith(tuple(_allowed)):
        raise ConfigError(f"{target} is really {found.__module__}.{found.__qualname__}, which is not allowed")
    return found


def _prefix_of(target: Any) -> str:
    if not isinstance(target, str) or not _NAME.fullmatch(target):
        raise ConfigError(f"not a dotted class name: {str(target)[:80]!r}")
    for prefix in _allowed:
        if target.startswith(prefix):
            return prefix
    top = target.partition(".")[0]
    raise ConfigError(f"{target[:80]} is not under {', '.join(_allowed)}", fix=f"--allow {top} lets it be imported")


@dataclasses.dataclass(frozen=True)
class Field:
    """One argument of a class: its type and whether it must be given."""

    name: str
    hint: Any
    required: bool


def config_fields(cls: type) -> tuple[dict[str, Field], bool]:
    """The arguments that a YAML may give. In llmkit's own classes a default marks what only ``build`` can give."""
    fields, takes_any = fields_of(cls)
    own = cls.__module__.startswith(OWN)
    return {name: field for name, field in fields.items() if field.required or not own}, takes_any


def fields_of(cls: type) -> tuple[dict[str, Field], bool]:
    """The arguments of ``cls`` by name, and whether it takes any others too."""
    init = cls if dataclasses.is_dataclass(cls) else inspect.getattr_static(cls, "__init__")
    hints = typing.get_type_hints(init, include_extras=True)
    parameters = inspect.signature(cls).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    fields = {p.name: Field(p.name, hints.get(p.name, Any), p.default is p.empty) for p in named}
    return fields, any(p.kind is p.VAR_KEYWORD for p in parameters)
