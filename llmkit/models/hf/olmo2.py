"""OLMo 2: a Llama with its norms after the layers, and others over all heads of q and of k together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmkit.models.config import DecoderConfig
from llmkit.models.hf import llama
from llmkit.models.hf.decoder_keys import is_plain
from llmkit.models.hf.family import Family, Keys
from llmkit.models.hf.rows import Stack, stacked_rows


def fits(config: DecoderConfig) -> bool:
    plain = is_plain(config, "rope_scaling", norm_position="post", qk_norm="all")
    return plain and llama.is_llama_like(config) and llama.one_bias(config)


def write(config: DecoderConfig) -> dict[str, Any]:
    return {**llama.write_llama_like(config), "attention_bias": config.attention_bias}


def read(keys: Keys) -> DecoderConfig:
    keys = keys.with_defaults(rms_norm_eps=1e-5)
    config = llama.read_llama_like(keys)
    return replace(config, norm_position="post", qk_norm="all", **llama.attention_biases(keys))


NORM_ROWS = stacked_rows(
    (
        ("model.layers.{}.post_attention_layernorm", "blocks.{}.attention_norm"),
        ("model.layers.{}.post_feedforward_layernorm", "blocks.{}.mlp_norm"),
    )
)

FAMILY = Family(
    model_types=("olmo2",),
    architecture="Olmo2ForCausalLM",
    config=DecoderConfig,
    fits=fits,
    write=write,
    read=read,
    outer_rows=llama.outer_rows(),
    stacks=(Stack("n_layers", (*NORM_ROWS, *llama.MATRIX_ROWS, *llama.qk_norm_rows())),),
    copies=llama.COPIES,
    prefix="model.",
    ignored=llama.IGNORED,
)
