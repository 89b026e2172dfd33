"""Makes the object that a ``_target_`` node describes. The config check has looked at the node before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.config.targets import Field, fields_of, is_late, resolve
from llmkit.errors import ConfigError

TARGET = "_target_"


def is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and TARGET in value


def build(node: Mapping[str, Any], **runtime: Any) -> Any:
    """The object of ``node``; nodes inside it are built first.

    ``runtime`` are arguments that no YAML can hold; the class gets those that it names.
    Raises ConfigError when the class is not allowed or does not take these arguments.
    """
    target = node.get(TARGET)
    cls = resolve(target)
    fields, takes_any = fields_of(cls)
    arguments = {str(key): _built(value) for key, value in node.items() if key != TARGET}
    arguments |= {key: value for key, value in runtime.items() if takes_any or key in fields}
    _check_arguments(str(target), arguments, fields, takes_any)
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        if is_late(str(target)):  # torch refuses a value only here
            raise ConfigError(f"{target}: {error}") from error
        raise


def _built(value: Any) -> Any:
    if is_node(value):
        return build(value)
    if isinstance(value, Mapping):
        return {key: _built(item) for key, item in value.items()}
    return [_built(item) for item in value] if isinstance(value, list) else value


def _check_arguments(target: str, arguments: Mapping[str, Any], fields: Mapping[str, Field], takes_any: bool) -> None:
    unknown = [] if takes_any else sorted(set(arguments) - set(fields))
    missing = sorted(name for name, field in fields.items() if field.required and name not in arguments)
    if unknown or missing:
        faults = [f"no argument {name!r}" for name in unknown] + [f"{name!r} is missing" for name in missing]
        raise ConfigError(f"{target}: {'; '.join(faults)}", fix=f"it takes: {', '.join(fields)}")
