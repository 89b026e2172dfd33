"""BERT: post-norm blocks, learned positions, segments; with the pooler for sentence pairs or without it.

``BertForPreTraining`` has the pooler, ``BertForMaskedLM`` has none; both have one ``model_type``, and ``architectures``
tells them apart. The file of the published model names the second and holds the pooler all the same: it is left aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkit.interfaces import ModelConfig
from llmkit.models.encoder_config import EncoderConfig
from llmkit.models.hf import activations
from llmkit.models.hf.family import Family, Keys, one_dropout
from llmkit.models.hf.rows import Row, Stack, stacked_rows

WITH_POOLER, WITHOUT_POOLER = "BertForPreTraining", "BertForMaskedLM"
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
BOTH = ("weight", "bias")
HEAD = ("transform.", "head.", "output_bias")  # of masked LM: our names, the same in all encoders
OTHER_HEADS = ("classifier.", "qa_outputs.")


def is_post_norm(config: EncoderConfig) -> bool:
    """What BERT, RoBERTa, DistilBERT and ELECTRA always have."""
    biases = (config.norm_bias, config.attention_bias, config.mlp_bias, config.transform_bias, config.head_bias)
    sums = config.norm_position == "post" and config.position == "learned"
    plain = not config.gated and config.global_every == 1 and not config.share_layers
    return sums and plain and all(biases)


def is_bert_like(config: EncoderConfig) -> bool:
    """What BERT and RoBERTa always have."""
    return is_post_norm(config) and config.n_segments > 0 and config.d_embedding is None


def one_activation(config: EncoderConfig) -> bool:
    """Whether the transform before the output matrix has that of the blocks, as in BERT and DistilBERT."""
    return config.transform_function == config.activation


def fits(config: EncoderConfig) -> bool:
    return is_bert_like(config) and one_activation(config)


def post_norm(**sizes: Any) -> EncoderConfig:
    """A config for which ``is_post_norm`` holds; ``sizes`` are the fields that it leaves open."""
    return EncoderConfig(
        norm_position="post",
        norm_bias=True,
        position="learned",
        rope_theta=None,
        local_rope_theta=None,
        global_every=1,
        local_window=None,
        attention_bias=True,
        mlp_bias=True,
        transform_bias=True,
        head_bias=True,
        share_layers=False,
        residual_init_scale=False,
        **sizes,
    )


def write(config: EncoderConfig) -> dict[str, Any]:
    architecture = WITH_POOLER if config.pooler else WITHOUT_POOLER
    return {"architectures": [architecture], **write_bert_like(config)}


def write_bert_like(config: EncoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_rows,
        "max_position_embeddings": config.max_seq_len,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.ff_width,
        "hidden_act": activations.PLAIN_NAMES[config.activation],
        "layer_norm_eps": config.norm_eps,
        "type_vocab_size": config.n_segments,
        "position_embedding_type": "absolute",
        **dict.fromkeys(DROPOUTS, config.dropout),
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
    }


def read(keys: Keys) -> EncoderConfig:
    architecture = keys.raw.get("architectures") or [WITHOUT_POOLER]
    max_seq_len = keys.integer("max_position_embeddings", 512)
    return read_bert_like(keys, max_seq_len, pooler=WITH_POOLER in architecture)


def read_bert_like(
    keys: Keys, max_seq_len: int, *, pooler: bool, d_embedding: int | None = None, exact: bool = False
) -> EncoderConfig:
    """``exact``: the transform has the exact GELU whatever the blocks have."""
    keys.expect("position_embedding_type", "absolute")
    keys.expect("is_decoder", False)
    keys.expect("add_cross_attention", False)
    activation = keys.choice("hidden_act", "gelu", activations.PLAIN)
    return post_norm(
        vocab_size=keys.integer("vocab_size"),
        max_seq_len=max_seq_len,
        d_model=keys.integer("hidden_size"),
        d_embedding=d_embedding,
        n_layers=keys.integer("num_hidden_layers"),
        n_heads=keys.integer("num_attention_heads"),
        d_ff=keys.integer("intermediate_size"),
        norm_eps=keys.number("layer_norm_eps", 1e-12),
        activation=activation,
        transform_activation="gelu" if exact and activation != "gelu" else None,
        n_segments=keys.integer("type_vocab_size", 2),
        pooler=pooler,
        dropout=one_dropout(keys, DROPOUTS, 0.1),
        tie_embeddings=keys.flag("tie_word_embeddings", True),
        init_std=keys.number("initializer_range", 0.02),
    )


def backbone_rows(prefix: str) -> tuple[Row, ...]:
    """The embeddings but for the positions."""
    return (
        Row(f"{prefix}embeddings.word_embeddings.weight", ("embedding.weight",)),
        Row(f"{prefix}embeddings.token_type_embeddings.weight", ("segment_embedding.weight",)),
        *stacked_rows(((f"{prefix}embeddings.LayerNorm", "embedding_norm"),), kinds=BOTH),
    )


def block_rows(prefix: str) -> Stack:
    layer = f"{prefix}encoder.layer.{{}}"
    pairs = (
        *((f"{layer}.attention.self.{name}", f"blocks.{{}}.attention.{name[0]}") for name in ("query", "key", "value")),
        (f"{layer}.attention.output.dense", "blocks.{}.attention.o"),
        (f"{layer}.attention.output.LayerNorm", "blocks.{}.attention_norm"),
        (f"{layer}.intermediate.dense", "blocks.{}.mlp.up"),
        (f"{layer}.output.dense", "blocks.{}.mlp.down"),
        (f"{layer}.output.LayerNorm", "blocks.{}.mlp_norm"),
    )
    return Stack("n_layers", stacked_rows(pairs, kinds=BOTH))


HEADS = (
    ("cls.predictions.transform.dense", "transform.dense"),
    ("cls.predictions.transform.LayerNorm", "transform.norm"),
    ("bert.pooler.dense", "pooler"),
    ("cls.seq_relationship", "pair_head"),
)


class UntiedBiasFamily(Family):
    """Of BERT and RoBERTa, whose files have the bias of the logits twice; with a head of its own both are written.

    transformers 5 then reads the one in ``decoder``, and before version 5 it wrote the other one alone.
    """

    def rows(self, config: ModelConfig, present: Sequence[str]) -> list[Row]:
        rows = super().rows(config, present)
        return rows if "head.weight" in present else [row for row in rows if not row.name.endswith("decoder.bias")]


def untied_rows(bias: str, decoder: str) -> tuple[Row, ...]:
    """The output matrix, which is there only when it is not the embedding, and the bias under both of its names."""
    return (
        Row(f"{decoder}.weight", ("head.weight",)),
        Row(bias, ("output_bias",)),
        Row(f"{decoder}.bias", ("output_bias",)),  # after the other one, over which it wins
    )


FAMILY = UntiedBiasFamily(
    model_types=("bert",),
    architecture=WITH_POOLER,
    config=EncoderConfig,
    fits=fits,
    write=write,
    read=read,
    outer_rows=(
        *backbone_rows("bert."),
        Row("bert.embeddings.position_embeddings.weight", ("position_embedding.weight",)),
        *stacked_rows(HEADS, kinds=BOTH),
        *untied_rows("cls.predictions.bias", "cls.predictions.decoder"),
    ),
    stacks=(block_rows("bert."),),
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    ties_absent=("cls.predictions.decoder.bias",),
    prefix="bert.",
    unprefixed=("cls.",),
    ignored=(
        ".position_ids",
        *(f"{name}.{kind}" for name in ("pooler.dense", "cls.seq_relationship") for kind in BOTH),
    ),
    heads=HEAD,
    left_aside=OTHER_HEADS,
    old_endings={".gamma": ".weight", ".beta": ".bias"},
)
