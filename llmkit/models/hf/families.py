"""The families, and which of them a model or a file belongs to. Free of torch."""

from __future__ import annotations

from typing import Any

from llmkit.errors import CheckpointError
from llmkit.interfaces import ModelConfig
from llmkit.models.config import DecoderConfig
from llmkit.models.encoder_config import EncoderConfig
from llmkit.models.encoder_decoder_config import EncoderDecoderConfig
from llmkit.models.hf import bart, bert, gpt2, llama, marian, modernbert, qwen3, roberta, t5
from llmkit.models.hf.family import Family
from llmkit.models.hf.own import own_family
from llmkit.models.lstm_config import LSTMConfig
from llmkit.models.lstm_seq2seq_config import LSTMSeq2SeqConfig

# Of each config class, the last one fits everything.
FAMILIES = (
    gpt2.FAMILY,
    llama.FAMILY,
    qwen3.FAMILY,
    roberta.FAMILY,
    bert.FAMILY,
    modernbert.FAMILY,
    t5.FAMILY,
    bart.FAMILY,
    marian.FAMILY,
    own_family(DecoderConfig, "llmkit_decoder"),
    own_family(EncoderConfig, "llmkit_encoder"),
    own_family(EncoderDecoderConfig, "llmkit_encoder_decoder"),
    own_family(LSTMConfig, "llmkit_lstm"),
    own_family(LSTMSeq2SeqConfig, "llmkit_lstm_seq2seq"),
)


def family_of(config: ModelConfig) -> Family:
    """The family a model is saved as."""
    return next(family for family in FAMILIES if isinstance(config, family.config) and family.fits(config))


def family_named(model_type: Any, where: str) -> Family:
    """The family of a file. Raises ``CheckpointError`` for a type llmkit does not know."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise CheckpointError(
        f"model_type {model_type!r} is not one of {known}", where=where, fix="use a checkpoint of a known type"
    )
