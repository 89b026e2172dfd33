"""ModernBERT: pre-norm blocks, rotary positions, gated layers, and of every few layers one that sees everything."""

from __future__ import annotations

from typing import Any

from llmkit.models.encoder_config import EncoderConfig
from llmkit.models.hf import activations
from llmkit.models.hf.bert import BOTH, HEAD, OTHER_HEADS
from llmkit.models.hf.family import Family, Keys, one_dropout
from llmkit.models.hf.rows import Row, Stack, stacked_rows

DROPOUTS = ("attention_dropout", "embedding_dropout", "mlp_dropout")
GLOBAL, LOCAL = "full_attention", "sliding_attention"


def fits(config: EncoderConfig) -> bool:
    plain = not config.n_segments and not config.pooler and not config.share_layers and config.d_embedding is None
    gated = config.gated and config.transform_function == "gelu"
    return plain and config.norm_position == "pre" and config.position == "rotary" and gated


def write(config: EncoderConfig) -> dict[str, Any]:
    """Both the old and the new spelling of layers and rotary settings: other tools still read the old ones."""
    local_theta = config.local_rope_theta or config.rope_theta
    keys = {
        "vocab_size": config.vocab_rows,
        "max_position_embeddings": config.max_seq_len,
        "hidden_size": config.d_model,
        "intermediate_size": config.ff_width,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "hidden_activation": activations.GATE_NAMES[config.activation],
        "norm_eps": config.norm_eps,
        "norm_bias": config.norm_bias,
        "layer_types": [GLOBAL if config.is_global(layer) else LOCAL for layer in range(config.n_layers)],
        "global_attn_every_n_layers": config.global_every,
        "rope_parameters": {
            GLOBAL: {"rope_type": "default", "rope_theta": config.rope_theta},
            LOCAL: {"rope_type": "default", "rope_theta": local_theta},
        },
        "global_rope_theta": config.rope_theta,
        "local_rope_theta": local_theta,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "classifier_bias": config.transform_bias,
        "classifier_activation": "gelu",
        "decoder_bias": config.head_bias,
        **dict.fromkeys(DROPOUTS, config.dropout),
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "cls_token_id": None,  # else those of the published vocabulary
        "sep_token_id": None,
    }
    return keys if config.local_window is None else {**keys, "local_attention": config.local_window}


def read(keys: Keys) -> EncoderConfig:
    keys.expect("classifier_activation", "gelu")
    n_layers = keys.integer("num_hidden_layers")
    global_every = _global_every(keys, n_layers)
    is_local = global_every > 1
    return EncoderConfig(
        vocab_size=keys.integer("vocab_size"),
        max_seq_len=keys.integer("max_position_embeddings", 8192),
        d_model=keys.integer("hidden_size"),
        d_embedding=None,
        n_layers=n_layers,
        n_heads=keys.integer("num_attention_heads"),
        d_ff=keys.integer("intermediate_size"),
        norm_position="pre",
        norm_bias=keys.flag("norm_bias", False),
        norm_eps=keys.number("norm_eps", 1e-5),
        activation=keys.choice("hidden_activation", "gelu", activations.GATES),
        position="rotary",
        rope_theta=_theta(keys, GLOBAL, "global_rope_theta", 160_000.0),
        local_rope_theta=_theta(keys, LOCAL, "local_rope_theta", 10_000.0) if is_local else None,
        global_every=global_every,
        local_window=keys.integer("local_attention", 128) if is_local else None,
        n_segments=0,
        attention_bias=keys.flag("attention_bias", False),
        mlp_bias=keys.flag("mlp_bias", False),
        transform_activation=None,
        transform_bias=keys.flag("classifier_bias", False),
        head_bias=keys.flag("decoder_bias", True),
        pooler=False,
        share_layers=False,
        dropout=one_dropout(keys, DROPOUTS, 0.0),
        tie_embeddings=keys.flag("tie_word_embeddings", True),
        init_std=keys.number("initializer_range", 0.02),
        residual_init_scale=True,
    )


def _global_every(keys: Keys, n_layers: int) -> int:
    """From ``layer_types`` (transformers 5) or ``global_attn_every_n_layers`` (before)."""
    types = keys.raw.get("layer_types")
    if types is None:
        return keys.integer("global_attn_every_n_layers", 3)
    for every in range(1, n_layers + 1):
        if types == [LOCAL if layer % every else GLOBAL for layer in range(n_layers)]:
            return every
    raise keys.error("layer_types", "must be full_attention in the first layer and in every n-th one after it")


def _theta(keys: Keys, kind: str, old_name: str, default: float) -> float:
    """Of one kind of layer, from ``rope_parameters`` (transformers 5) or the keys of before."""
    rope: Any = keys.raw.get("rope_parameters") or {}
    of_kind = (rope.get(kind) or {}) if isinstance(rope, dict) else None
    if not isinstance(of_kind, dict):
        raise keys.error("rope_parameters", "must be an object with an object for each kind of layer")
    inner = Keys(of_kind, f"{keys.where}:rope_parameters.{kind}")
    inner.expect("rope_type", "default")
    before = default if keys.raw.get(old_name) is None else keys.number(old_name)
    return inner.number("rope_theta", before)


LAYER_ROWS = (
    *stacked_rows(
        (
            ("model.layers.{}.attn_norm", "blocks.{}.attention_norm"),
            ("model.layers.{}.mlp_norm", "blocks.{}.mlp_norm"),
            ("model.layers.{}.attn.Wo", "blocks.{}.attention.o"),
            ("model.layers.{}.mlp.Wo", "blocks.{}.mlp.down"),
        ),
        kinds=BOTH,
    ),
    *(
        Row(f"model.layers.{{}}.{theirs}.{kind}", tuple(f"blocks.{{}}.{part}.{kind}" for part in ours))
        for theirs, ours in (
            ("attn.Wqkv", ("attention.q", "attention.k", "attention.v")),
            ("mlp.Wi", ("mlp.gate", "mlp.up")),
        )
        for kind in BOTH
    ),
)

FAMILY = Family(
    model_types=("modernbert",),
    architecture="ModernBertForMaskedLM",
    config=EncoderConfig,
    fits=fits,
    write=write,
    read=read,
    outer_rows=(
        Row("model.embeddings.tok_embeddings.weight", ("embedding.weight",)),
        *stacked_rows(
            (
                ("model.embeddings.norm", "embedding_norm"),
                ("model.final_norm", "norm"),
                ("head.dense", "transform.dense"),
                ("head.norm", "transform.norm"),
            ),
            kinds=BOTH,
        ),
        Row("decoder.weight", ("head.weight",)),
        Row("decoder.bias", ("output_bias",)),
    ),
    stacks=(Stack("n_layers", LAYER_ROWS),),
    copies={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    prefix="model.",
    unprefixed=("head.", "decoder."),
    heads=HEAD,
    left_aside=OTHER_HEADS,
)
