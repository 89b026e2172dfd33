"""Mistral: a Llama without biases whose layers may all have a window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmkit.models.config import DecoderConfig
from llmkit.models.hf import llama
from llmkit.models.hf.decoder_keys import is_plain, is_uniform, read_uniform_window, window_size
from llmkit.models.hf.family import Family, Keys
from llmkit.models.hf.rows import Stack

DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}  # of transformers, where a file leaves them out


def fits(config: DecoderConfig) -> bool:
    plain = is_plain(config, "rope_scaling", "attention_windows") and is_uniform(config)
    return plain and llama.is_llama_like(config) and llama.no_bias(config)


def write(config: DecoderConfig) -> dict[str, Any]:
    return {**llama.write_llama_like(config), "sliding_window": window_size(config)}


def read(keys: Keys) -> DecoderConfig:
    keys = keys.with_defaults(**DEFAULTS)
    return replace(llama.read_llama_like(keys, default_len=131072), attention_windows=read_uniform_window(keys))


FAMILY = Family(
    model_types=("mistral",),
    architecture="MistralForCausalLM",
    config=DecoderConfig,
    fits=fits,
    write=write,
    read=read,
    outer_rows=llama.outer_rows(),
    stacks=(Stack("n_layers", (*llama.NORM_ROWS, *llama.MATRIX_ROWS)),),
    copies=llama.COPIES,
    prefix="model.",
    ignored=llama.IGNORED,
)
