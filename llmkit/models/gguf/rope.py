"""Rotary settings in GGUF: metadata for a linear or YaRN scaling, a tensor of divisors for Llama 3's.

Both ways as in ``config.json``. llama.cpp keeps of Llama 3's settings (Dubey et al. 2024) only what every frequency is
divided by, ``rope_freqs.weight``; they are found again from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from llmkit.errors import CheckpointError
from llmkit.gguf_file import GGUFFile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DIVISORS = "rope_freqs.weight"
_OLD_LINEAR = "rope.scale_linear"  # of the first files
_LENGTH = "original_context_length"
_SETTINGS = {  # in GGUF after rope.scaling.
    "factor": "factor",
    _LENGTH: "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_TYPES = {"none": (), "linear": ("factor",), "yarn": tuple(_SETTINGS)}
KEYS = ("rope.scaling.type", "rope.scaling.finetuned", _OLD_LINEAR, *(f"rope.scaling.{key}" for key in _SETTINGS))
_Settings = tuple[int, float, float]
_PUBLISHED: _Settings = (8192, 1.0, 4.0)  # Llama 3.1 to 3.3: the trained length, low_freq_factor, high_freq_factor
_ROUNDING = 1e-5  # of shares that were kept as fp32 divisors


def read(file: GGUFFile, architecture: str, divisors: NDArray[np.float32] | None) -> dict[str, Any]:
    """The scaling as ``rope_parameters`` of ``config.json``. Raises ``CheckpointError`` for another computation."""
    get = {key.removeprefix(f"{architecture}."): value for key, value in file.metadata.items()}
    if divisors is not None:
        return _read_llama3(divisors, float(get.get("rope.freq_base", 10000.0)), f"{file.path}:{DIVISORS}")
    if _OLD_LINEAR in get:
        return {"rope_type": "linear", "factor": get[_OLD_LINEAR]}
    kind = get.get("rope.scaling.type", "none")
    if kind not in _TYPES:
        key = f"{architecture}.rope.scaling.type"
        raise file.error(key, f"is {kind!r}; llmkit computes {', '.join(_TYPES)}")
    settings = {_SETTINGS[key]: get[f"rope.scaling.{key}"] for key in _TYPES[kind] if f"rope.scaling.{key}" in get}
    return {"rope_type": kind, **settings} if kind != "none" else {"rope_type": "default"}


def write(config: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a ``config.json``'s scaling; what GGUF cannot say is left out."""
    scaling = config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", "default")
    if not _TYPES.get(kind):
        return {}
    settings = {theirs: scaling.get(ours) for theirs, ours in _SETTINGS.items() if theirs in _TYPES[kind]}
    found = {
        f"rope.scaling.{key}": value if key == _LENGTH else float(value)
        for key, value in settings.items()
        if value is not None
    }
    return {"rope.scaling.type": kind, **found}


def divisors(config: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """``rope_freqs.weight`` (K/2) of a ``config.json`` with Llama 3's scaling; None for others."""
    import numpy

    scaling = config.get("rope_parameters") or {}
    if scaling.get("rope_type") != "llama3":
        return None
    names = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    waves = _wavelengths(width // 2, scaling["rope_theta"])
    return numpy.array(_llama3(waves, scaling["factor"], [scaling[name] for name in names]), numpy.float32)


def divide_alike(config: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two ``config.json`` with Llama 3's scaling divide all frequencies alike: other settings may do so too."""
    import numpy

    found = [divisors(config), divisors(other)]
    if found[0] is None and found[1] is None:
        return False
    a, b = (numpy.ones(1, numpy.float32) if values is None else values for values in found)
    return numpy.allclose(a, b, rtol=1e-5)


def _wavelengths(n: int, theta: float) -> list[float]:
    return [2 * math.pi * theta ** (i / n) for i in range(n)]


def _llama3(waves: Sequence[float], factor: float, settings: Sequence[float]) -> list[float]:
    """Divisors: 1 for short waves, ``factor`` for long ones, and between them as the inverse is interpolated."""
    length, low, high = settings
    shares = [min(max((length / wave - low) / (high - low), 0.0), 1.0) for wave in waves]
    return [1 / ((1 - share) / factor + share) for share in shares]


def _read_llama3(found: NDArray[np.float32], theta: float, where: str) -> dict[str, Any]:
    import numpy

    factor = float(found.max(initial=1.0))
    if factor <= 1:
        return {"rope_type": "default"}
    waves = _wavelengths(len(found), theta)
    candidates = (_PUBLISHED, *_fitted(waves, found, factor))
    for tolerance, settings in product((1e-6, 1e-5), candidates):  # the nearest first
        if numpy.allclose(found, _llama3(waves, factor, settings), rtol=tolerance):
            length, low, high = settings
            named = {"original_max_position_embeddings": length, "low_freq_factor": low, "high_freq_factor": high}
            return {"rope_type": "llama3", "factor": round(factor, 6), **named}
    raise CheckpointError("the divisors of the rotary frequencies are not those of Llama 3", where=where)


def _fitted(waves: Sequence[float], found: NDArray[np.float32], factor: float) -> list[_Settings]:
    """Settings with a ``low_freq_factor`` of 1, or near it, which decide as much as any: shares are a line in 1 / wave.

    First in round numbers, then as exact as the divisors are.
    """
    slope, shift = _line(waves, found, factor)
    if not (slope > 0 > shift):
        return []
    length = max(round(slope / -shift), 1)
    low = -shift / slope * length
    return [(length, 1.0, round(1 - 1 / shift, 3)), (length, low, low + length / slope)]


def _line(waves: Sequence[float], found: NDArray[np.float32], factor: float) -> tuple[float, float]:
    """Slope and shift. Small heads have few waves between the long ones, share 0, and the short ones, share 1: with
    fewer than two of them several lines give the same shares, and this is the flattest."""
    import numpy

    rates = 1 / numpy.array(waves)
    shares = (1 / found.astype(numpy.float64) - 1 / factor) / (1 - 1 / factor)
    is_long, is_short = shares <= _ROUNDING, shares >= 1 - _ROUNDING
    between = ~is_long & ~is_short
    if between.sum() >= 2:
        slope, shift = numpy.polyfit(rates[between], shares[between], 1)
        return float(slope), float(shift)
    last = float(rates[is_long].max())  # there is one: the factor is the largest divisor
    first = float(rates[is_short].min(initial=2 * float(rates.max())))
    if not between.any():
        return 1 / (first - last), -last / (first - last)
    rate, share = float(rates[between][0]), float(shares[between][0])
    slope = max(share / (rate - last), (1 - share) / (first - rate))
    return slope, share - slope * rate
