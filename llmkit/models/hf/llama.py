"""Llama 2 and 3, and all that are like them (SmolLM): rotary positions, RMSNorm, gated feed-forward layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmkit.models.config import DecoderConfig
from llmkit.models.hf.activations import GATE_NAMES, GATES
from llmkit.models.hf.decoder_keys import PLAIN, is_plain, read_rotary, write_rotary
from llmkit.models.hf.family import Family, Keys
from llmkit.models.hf.rows import Row, Stack, stacked_rows

BOTH = ("weight", "bias")
IGNORED = (".rotary_emb.inv_freq",)


def outer_rows(offset: float = 0.0) -> tuple[Row, ...]:
    """``offset`` is that of the norms."""
    norm = stacked_rows((("model.norm", "norm"),), offset=offset)
    return (*norm, *stacked_rows((("model.embed_tokens", "embedding"), ("lm_head", "head"))))


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
    kinds=BOTH,
)


def qk_norm_rows(offset: float = 0.0) -> tuple[Row, ...]:
    pairs = [(f"model.layers.{{}}.self_attn.{x}_norm", f"blocks.{{}}.attention.{x}_norm") for x in "qk"]
    return stacked_rows(pairs, offset=offset)


def is_llama_like(config: DecoderConfig) -> bool:
    """Whether the parts are those of a Llama, however they are put together."""
    return config.position == "rotary" and config.norm == "rmsnorm" and config.gated


def one_bias(config: DecoderConfig) -> bool:
    """Whether the attention has all of its biases or none, and the feed-forward layers none."""
    return config.attention_bias == config.attention_out_bias and not config.mlp_bias


def no_bias(config: DecoderConfig) -> bool:
    return not (config.attention_bias or config.attention_out_bias or config.mlp_bias)


def heads_divide(config: DecoderConfig) -> bool:
    """Several classes of transformers refuse other widths, even where the head width is given."""
    return config.d_model % config.n_heads == 0


def fits(config: DecoderConfig) -> bool:
    biases = config.attention_bias == config.attention_out_bias
    return is_llama_like(config) and is_plain(config, "rope_scaling") and biases and heads_divide(config)


def write(config: DecoderConfig) -> dict[str, Any]:
    return {**write_llama_like(config), "attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def write_llama_like(config: DecoderConfig, activation: str = "hidden_act") -> dict[str, Any]:
    """``activation`` is the key of the word for it."""
    return {
        "vocab_size": config.vocab_rows,
        "hidden_size": config.d_model,
        "intermediate_size": config.ff_width,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        activation: GATE_NAMES[config.activation],
        "rms_norm_eps": config.norm_eps,
        **write_rotary(config),
        "attention_dropout": config.dropout,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
    }


def read(keys: Keys) -> DecoderConfig:
    keys.expect("sliding_window", None)
    return replace(read_llama_like(keys), mlp_bias=keys.flag("mlp_bias", False), **attention_biases(keys))


def attention_biases(keys: Keys) -> dict[str, Any]:
    """Where one key decides all of them."""
    return dict.fromkeys(("attention_bias", "attention_out_bias"), keys.flag("attention_bias", False))


def read_llama_like(
    keys: Keys, activation: str = "hidden_act", default_len: int = 2048, fraction: float | None = None
) -> DecoderConfig:
    """A model without biases; callers change what is theirs. ``fraction`` as in ``read_rotary``."""
    width, n_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    return DecoderConfig(
        **{**PLAIN, **read_rotary(keys, default_len, fraction=fraction)},
        vocab_size=keys.integer("vocab_size"),
        d_model=width,
        n_layers=keys.integer("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=keys.integer_or("num_key_value_heads", n_heads),
        d_head=keys.integer_or("head_dim", width // max(n_heads, 1)),
        d_ff=keys.integer("intermediate_size"),
        norm="rmsnorm",
        norm_bias=False,
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        activation=keys.choice(activation, "silu", GATES),
        attention_bias=False,
        attention_out_bias=False,
        attention_scale_dim=None,
        mlp_bias=False,
        dropout=keys.number("attention_dropout", 0.0),
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        init_std=keys.number("initializer_range", 0.02),
        residual_init_scale=False,
    )


FAMILY = Family(
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    config=DecoderConfig,
    fits=fits,
    write=write,
    read=read,
    outer_rows=outer_rows(),
    stacks=(Stack("n_layers", (*NORM_ROWS, *MATRIX_ROWS)),),
    copies=COPIES,
    prefix="model.",
    ignored=IGNORED,
)
