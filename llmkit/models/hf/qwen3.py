"""Qwen3: a Llama with an RMSNorm on every head of q and k, and no biases in its feed-forward layers."""

from __future__ import annotations

from typing import Any

from llmkit.models.config import DecoderConfig
from llmkit.models.hf import llama
from llmkit.models.hf.family import Family, Keys, Stack, stacked_rows


def fits(config: DecoderConfig) -> bool:
    return llama.is_llama_like(config) and config.qk_norm and not config.mlp_bias


def write(config: DecoderConfig) -> dict[str, Any]:
    keys = llama.write(config)
    del keys["mlp_bias"]
    return {**keys, "use_sliding_window": False}


def read(keys: Keys) -> DecoderConfig:
    keys.expect("use_sliding_window", False)
    return llama.read_llama_like(keys, qk_norm=True, mlp_bias=False)


HEAD_NORM_ROWS = stacked_rows(
    (
        ("model.layers.{}.self_attn.q_norm", "blocks.{}.attention.q_norm"),
        ("model.layers.{}.self_attn.k_norm", "blocks.{}.attention.k_norm"),
    )
)

FAMILY = Family(
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    config=DecoderConfig,
    fits=fits,
    write=write,
    read=read,
    outer_rows=llama.OUTER_ROWS,
    stacks=(Stack("n_layers", (*llama.NORM_ROWS, *llama.MATRIX_ROWS, *HEAD_NORM_ROWS)),),
    copies=llama.COPIES,
    prefix="model.",
    ignored=(".rotary_emb.inv_freq",),
)
