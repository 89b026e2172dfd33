"""Gemma 3 (text): a Gemma 2 with norms on q and k; layers with a window have a rotary theta of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmkit.models.config import DecoderConfig
from llmkit.models.hf import gemma2, llama
from llmkit.models.hf.decoder_keys import FULL, WINDOW, is_plain, write_scaling
from llmkit.models.hf.family import Family, Keys
from llmkit.models.hf.rows import Stack

DEFAULTS = {**gemma2.DEFAULTS, "sliding_window_pattern": 6}
THETA, LOCAL_THETA = 1e6, 1e4  # where a file names none


def fits(config: DecoderConfig) -> bool:
    free = ("rope_scaling", "attention_windows", "attention_scale_dim", "logit_softcap", "local_rope_theta")
    plain = is_plain(config, *free, norm_position="both", scale_embedding=True, qk_norm="head")
    local = config.rope_scaling is None or config.local_rope_theta is not None or not any(config.layer_windows)
    return plain and local and gemma2.is_gemma_like(config)


def write(config: DecoderConfig) -> dict[str, Any]:
    """``sliding_window_pattern`` is the old way: every so many layers, one sees everything."""
    keys, theta = gemma2.write_gemma_like(config), {"rope_theta": config.rope_theta}
    local_theta = config.local_rope_theta or config.rope_theta
    keys["rope_parameters"] = {
        FULL: {**write_scaling(config), **theta},
        WINDOW: {"rope_type": "default", "rope_theta": local_theta},
    }
    pattern = config.attention_windows or ()
    if pattern[-1:] == (None,) and all(pattern[:-1]):
        keys["sliding_window_pattern"] = len(pattern)
    return {**keys, "rope_local_base_freq": local_theta}


def read(keys: Keys) -> DecoderConfig:
    keys = keys.with_defaults(**DEFAULTS)
    keys.expect("attn_logit_softcapping", None)
    flat, local_theta = _flat_rotary(keys)
    config = llama.read_llama_like(flat, gemma2.ACTIVATION, default_len=131072)
    every = max(keys.integer("sliding_window_pattern"), 1)
    types = [WINDOW if (layer + 1) % every else FULL for layer in range(config.n_layers)]
    config = gemma2.gemma_like(config, keys, types)
    alike = local_theta == config.rope_theta and config.rope_scaling is None
    return replace(
        config, qk_norm="head", local_rope_theta=local_theta if config.attention_windows and not alike else None
    )


def _flat_rotary(keys: Keys) -> tuple[Keys, float]:
    """The keys with the rotary object of the layers without a window as the only one, and the theta of the others."""
    both = keys.inner("rope_parameters")
    if both.raw and not both.raw.keys() & {FULL, WINDOW}:
        raise keys.error("rope_parameters", f"must hold an object for {FULL} and one for {WINDOW}")
    local = both.inner(WINDOW)
    for name in ("rope_type", "type"):
        local.expect(name, "default")
    keys = keys.with_defaults(rope_theta=THETA, rope_local_base_freq=LOCAL_THETA)
    full = {**both.inner(FULL).raw, **keys.inner("rope_scaling").raw}
    flat = Keys({**keys.raw, "rope_parameters": full, "rope_scaling": None}, keys.where)
    return flat, local.number("rope_theta", keys.number("rope_local_base_freq"))


FAMILY = Family(
    model_types=("gemma3_text",),
    architecture="Gemma3ForCausalLM",
    config=DecoderConfig,
    fits=fits,
    write=write,
    read=read,
    outer_rows=llama.outer_rows(gemma2.OFFSET),
    stacks=(Stack("n_layers", (*gemma2.NORM_ROWS, *llama.MATRIX_ROWS, *llama.qk_norm_rows(gemma2.OFFSET))),),
    copies=llama.COPIES,
    prefix="model.",
    ignored=llama.IGNORED,
)
