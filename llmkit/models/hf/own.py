"""Our own format, for combinations that no Hugging Face architecture computes, and the ``llmkit`` key of every config.

The key holds all fields of ``DecoderConfig``, so that every model is rebuilt exactly, whatever its family can express.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, get_args, get_type_hints

from llmkit.models.config import DecoderConfig
from llmkit.models.hf.family import Family, Keys, stacked_rows

KEY = "llmkit"
PARTS = (
    *(f"attention.{x}" for x in ("q", "k", "v", "o", "q_norm", "k_norm")),
    *(f"mlp.{x}" for x in ("gate", "up", "down")),
    "attention_norm",
    "mlp_norm",
)


def as_key(config: DecoderConfig) -> dict[str, Any]:
    return asdict(config)


def read(keys: Keys) -> DecoderConfig:
    """From the ``llmkit`` key: every field once, each of its type. Raises ``CheckpointError``."""
    raw = keys.raw.get(KEY)
    if not isinstance(raw, dict):
        raise keys.error(KEY, "must be an object")
    expected = {field.name for field in fields(DecoderConfig)}
    for name in sorted(expected ^ raw.keys()):
        raise keys.error(
            f"{KEY}.{name}", "is missing" if name in expected else "is unknown: written by a newer llmkit?"
        )
    hints = get_type_hints(DecoderConfig)
    for name, value in raw.items():
        if not _fits(value, hints[name]):
            raise keys.error(f"{KEY}.{name}", f"has the value {value!r}")
    return DecoderConfig(**raw)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a type: a class, a ``Literal``, or a union with None."""
    choices = get_args(kind)
    if not choices:
        allowed = (int, float) if kind is float else kind
        return isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
    return any(
        value is None if c is type(None) else value == c if isinstance(c, str) else _fits(value, c) for c in choices
    )


def _same(*modules: str) -> tuple[tuple[str, str], ...]:
    return tuple((module, module) for module in modules)


FAMILY = Family(
    model_types=("llmkit_decoder",),
    architecture=None,
    fits=lambda config: True,
    write=lambda config: {"vocab_size": config.vocab_rows},
    read=read,
    outer_rows=stacked_rows(_same("embedding", "position_embedding", "norm", "head"), kinds=("weight", "bias")),
    layer_rows=stacked_rows(_same(*(f"blocks.{{}}.{part}" for part in PARTS)), kinds=("weight", "bias")),
)
