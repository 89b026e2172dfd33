"""Gemma 2: norms before and after every layer, stored less one; soft caps; a window in every second layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmkit.models.config import DecoderConfig
from llmkit.models.hf import llama
from llmkit.models.hf.decoder_keys import FULL, WINDOW, has_one_window, is_plain, layer_types, read_windows, window_size
from llmkit.models.hf.family import Family, Keys
from llmkit.models.hf.rows import Stack, stacked_rows

ACTIVATION = "hidden_activation"
OFFSET = 1.0  # the files hold what a norm's weights have more than one
DEFAULTS = {  # of transformers, where a file leaves them out
    "num_key_value_heads": 4,
    "head_dim": 256,
    ACTIVATION: "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
SOFT_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def fits(config: DecoderConfig) -> bool:
    free = ("rope_scaling", "attention_windows", "attention_scale_dim", "attention_softcap", "logit_softcap")
    return is_plain(config, *free, norm_position="both", scale_embedding=True) and is_gemma_like(config)


def is_gemma_like(config: DecoderConfig) -> bool:
    parts = llama.is_llama_like(config) and llama.one_bias(config) and llama.heads_divide(config)
    return parts and has_one_window(config)


def write(config: DecoderConfig) -> dict[str, Any]:
    return {**write_gemma_like(config), "attn_logit_softcapping": config.attention_softcap}


def write_gemma_like(config: DecoderConfig) -> dict[str, Any]:
    return {
        **llama.write_llama_like(config, ACTIVATION),
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": config.attention_scale_dim or config.head_width,
        "sliding_window": window_size(config) or config.max_seq_len,  # transformers wants one in any case
        "layer_types": layer_types(config),
        "final_logit_softcapping": config.logit_softcap,
    }


def read(keys: Keys) -> DecoderConfig:
    keys = keys.with_defaults(**DEFAULTS, **SOFT_CAPS)
    config = llama.read_llama_like(keys, ACTIVATION, default_len=8192)
    types = [FULL if layer % 2 else WINDOW for layer in range(config.n_layers)]
    return replace(
        gemma_like(config, keys, types),
        attention_softcap=keys.number_or_none("attn_logit_softcapping"),
    )


def gemma_like(config: DecoderConfig, keys: Keys, types: list[str]) -> DecoderConfig:
    """What a Gemma has beyond a Llama. ``types`` are those of the layers where the file does not name them."""
    keys.expect("use_bidirectional_attention", False, None)
    scale_dim = keys.integer("query_pre_attn_scalar")
    return replace(
        config,
        norm_position="both",
        scale_embedding=True,
        attention_windows=read_windows(keys, types),
        attention_scale_dim=None if scale_dim == config.head_width else scale_dim,
        logit_softcap=keys.number_or_none("final_logit_softcapping"),
        **llama.attention_biases(keys),
    )


NORM_ROWS = stacked_rows(
    (
        ("model.layers.{}.input_layernorm", "blocks.{}.attention_norm"),
        ("model.layers.{}.post_attention_layernorm", "blocks.{}.attention_post_norm"),
        ("model.layers.{}.pre_feedforward_layernorm", "blocks.{}.mlp_norm"),
        ("model.layers.{}.post_feedforward_layernorm", "blocks.{}.mlp_post_norm"),
    ),
    offset=OFFSET,
)

FAMILY = Family(
    model_types=("gemma2",),
    architecture="Gemma2ForCausalLM",
    config=DecoderConfig,
    fits=fits,
    write=write,
    read=read,
    outer_rows=llama.outer_rows(OFFSET),
    stacks=(Stack("n_layers", (*NORM_ROWS, *llama.MATRIX_ROWS)),),
    copies=llama.COPIES,
    prefix="model.",
    ignored=llama.IGNORED,
)
