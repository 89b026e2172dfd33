"""Marian: BART with sinusoids for positions and no norm after the embeddings."""

from __future__ import annotations

from typing import Any

from llmkit.models.encoder_decoder_config import EncoderDecoderConfig
from llmkit.models.hf import bart
from llmkit.models.hf.family import Keys


def fits(config: EncoderDecoderConfig) -> bool:
    return bart.is_bart_like(config) and config.position == "sinusoidal" and not config.embedding_norm


def write(config: EncoderDecoderConfig) -> dict[str, Any]:
    return {
        **bart.write(config),
        "decoder_vocab_size": config.vocab_rows,
        "share_encoder_decoder_embeddings": True,
    }


def read(keys: Keys) -> EncoderDecoderConfig:
    keys.expect("normalize_embedding", False)
    keys.expect("static_position_embeddings", True)
    keys.expect("share_encoder_decoder_embeddings", True)
    keys.expect("decoder_vocab_size", keys.integer("vocab_size"), None)
    return bart.read_bart_like(keys, "sinusoidal", embedding_norm=False)


FAMILY = bart.BartFamily(
    model_types=("marian",),
    architecture="MarianMTModel",
    config=EncoderDecoderConfig,
    fits=fits,
    write=write,
    read=read,
    outer_rows=(bart.SHARED,),
    stacks=bart.STACKS,
    copies=bart.COPIES,
    prefix="model.",
    unprefixed=bart.UNPREFIXED,
    ignored=(".embed_positions.weight",),  # the sinusoids
    heads=bart.HEAD,
    zero_biases=True,
)
