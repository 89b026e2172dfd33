"""The families, and which of them a model or a file belongs to. Free of torch."""

from __future__ import annotations

from typing import Any

from llmkit.errors import CheckpointError
from llmkit.interfaces import ModelConfig
from llmkit.models.config import DecoderConfig
from llmkit.models.encoder_config import EncoderConfig
from llmkit.models.encoder_decoder_config import EncoderDecoderConfig
from llmkit.models.hf import (
    bart,
    bert,
    distilbert,
    electra,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    llama,
    marian,
    mistral,
    modernbert,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    roberta,
    t5,
)
from llmkit.models.hf.family import Family
from llmkit.models.hf.own import own_family
from llmkit.models.lstm_config import LSTMConfig
from llmkit.models.lstm_seq2seq_config import LSTMSeq2SeqConfig

# The first one that fits is written: simple ones stand before others. Of each config class, the last fits everything.
FAMILIES = (
    gpt2.FAMILY,
    gpt_neox.FAMILY,
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    olmo2.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    phi3.FAMILY,
    roberta.FAMILY,
    bert.FAMILY,
    distilbert.FAMILY,
    electra.FAMILY,
    modernbert.FAMILY,
    t5.FAMILY,
    t5.MT5_FAMILY,
    bart.FAMILY,
    marian.FAMILY,
    own_family(DecoderConfig, "llmkit_decoder"),
    own_family(EncoderConfig, "llmkit_encoder"),
    own_family(EncoderDecoderConfig, "llmkit_encoder_decoder"),
    own_family(LSTMConfig, "llmkit_lstm"),
    own_family(LSTMSeq2SeqConfig, "llmkit_lstm_seq2seq"),
)

REASONS = {  # types that are near one llmkit has
    "gemma3": "holds an image encoder beside the text model; llmkit has the text model alone, gemma3_text",
}


def fitting_family(config: ModelConfig) -> Family | None:
    """The family a model is saved as; None for a model of another library, which that library saves."""
    fitting = (family for family in FAMILIES if isinstance(config, family.config) and family.fits(config))
    return next(fitting, None)


def family_of(config: ModelConfig) -> Family:
    """The family a model is saved as. Raises ``CheckpointError`` for a model of another library."""
    family = fitting_family(config)
    if family is None:
        raise CheckpointError(
            f"llmkit has no table of tensor names for a {type(config).__name__}",
            fix="models of model=transformers are saved and opened by transformers",
        )
    return family


def family_named(model_type: Any, where: str) -> Family:
    """The family of a file. Raises ``CheckpointError`` for a type llmkit does not know."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    if str(model_type) in REASONS:
        raise CheckpointError(f"model_type {model_type!r} {REASONS[str(model_type)]}", where=where)
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise CheckpointError(
        f"model_type {model_type!r} is not one of {known}",
        where=where,
        fix="`llmkit pretrain init=... model=transformers` opens what transformers knows",
    )
