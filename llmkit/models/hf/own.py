"""Our own format, for combinations that no Hugging Face architecture computes, and the ``llmkit`` key of every config.

The key holds all fields of the config class, so that every model is rebuilt exactly, whatever its family can express.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, get_args, get_origin, get_type_hints

from llmkit.models.hf.family import Family, Keys

KEY = "llmkit"
LATER = {"scale_attention_by_layer": False, "transform_activation": None, "attention_dropout": None}  # not in old files


def as_key(config: Any) -> dict[str, Any]:
    return asdict(config)


def read(keys: Keys, kind: type) -> Any:
    """A config of the class ``kind`` from the ``llmkit`` key: every field once, each of its type. Fields that old
    files do not have are as those models were.

    Raises ``CheckpointError``.
    """
    raw = keys.raw.get(KEY)
    if not isinstance(raw, dict):
        raise keys.error(KEY, "must be an object")
    expected = {field.name for field in fields(kind)}
    raw = {name: value for name, value in LATER.items() if name in expected} | raw
    for name in sorted(expected ^ raw.keys()):
        raise keys.error(
            f"{KEY}.{name}", "is missing" if name in expected else "is unknown: written by a newer llmkit?"
        )
    hints = get_type_hints(kind)
    for name, value in raw.items():
        if not _fits(value, hints[name]):
            raise keys.error(f"{KEY}.{name}", f"has the value {value!r}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()})


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a type: a class, a ``Literal``, a tuple, a dict, or a union of these and None."""
    choices, origin = get_args(kind), get_origin(kind)
    if kind is Any:
        return True
    if origin is tuple:  # a list of any length; the second argument is the ellipsis
        return isinstance(value, list | tuple) and all(_fits(item, choices[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, choices[1]) for item in value.values())
    if not choices:
        allowed = (int, float) if kind is float else kind
        return isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
    return any(
        value is None if c is type(None) else value == c if isinstance(c, str) else _fits(value, c) for c in choices
    )


def own_family(config: type, model_type: str) -> Family:
    """Our own format for the models of one config class: every parameter under its own name."""
    return Family(
        model_types=(model_type,),
        architecture=None,
        config=config,
        fits=lambda config: True,
        write=lambda config: {"vocab_size": config.vocab_rows},
        read=lambda keys: read(keys, config),
        own_names=True,
    )
