"""DistilBERT: BERT without segments and pooler, its tensors under other names, its norms with one epsilon."""

from __future__ import annotations

from typing import Any

from llmkit.models.encoder_config import EncoderConfig
from llmkit.models.hf import activations
from llmkit.models.hf.bert import BOTH, HEAD, OTHER_HEADS, is_post_norm, one_activation, post_norm
from llmkit.models.hf.family import Family, Keys, one_dropout
from llmkit.models.hf.rows import Row, Stack, stacked_rows

NORM_EPS = 1e-12  # the architecture has no other
DROPOUTS = ("dropout", "attention_dropout")


def fits(config: EncoderConfig) -> bool:
    plain = config.n_segments == 0 and not config.pooler and config.d_embedding is None
    return is_post_norm(config) and one_activation(config) and plain and config.norm_eps == NORM_EPS


def write(config: EncoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_rows,
        "max_position_embeddings": config.max_seq_len,
        "dim": config.d_model,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "hidden_dim": config.ff_width,
        "activation": activations.PLAIN_NAMES[config.activation],
        **dict.fromkeys(DROPOUTS, config.dropout),
        "sinusoidal_pos_embds": False,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
    }


def read(keys: Keys) -> EncoderConfig:
    """``sinusoidal_pos_embds`` says what the position table was before training; the file holds it either way."""
    return post_norm(
        vocab_size=keys.integer("vocab_size"),
        max_seq_len=keys.integer("max_position_embeddings", 512),
        d_model=keys.integer("dim", 768),
        d_embedding=None,
        n_layers=keys.integer("n_layers", 6),
        n_heads=keys.integer("n_heads", 12),
        d_ff=keys.integer("hidden_dim", 3072),
        norm_eps=NORM_EPS,
        activation=keys.choice("activation", "gelu", activations.PLAIN),
        transform_activation=None,
        n_segments=0,
        pooler=False,
        dropout=one_dropout(keys, DROPOUTS, 0.1),
        tie_embeddings=keys.flag("tie_word_embeddings", True),
        init_std=keys.number("initializer_range", 0.02),
    )


LAYER = "distilbert.transformer.layer.{}"
LAYER_MODULES = (
    *((f"{LAYER}.attention.{name}_lin", f"blocks.{{}}.attention.{name}") for name in "qkv"),
    (f"{LAYER}.attention.out_lin", "blocks.{}.attention.o"),
    (f"{LAYER}.sa_layer_norm", "blocks.{}.attention_norm"),
    (f"{LAYER}.ffn.lin1", "blocks.{}.mlp.up"),
    (f"{LAYER}.ffn.lin2", "blocks.{}.mlp.down"),
    (f"{LAYER}.output_layer_norm", "blocks.{}.mlp_norm"),
)
OUTER_MODULES = (
    ("distilbert.embeddings.LayerNorm", "embedding_norm"),
    ("vocab_transform", "transform.dense"),
    ("vocab_layer_norm", "transform.norm"),
)

FAMILY = Family(
    model_types=("distilbert",),
    architecture="DistilBertForMaskedLM",
    config=EncoderConfig,
    fits=fits,
    write=write,
    read=read,
    outer_rows=(
        Row("distilbert.embeddings.word_embeddings.weight", ("embedding.weight",)),
        Row("distilbert.embeddings.position_embeddings.weight", ("position_embedding.weight",)),
        *stacked_rows(OUTER_MODULES, kinds=BOTH),
        Row("vocab_projector.weight", ("head.weight",)),
        Row("vocab_projector.bias", ("output_bias",)),
    ),
    stacks=(Stack("n_layers", stacked_rows(LAYER_MODULES, kinds=BOTH)),),
    copies={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    prefix="distilbert.",
    unprefixed=("vocab_",),
    ignored=(".position_ids",),
    heads=HEAD,
    left_aside=("pre_classifier.", *OTHER_HEADS),
)
