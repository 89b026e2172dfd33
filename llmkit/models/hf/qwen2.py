"""Qwen2 and 2.5: a Llama with biases on queries, keys and values alone; some layers may have a window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmkit.models.config import DecoderConfig
from llmkit.models.hf import llama
from llmkit.models.hf.decoder_keys import FULL, WINDOW, has_one_window, is_plain, layer_types, read_windows, window_size
from llmkit.models.hf.family import Family, Keys
from llmkit.models.hf.rows import Stack

DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}  # of transformers


def fits(config: DecoderConfig) -> bool:
    plain = is_plain(config, "rope_scaling", "attention_windows") and has_one_window(config)
    biases = config.attention_bias and not config.attention_out_bias and not config.mlp_bias
    return plain and biases and llama.is_llama_like(config)


def write(config: DecoderConfig) -> dict[str, Any]:
    return {**llama.write_llama_like(config), **write_windows(config)}


def write_windows(config: DecoderConfig) -> dict[str, Any]:
    """``max_window_layers`` is the old way: the number of layers at the start that see everything."""
    types = layer_types(config)
    return {
        "use_sliding_window": WINDOW in types,
        "sliding_window": window_size(config),
        "max_window_layers": types.index(WINDOW) if WINDOW in types else len(types),
        "layer_types": types,
    }


def read(keys: Keys) -> DecoderConfig:
    keys = keys.with_defaults(**DEFAULTS)
    config = llama.read_llama_like(keys, default_len=32768)
    return replace(config, attention_windows=read_late_windows(keys, config.n_layers), attention_bias=True)


def read_late_windows(keys: Keys, n_layers: int) -> tuple[int | None, ...] | None:
    """Without ``layer_types`` the layers from ``max_window_layers`` on have the window, if ``use_sliding_window``."""
    if not keys.flag("use_sliding_window", False):
        keys = Keys({**keys.raw, "sliding_window": None}, keys.where)  # as transformers takes it
    full = keys.integer("max_window_layers") if keys.raw["sliding_window"] is not None else n_layers
    return read_windows(keys, [FULL if layer < full else WINDOW for layer in range(n_layers)])


FAMILY = Family(
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
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
