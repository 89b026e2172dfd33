"""GPT-2: learned positions, LayerNorm and GELU. Its matrices are stored transposed (Conv1D), q, k and v in one."""

from __future__ import annotations

from typing import Any

from llmkit.models.config import DecoderConfig
from llmkit.models.hf import activations
from llmkit.models.hf.decoder_keys import PLAIN, is_plain
from llmkit.models.hf.family import Family, Keys, one_dropout
from llmkit.models.hf.rows import Row, Stack

DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def fits(config: DecoderConfig) -> bool:
    plain_heads = config.kv_heads == config.n_heads and config.head_width * config.n_heads == config.d_model
    plain_parts = config.norm == "layernorm" and not config.gated
    scale = config.attention_scale_dim in (None, config.head_width, 1)  # 1: scores are not divided at all
    plain = is_plain(config, "attention_scale_dim", "scale_attention_by_layer")
    return config.position == "learned" and plain_heads and plain_parts and scale and plain


def write(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_rows,
        "n_positions": config.max_seq_len,
        "n_ctx": config.max_seq_len,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.ff_width,
        "activation_function": activations.PLAIN_NAMES[config.activation],
        "scale_attn_weights": config.attention_scale_dim != 1,
        "scale_attn_by_inverse_layer_idx": config.scale_attention_by_layer,
        **dict.fromkeys(DROPOUTS, config.dropout),
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
    }


def read(keys: Keys) -> DecoderConfig:
    """``reorder_and_upcast_attn`` is not read: it changes the order of the same operations."""
    keys.expect("add_cross_attention", False)
    width = keys.integer("n_embd")
    return DecoderConfig(
        **{**PLAIN, "scale_attention_by_layer": keys.flag("scale_attn_by_inverse_layer_idx", False)},
        vocab_size=keys.integer("vocab_size"),
        max_seq_len=keys.integer("n_positions", 1024),
        d_model=width,
        n_layers=keys.integer("n_layer"),
        n_heads=keys.integer("n_head"),
        n_kv_heads=None,
        d_head=None,
        d_ff=keys.integer_or("n_inner", 4 * width),
        norm="layernorm",
        norm_bias=True,
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        activation=keys.choice("activation_function", "gelu_new", activations.PLAIN),
        position="learned",
        rope_theta=None,
        attention_bias=True,
        attention_out_bias=True,
        attention_scale_dim=None if keys.flag("scale_attn_weights", True) else 1,
        mlp_bias=True,
        dropout=one_dropout(keys, DROPOUTS, 0.1),
        tie_embeddings=keys.flag("tie_word_embeddings", True),
        init_std=keys.number("initializer_range", 0.02),
        residual_init_scale=True,
    )


def _layer(theirs: str, *ours: str, transposed: bool = False) -> tuple[Row, Row]:
    """Weight and bias of a module of block ``{}``."""
    name, parts = f"transformer.h.{{}}.{theirs}", [f"blocks.{{}}.{part}" for part in ours]
    weight = Row(f"{name}.weight", tuple(f"{part}.weight" for part in parts), transposed)
    return weight, Row(f"{name}.bias", tuple(f"{part}.bias" for part in parts))


LAYER_ROWS = (
    *_layer("ln_1", "attention_norm"),
    *_layer("attn.c_attn", "attention.q", "attention.k", "attention.v", transposed=True),
    *_layer("attn.c_proj", "attention.o", transposed=True),
    *_layer("ln_2", "mlp_norm"),
    *_layer("mlp.c_fc", "mlp.up", transposed=True),
    *_layer("mlp.c_proj", "mlp.down", transposed=True),
)

FAMILY = Family(
    model_types=("gpt2",),
    architecture="GPT2LMHeadModel",
    config=DecoderConfig,
    fits=fits,
    write=write,
    read=read,
    outer_rows=(
        Row("transformer.wte.weight", ("embedding.weight",)),
        Row("transformer.wpe.weight", ("position_embedding.weight",)),
        Row("transformer.ln_f.weight", ("norm.weight",)),
        Row("transformer.ln_f.bias", ("norm.bias",)),
        Row("lm_head.weight", ("head.weight",)),
    ),
    stacks=(Stack("n_layers", LAYER_ROWS),),
    copies={"lm_head.weight": "transformer.wte.weight"},
    prefix="transformer.",
    ignored=(".attn.bias", ".attn.masked_bias"),  # the causal mask, stored by old versions
    zero_biases=True,
)
