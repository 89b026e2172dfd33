"""ELECTRA: BERT with embeddings of a width of their own. The generator has the head of masked LM.

The published discriminators have the same encoder and another head: here they get a new one.
"""

from __future__ import annotations

from typing import Any

from llmkit.models.encoder_config import EncoderConfig
from llmkit.models.hf.bert import (
    BOTH,
    HEAD,
    OTHER_HEADS,
    backbone_rows,
    block_rows,
    is_post_norm,
    read_bert_like,
    write_bert_like,
)
from llmkit.models.hf.family import Family, Keys
from llmkit.models.hf.rows import Row, stacked_rows


def fits(config: EncoderConfig) -> bool:
    # the transform of transformers has the exact GELU whatever the blocks have
    plain = config.n_segments > 0 and not config.pooler and config.transform_function == "gelu"
    return is_post_norm(config) and plain and config.d_embedding is not None


def write(config: EncoderConfig) -> dict[str, Any]:
    return {**write_bert_like(config), "embedding_size": config.embedding_width}


def read(keys: Keys) -> EncoderConfig:
    max_seq_len, width = keys.integer("max_position_embeddings", 512), keys.integer("embedding_size", 128)
    return read_bert_like(keys, max_seq_len, pooler=False, d_embedding=width, exact=True)


MODULES = (
    ("electra.embeddings_project", "embedding_projection"),
    ("generator_predictions.dense", "transform.dense"),
    ("generator_predictions.LayerNorm", "transform.norm"),
)

FAMILY = Family(
    model_types=("electra",),
    architecture="ElectraForMaskedLM",
    config=EncoderConfig,
    fits=fits,
    write=write,
    read=read,
    outer_rows=(
        *backbone_rows("electra."),
        Row("electra.embeddings.position_embeddings.weight", ("position_embedding.weight",)),
        *stacked_rows(MODULES, kinds=BOTH),
        Row("generator_lm_head.weight", ("head.weight",)),
        Row("generator_lm_head.bias", ("output_bias",)),
    ),
    stacks=(block_rows("electra."),),
    copies={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    prefix="electra.",
    unprefixed=("generator_", "discriminator_"),
    ignored=(".position_ids",),
    heads=HEAD,
    left_aside=("discriminator_predictions.", "sequence_summary.", *OTHER_HEADS),
)
