"""RoBERTa: BERT with one segment (rarely two), no pooler, and the exact GELU before the output matrix.

It counts positions from ``pad_token_id`` + 1. So many rows of its position table are of no use: the file has them
before ours, and ``max_position_embeddings`` counts them too. They depend on the pad id; the published models have 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llmkit.models.encoder_config import EncoderConfig
from llmkit.models.hf.bert import (
    BOTH,
    HEAD,
    OTHER_HEADS,
    UntiedBiasFamily,
    backbone_rows,
    block_rows,
    is_bert_like,
    one_activation,
    read_bert_like,
    untied_rows,
    write_bert_like,
)
from llmkit.models.hf.family import Family, Keys
from llmkit.models.hf.rows import Row, stacked_rows

PUBLISHED_PAD_ID = 1


def fits(config: EncoderConfig) -> bool:
    """Two segments are left to BERT where it computes the same."""
    simple = config.n_segments == 1 or not one_activation(config)
    return is_bert_like(config) and not config.pooler and simple and config.transform_function == "gelu"


def write(pad_id: int, config: EncoderConfig) -> dict[str, Any]:
    rows = config.max_seq_len + pad_id + 1
    return {**write_bert_like(config), "max_position_embeddings": rows, "pad_token_id": pad_id}


def read(pad_id: int, keys: Keys) -> EncoderConfig:
    max_seq_len = keys.integer("max_position_embeddings", 512) - pad_id - 1
    return read_bert_like(keys, max_seq_len, pooler=False, exact=True)


def family(pad_id: int | None) -> Family:
    """The family for a vocabulary whose pad id this is."""
    pad_id = PUBLISHED_PAD_ID if pad_id is None else pad_id
    positions = Row("roberta.embeddings.position_embeddings.weight", ("position_embedding.weight",), before=pad_id + 1)
    heads = (("lm_head.dense", "transform.dense"), ("lm_head.layer_norm", "transform.norm"))
    return UntiedBiasFamily(
        model_types=("roberta", "xlm-roberta", "camembert"),  # the others are the same with other vocabularies
        architecture="RobertaForMaskedLM",
        config=EncoderConfig,
        fits=fits,
        write=partial(write, pad_id),
        read=partial(read, pad_id),
        outer_rows=(
            *backbone_rows("roberta."),
            positions,
            *stacked_rows(heads, kinds=BOTH),
            *untied_rows("lm_head.bias", "lm_head.decoder"),
        ),
        stacks=(block_rows("roberta."),),
        copies={
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        },
        ties_absent=("lm_head.decoder.bias",),
        prefix="roberta.",
        ignored=(".position_ids",),
        heads=HEAD,
        left_aside=("pooler.", *OTHER_HEADS),
        for_padding=family,
    )


FAMILY = family(PUBLISHED_PAD_ID)
