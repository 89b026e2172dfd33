"""The families, and which of them a model or a file belongs to. Free of torch."""

from __future__ import annotations

from typing import Any

from llmkit.errors import CheckpointError
from llmkit.models.config import DecoderConfig
from llmkit.models.hf import gpt2, llama, own, qwen3
from llmkit.models.hf.family import Family

FAMILIES = (gpt2.FAMILY, llama.FAMILY, qwen3.FAMILY, own.FAMILY)  # the last one fits everything


def family_of(config: DecoderConfig) -> Family:
    """The family a model is saved as."""
    return next(family for family in FAMILIES if family.fits(config))


def family_named(model_type: Any, where: str) -> Family:
    """The family of a file. Raises ``CheckpointError`` for a type llmkit does not know."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise CheckpointError(
        f"model_type {model_type!r} is not one of {known}", where=where, fix="use a checkpoint of a known type"
    )
