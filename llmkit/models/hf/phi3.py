"""Phi-3: a Llama whose files hold q, k and v in one tensor, gate and up in another; a part of each head may be rotated.

The rotary type ``longrope`` of the long versions is refused: it has a factor for every frequency.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmkit.models.config import DecoderConfig
from llmkit.models.hf import llama
from llmkit.models.hf.decoder_keys import is_plain, is_uniform, read_uniform_window, window_size
from llmkit.models.hf.family import Family, Keys, one_dropout
from llmkit.models.hf.rows import Row, Stack, stacked_rows

DROPOUTS = ("resid_pdrop", "embd_pdrop", "attention_dropout")


def fits(config: DecoderConfig) -> bool:
    plain = is_plain(config, "rotary_fraction", "attention_windows") and is_uniform(config)
    return plain and llama.is_llama_like(config) and llama.no_bias(config)


def write(config: DecoderConfig) -> dict[str, Any]:
    return {
        **llama.write_llama_like(config),
        "original_max_position_embeddings": config.max_seq_len,
        "partial_rotary_factor": config.rotary_fraction,
        "sliding_window": window_size(config),
        **dict.fromkeys(DROPOUTS, config.dropout),
    }


def read(keys: Keys) -> DecoderConfig:
    keys = keys.with_defaults(rms_norm_eps=1e-5)
    config = llama.read_llama_like(keys, default_len=4096, fraction=1.0)
    if config.rope_scaling is not None:
        raise keys.error("rope_scaling", f"is of type {config.rope_scaling['type']}, which a Phi-3 does not have")
    return replace(config, attention_windows=read_uniform_window(keys), dropout=one_dropout(keys, DROPOUTS, 0.0))


def _layer(theirs: str, *ours: str) -> Row:
    return Row(f"model.layers.{{}}.{theirs}.weight", tuple(f"blocks.{{}}.{part}.weight" for part in ours))


ROWS = (
    _layer("self_attn.qkv_proj", "attention.q", "attention.k", "attention.v"),
    _layer("mlp.gate_up_proj", "mlp.gate", "mlp.up"),
    *stacked_rows(
        (
            ("model.layers.{}.self_attn.o_proj", "blocks.{}.attention.o"),
            ("model.layers.{}.mlp.down_proj", "blocks.{}.mlp.down"),
        )
    ),
)

FAMILY = Family(
    model_types=("phi3",),
    architecture="Phi3ForCausalLM",
    config=DecoderConfig,
    fits=fits,
    write=write,
    read=read,
    outer_rows=llama.outer_rows(),
    stacks=(Stack("n_layers", (*llama.NORM_ROWS, *ROWS)),),
    copies=llama.COPIES,
    prefix="model.",
    ignored=llama.IGNORED,
)
