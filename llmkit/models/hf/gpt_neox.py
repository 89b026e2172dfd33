"""GPT-NeoX and Pythia: LayerNorm, a part of each head rotated, attention and feed-forward side by side.

The files hold q, k and v in one tensor, a head of each in turn.
"""

from __future__ import annotations

from typing import Any

from llmkit.models.config import DecoderConfig
from llmkit.models.hf import activations
from llmkit.models.hf.decoder_keys import PLAIN, is_plain, read_rotary, write_rotary
from llmkit.models.hf.family import Family, Keys, one_dropout
from llmkit.models.hf.rows import Row, Stack, stacked_rows

DROPOUTS = ("hidden_dropout", "attention_dropout")
BOTH = ("weight", "bias")


def fits(config: DecoderConfig) -> bool:
    plain = is_plain(config, "rope_scaling", "rotary_fraction", "parallel_residual") and config.position == "rotary"
    heads = config.kv_heads == config.n_heads and config.head_width * config.n_heads == config.d_model
    biases = config.norm_bias and config.mlp_bias and config.attention_bias == config.attention_out_bias
    return plain and heads and biases and config.norm == "layernorm" and not config.gated


def write(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_rows,
        "hidden_size": config.d_model,
        "intermediate_size": config.ff_width,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "hidden_act": activations.PLAIN_NAMES[config.activation],
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        **_write_rotary(config),
        "attention_bias": config.attention_bias,
        **dict.fromkeys(DROPOUTS, config.dropout),
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _write_rotary(config: DecoderConfig) -> dict[str, Any]:
    """Theta and share have names of their own, and the default share is a quarter: it is written always."""
    keys = write_rotary(config)
    theta, fraction = keys.pop("rope_theta"), {"partial_rotary_factor": config.rotary_fraction}
    keys |= {name: {**keys[name], **fraction} for name in ("rope_parameters", "rope_scaling") if name in keys}
    keys.pop("partial_rotary_factor", None)
    return {**keys, "rotary_emb_base": theta, "rotary_pct": config.rotary_fraction}


def read(keys: Keys) -> DecoderConfig:
    rotary = Keys({**keys.raw, "rope_theta": keys.number("rotary_emb_base", 10000.0)}, keys.where)
    return DecoderConfig(
        **{**PLAIN, **read_rotary(rotary, 2048, fraction=keys.number("rotary_pct", 0.25))}
        | {"parallel_residual": keys.flag("use_parallel_residual", True)},
        vocab_size=keys.integer("vocab_size"),
        d_model=keys.integer("hidden_size"),
        n_layers=keys.integer("num_hidden_layers"),
        n_heads=keys.integer("num_attention_heads"),
        n_kv_heads=None,
        d_head=None,
        d_ff=keys.integer("intermediate_size"),
        norm="layernorm",
        norm_bias=True,
        norm_eps=keys.number("layer_norm_eps", 1e-5),
        activation=keys.choice("hidden_act", "gelu", activations.PLAIN),
        attention_bias=keys.flag("attention_bias", True),
        attention_out_bias=keys.flag("attention_bias", True),
        attention_scale_dim=None,
        mlp_bias=True,
        dropout=one_dropout(keys, DROPOUTS, 0.0),
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        init_std=keys.number("initializer_range", 0.02),
        residual_init_scale=False,
    )


LAYER = "gpt_neox.layers.{}"
ROWS = (
    *(
        Row(
            f"{LAYER}.attention.query_key_value.{kind}",
            tuple(f"blocks.{{}}.attention.{x}.{kind}" for x in "qkv"),
            interleaved=True,
        )
        for kind in BOTH
    ),
    *stacked_rows(
        (
            (f"{LAYER}.input_layernorm", "blocks.{}.attention_norm"),
            (f"{LAYER}.post_attention_layernorm", "blocks.{}.mlp_norm"),
            (f"{LAYER}.attention.dense", "blocks.{}.attention.o"),
            (f"{LAYER}.mlp.dense_h_to_4h", "blocks.{}.mlp.up"),
            (f"{LAYER}.mlp.dense_4h_to_h", "blocks.{}.mlp.down"),
        ),
        kinds=BOTH,
    ),
)

FAMILY = Family(
    model_types=("gpt_neox",),
    architecture="GPTNeoXForCausalLM",
    config=DecoderConfig,
    fits=fits,
    write=write,
    read=read,
    outer_rows=(
        *stacked_rows((("gpt_neox.embed_in", "embedding"), ("embed_out", "head"))),
        *stacked_rows((("gpt_neox.final_layer_norm", "norm"),), kinds=BOTH),
    ),
    stacks=(Stack("n_layers", ROWS),),
    copies={"embed_out.weight": "gpt_neox.embed_in.weight"},
    prefix="gpt_neox.",
    unprefixed=("embed_out.",),
    old_endings={"lm_head.weight": "embed_out.weight"},
    ignored=(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
)
