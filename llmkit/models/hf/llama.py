"""Llama, and Mistral without a sliding window, which computes the same: rotary positions, RMSNorm, gated layers."""

from __future__ import annotations

from typing import Any

from llmkit.models.config import DecoderConfig
from llmkit.models.hf.family import Family, Keys, Stack, stacked_rows

ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}

OUTER_ROWS = stacked_rows((("model.embed_tokens", "embedding"), ("model.norm", "norm"), ("lm_head", "head")))
COPIES = {"lm_head.weight": "model.embed_tokens.weight"}
NORM_ROWS = stacked_rows(
    (
        ("model.layers.{}.input_layernorm", "blocks.{}.attention_norm"),
        ("model.layers.{}.post_attention_layernorm", "blocks.{}.mlp_norm"),
    )
)
MATRIX_ROWS = stacked_rows(
    (
        *((f"model.layers.{{}}.self_attn.{x}_proj", f"blocks.{{}}.attention.{x}") for x in "qkvo"),
        *((f"model.layers.{{}}.mlp.{x}_proj", f"blocks.{{}}.mlp.{x}") for x in ("gate", "up", "down")),
    ),
    kinds=("weight", "bias"),
)


def is_llama_like(config: DecoderConfig) -> bool:
    return config.position == "rotary" and config.norm == "rmsnorm" and config.gated


def fits(config: DecoderConfig) -> bool:
    # transformers refuses a Llama width that its heads do not divide, even where the head width is given
    return is_llama_like(config) and not config.qk_norm and config.d_model % config.n_heads == 0


def write(config: DecoderConfig) -> dict[str, Any]:
    """Both the old and the new spelling of the rotary settings: other tools still read the old one."""
    return {
        "vocab_size": config.vocab_rows,
        "max_position_embeddings": config.max_seq_len,
        "hidden_size": config.d_model,
        "intermediate_size": config.ff_width,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu" if config.activation == "swiglu" else "gelu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "attention_dropout": config.dropout,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
    }


def read(keys: Keys) -> DecoderConfig:
    keys.expect("sliding_window", None)
    return read_llama_like(keys, qk_norm=False, mlp_bias=keys.flag("mlp_bias", False))


def read_llama_like(keys: Keys, *, qk_norm: bool, mlp_bias: bool) -> DecoderConfig:
    width, n_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    return DecoderConfig(
        vocab_size=keys.integer("vocab_size"),
        max_seq_len=keys.integer("max_position_embeddings", 2048),
        d_model=width,
        n_layers=keys.integer("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=keys.integer_or("num_key_value_heads", n_heads),
        d_head=keys.integer_or("head_dim", width // max(n_heads, 1)),
        d_ff=keys.integer("intermediate_size"),
        norm="rmsnorm",
        norm_bias=False,
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        activation=keys.choice("hidden_act", "silu", ACTIVATIONS),
        position="rotary",
        rope_theta=keys.rope_theta(),
        qk_norm=qk_norm,
        attention_bias=keys.flag("attention_bias", False),
        mlp_bias=mlp_bias,
        dropout=keys.number("attention_dropout", 0.0),
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        init_std=keys.number("initializer_range", 0.02),
        residual_init_scale=False,
    )


FAMILY = Family(
    model_types=("llama", "mistral"),
    architecture="LlamaForCausalLM",
    config=DecoderConfig,
    fits=fits,
    write=write,
    read=read,
    outer_rows=OUTER_ROWS,
    stacks=(Stack("n_layers", (*NORM_ROWS, *MATRIX_ROWS)),),
    copies=COPIES,
    prefix="model.",
    ignored=(".rotary_emb.inv_freq",),
)
