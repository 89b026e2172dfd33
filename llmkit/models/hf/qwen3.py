"""Qwen3: a Llama with an RMSNorm on every head of q and k, and no biases in its feed-forward layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmkit.models.config import DecoderConfig
from llmkit.models.hf import llama, qwen2
from llmkit.models.hf.decoder_keys import has_one_window, is_plain
from llmkit.models.hf.family import Family, Keys
from llmkit.models.hf.rows import Stack

DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128}


def fits(config: DecoderConfig) -> bool:
    plain = is_plain(config, "rope_scaling", "attention_windows", qk_norm="head") and has_one_window(config)
    return plain and llama.is_llama_like(config) and llama.one_bias(config)


def write(config: DecoderConfig) -> dict[str, Any]:
    return {
        **llama.write_llama_like(config),
        **qwen2.write_windows(config),
        "attention_bias": config.attention_bias,
    }


def read(keys: Keys) -> DecoderConfig:
    keys = keys.with_defaults(**DEFAULTS)
    config = llama.read_llama_like(keys, default_len=32768)
    windows = qwen2.read_late_windows(keys, config.n_layers)
    return replace(config, qk_norm="head", attention_windows=windows, **llama.attention_biases(keys))


FAMILY = Family(
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    config=DecoderConfig,
    fits=fits,
    write=write,
    read=read,
    outer_rows=llama.outer_rows(),
    stacks=(Stack("n_layers", (*llama.NORM_ROWS, *llama.MATRIX_ROWS, *llama.qk_norm_rows())),),
    copies=llama.COPIES,
    prefix="model.",
    ignored=llama.IGNORED,
)
