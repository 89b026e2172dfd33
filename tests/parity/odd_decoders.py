"""Random odd decoders of every family: sizes that nothing divides, every option the family has."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from llmkit.models.config import DecoderConfig
from tests.unit.models.tiny import gpt2, llama


def odd_gpt2(seed: int) -> DecoderConfig:
    draw = random.Random(seed)
    n_heads, biases = draw.choice([1, 2, 3, 5]), draw.random() < 0.7
    return gpt2(
        vocab_size=draw.randint(3, 131),
        max_seq_len=draw.randint(9, 37),
        d_model=n_heads * draw.randint(3, 9),
        n_heads=n_heads,
        n_layers=draw.randint(1, 3),
        d_ff=draw.choice([None, 7, 50]),
        activation=["gelu", "gelu_tanh", "relu", "silu"][seed % 4],
        norm_eps=draw.choice([1e-5, 1e-3]),
        norm_bias=biases,
        attention_bias=biases,
        attention_out_bias=draw.random() < 0.7,
        mlp_bias=draw.random() < 0.7,
        attention_scale_dim=draw.choice([None, None, 1]),
        scale_attention_by_layer=draw.random() < 0.5,
        tie_embeddings=draw.random() < 0.7,
    )


def odd_gpt_neox(seed: int) -> DecoderConfig:
    draw = random.Random(seed)
    n_heads, biases = draw.choice([1, 2, 3, 5]), draw.random() < 0.7
    return gpt2(
        vocab_size=draw.randint(3, 131),
        d_model=n_heads * draw.choice([16, 24]),
        n_heads=n_heads,
        n_layers=draw.randint(1, 3),
        d_ff=draw.choice([None, 7, 50]),
        activation=["gelu", "gelu_tanh", "relu", "silu"][seed % 4],
        norm_eps=draw.choice([1e-5, 1e-3]),
        position="rotary",
        rotary_fraction=draw.choice([0.25, 0.5, 0.75, 1.0]),
        parallel_residual=draw.random() < 0.7,
        attention_bias=biases,
        attention_out_bias=biases,
        tie_embeddings=draw.random() < 0.3,
        residual_init_scale=False,
        **odd_rotary(draw),
    )


def odd_rotary(draw: random.Random, *types: str) -> dict[str, Any]:
    """Theta, length and scaling; sequences reach beyond the length that the scaling says was trained."""
    kind = draw.choice(types or ("none", "none", "linear", "dynamic", "llama3", "yarn"))
    values = {"max_seq_len": draw.randint(9, 37), "rope_theta": draw.choice([100.0, 10000.0, 500000.0])}
    if kind == "none":
        return values
    original = draw.randint(5, 12)
    factor = draw.choice([2.0, 3.0])
    values["max_seq_len"] = int(original * factor)
    scaling: dict[str, Any] = {"type": kind, "factor": factor}
    if kind != "linear":
        scaling["original_len"] = original
    if kind == "llama3":
        scaling |= {"low_freq_factor": draw.choice([1.0, 0.5]), "high_freq_factor": draw.choice([4.0, 2.0])}
    if kind == "yarn":
        scaling |= draw.choice(
            [
                {},
                {"attention_factor": 0.8},
                {"mscale": 0.7, "mscale_all_dim": 1.3},
                {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False},
            ]
        )
    return {**values, "rope_scaling": scaling}


def odd_llama(seed: int, **changes: Any) -> DecoderConfig:
    draw = random.Random(seed)
    n_kv_heads, d_head = draw.choice([1, 2, 3]), 2 * draw.randint(2, 8)
    n_heads = n_kv_heads * draw.choice([1, 2, 3])
    biases = draw.random() < 0.5
    values = {
        "vocab_size": draw.randint(3, 131),
        "d_model": n_heads * draw.choice([d_head, 3, 5]),
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_head": d_head,
        "n_layers": draw.randint(1, 3),
        "d_ff": draw.choice([None, 7, 50]),
        "activation": ["swiglu", "geglu", "geglu_tanh", "reglu"][seed % 4],
        "norm_eps": draw.choice([1e-6, 1e-3]),
        "attention_bias": biases,
        "attention_out_bias": biases,
        "mlp_bias": draw.random() < 0.5,
        "tie_embeddings": draw.random() < 0.5,
        **odd_rotary(draw),
    }
    return llama(**{**values, **changes})


NO_BIAS = {"attention_bias": False, "attention_out_bias": False, "mlp_bias": False}


def odd_mistral(seed: int) -> DecoderConfig:
    return odd_llama(seed, **NO_BIAS, attention_windows=(random.Random(seed).randint(2, 8),))


def odd_windows(draw: random.Random) -> tuple[int | None, ...] | None:
    """A pattern, sometimes longer than the model is deep. A window of 1 is left out: with it, a cache of transformers
    keeps all tokens."""
    w = draw.randint(2, 8)
    return draw.choice([None, (w,), (None, w), (w, None), (w, w, None), (None, None, w)])


def repeated(config: DecoderConfig) -> DecoderConfig:
    """With the windows as a file of this depth gives them back."""
    windows = config.layer_windows
    n = next(n for n in range(1, len(windows) + 1) if all(w == windows[i % n] for i, w in enumerate(windows)))
    short = windows[:n] if any(windows) else None
    theta = config.local_rope_theta if short else None
    return DecoderConfig(**{**vars(config), "attention_windows": short, "local_rope_theta": theta})


def odd_qwen2(seed: int) -> DecoderConfig:
    biases = {**NO_BIAS, "attention_bias": True}
    return repeated(odd_llama(seed, **biases, attention_windows=odd_windows(random.Random(seed))))


def odd_qwen3(seed: int) -> DecoderConfig:
    windows = odd_windows(random.Random(seed))
    return repeated(odd_llama(seed, qk_norm="head", mlp_bias=False, attention_windows=windows))


def odd_olmo2(seed: int) -> DecoderConfig:
    return odd_llama(seed, norm_position="post", qk_norm="all", mlp_bias=False)


def odd_gemma2(seed: int, **changes: Any) -> DecoderConfig:
    draw = random.Random(seed)
    values = {
        "norm_position": "both",
        "scale_embedding": True,
        "mlp_bias": False,
        "activation": ["geglu_tanh", "geglu", "swiglu", "reglu"][seed % 4],
        "attention_windows": odd_windows(draw),
        "attention_scale_dim": draw.choice([None, 7, 40]),
        "attention_softcap": draw.choice([None, 0.7, 5.0, 50.0]),
        "logit_softcap": draw.choice([None, 2.0, 30.0]),
    }
    return repeated(odd_llama(seed, **{**values, **changes}))


def odd_gemma3(seed: int) -> DecoderConfig:
    theta = random.Random(seed).choice([50.0, 20000.0])
    return odd_gemma2(seed, qk_norm="head", attention_softcap=None, local_rope_theta=theta)


def odd_phi3(seed: int) -> DecoderConfig:
    draw = random.Random(seed)
    changes = {**NO_BIAS, "d_head": draw.choice([8, 16]), "rotary_fraction": draw.choice([0.25, 0.5, 0.75])}
    windows = draw.choice([None, (draw.randint(2, 8),)])
    return odd_llama(seed, **changes, attention_windows=windows, rope_scaling=None)


FAMILIES: dict[str, Callable[[int], DecoderConfig]] = {
    "gpt2": odd_gpt2,
    "gpt_neox": odd_gpt_neox,
    "llama": odd_llama,
    "mistral": odd_mistral,
    "qwen2": odd_qwen2,
    "qwen3": odd_qwen3,
    "olmo2": odd_olmo2,
    "gemma2": odd_gemma2,
    "gemma3_text": odd_gemma3,
    "phi3": odd_phi3,
}
