"""Rotary positions stretched beyond the length a model was trained for (settings in ``rope_scaling.py``).

With f_i = theta^(-2i/R) the frequency of pair i of R rotated dimensions, s the factor and L the trained length::

    linear   f_i / s                                     Chen et al. 2023, arXiv 2306.15595
    dynamic  theta (s n / L - s + 1)^(R / (R - 2))       as theta, n the length of the document where it is above L
    llama3   f_i / s for waves longer than L / low, f_i for those shorter than L / high, between them in between
    yarn     between f_i / s and f_i by the turns a wave makes over L; cosine and sine times an attention factor

Dubey et al. 2024 (llama3) and Peng et al. 2023, arXiv 2309.00071 (dynamic: appendix B; yarn: section 3).
Everything is fp32 and computed from the positions in every forward pass, like ``layers.rotation``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmkit.models.layers import Rotation, turned, wave_lengths
from llmkit.models.rope_scaling import YARN_BETAS

Scaling = Mapping[str, Any]


def scaled_rotation(
    position_ids_BT: Tensor, document_ids_BT: Tensor | None, width: int, theta: float, scaling: Scaling
) -> Rotation:
    """The angles of ``width`` dimensions a head under ``scaling``.

    The length that ``dynamic`` asks for is that of a token's own document, in this pass; with a cache, keys keep the
    angles they were stored with (so does ``transformers``).
    """
    kind = scaling["type"]
    if kind == "dynamic":
        lengths_BT = document_lengths(position_ids_BT, document_ids_BT)
        return turned(position_ids_BT, _dynamic(lengths_BT, width, theta, scaling))
    lengths_K = wave_lengths(width, theta, position_ids_BT.device)
    if kind == "linear":
        return turned(position_ids_BT, 1.0 / lengths_K / scaling["factor"])
    if kind == "llama3":
        return turned(position_ids_BT, _llama3(1.0 / lengths_K, scaling))
    cos, sin = turned(position_ids_BT, _yarn(lengths_K, width, theta, scaling))
    factor = attention_factor(scaling)
    return cos * factor, sin * factor


def document_lengths(position_ids_BT: Tensor, document_ids_BT: Tensor | None) -> Tensor:
    """BT: the position after the last one of each token's document; without documents a row is one."""
    if document_ids_BT is None:
        return (position_ids_BT.amax(1, keepdim=True) + 1).expand_as(position_ids_BT)
    T = position_ids_BT.shape[1]
    is_last_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    is_last_BT[:, :-1] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    ends_BT = torch.where(is_last_BT, torch.arange(T, device=document_ids_BT.device), T)
    ends_BT = ends_BT.flip(1).cummin(1).values.flip(1)  # the column of each token's last neighbour in its document
    return position_ids_BT.expand_as(document_ids_BT).gather(1, ends_BT) + 1


def attention_factor(scaling: Scaling) -> float:
    """What yarn multiplies cosine and sine with: 0.1 ln s + 1 unless the settings say otherwise."""
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])

    def of(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling["factor"]) + 1.0

    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return of(scaling["mscale"]) / of(scaling["mscale_all_dim"])
    return of(1.0)


def _dynamic(lengths_BT: Tensor, width: int, theta: float, scaling: Scaling) -> Tensor:
    """BT1K: a base of its own for every token."""
    factor, original = scaling["factor"], scaling["original_len"]
    stretch_BT = factor * lengths_BT.clamp(min=original) / original - (factor - 1)
    theta_BT11 = (theta * stretch_BT ** (width / (width - 2)))[:, :, None, None]
    frequencies_BT1K: Tensor = 1.0 / wave_lengths(width, theta_BT11, lengths_BT.device)
    return frequencies_BT1K


def _llama3(plain_K: Tensor, scaling: Scaling) -> Tensor:
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns_K = scaling["original_len"] / (2 * math.pi / plain_K)  # over the trained length
    share_K = ((turns_K - low) / (high - low)).clamp(0, 1)  # of the plain frequency
    frequencies_K: Tensor = (1 - share_K) * plain_K / scaling["factor"] + share_K * plain_K
    return frequencies_K


def _yarn(lengths_K: Tensor, width: int, theta: float, scaling: Scaling) -> Tensor:
    """Pairs below ``low`` turn often and keep their frequency; above ``high`` it is divided by the factor."""
    settings = {**YARN_BETAS, "truncate": True, **scaling}
    low, high = (
        width * math.log(settings["original_len"] / (settings[beta] * 2 * math.pi)) / (2 * math.log(theta))
        for beta in ("beta_fast", "beta_slow")
    )  # the pair that makes so many turns over the trained length
    if settings["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    pairs_K = torch.arange(width // 2, device=lengths_K.device, dtype=torch.float32)
    kept_K = 1 - ((pairs_K - low) / (high - low or 0.001)).clamp(0, 1)
    divided_K: Tensor = 1.0 / (settings["factor"] * lengths_K)
    return divided_K * (1 - kept_K) + 1.0 / lengths_K * kept_K
