"""Positions without a table in the checkpoint: T5's distance buckets, and sinusoids.

Both are looked up in tables made once per device on the CPU: a logarithm or a sine that another device rounds otherwise
would put a distance into another bucket.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

SINUSOID_BASE = 10000.0  # Vaswani et al. 2017, section 3.5


def distance_buckets(
    query_positions_BT: Tensor, key_positions_BS: Tensor, *, n_buckets: int, furthest: int, both_ways: bool
) -> Tensor:
    """BTS: the bucket of each key's distance from each query (Raffel et al. 2020, section 2.1).

    Looking ``both_ways``, half of the buckets are for keys after the query; otherwise all those share the bucket of
    distance 0. Half of a direction's buckets are for exact distances, the others grow in width up to ``furthest``.
    """
    distance_BTS = query_positions_BT[:, :, None] - key_positions_BS[:, None, :]
    per_way = n_buckets // 2 if both_ways else n_buckets
    table = _bucket_table(per_way, furthest, distance_BTS.device)
    if not both_ways:
        return table[distance_BTS.clamp(0, furthest)]
    return table[distance_BTS.abs().clamp(max=furthest)] + per_way * (distance_BTS < 0)


@cache
def _bucket_table(n_buckets: int, furthest: int, device: torch.device) -> Tensor:
    """The bucket of every distance ``0 .. furthest``: itself below ``exact``, then by its logarithm."""
    exact = n_buckets // 2
    with torch.inference_mode(False):
        distances = torch.arange(furthest + 1, device="cpu")
        growth = torch.log(distances.clamp(min=1).float() / exact) / math.log(furthest / exact)
        far = (exact + (growth * (n_buckets - exact)).long()).clamp(max=n_buckets - 1)
        return torch.where(distances < exact, distances, far).to(device)


@cache
def sinusoids(n_positions: int, width: int, device: torch.device) -> Tensor:
    """Sines of all wave lengths, then cosines: positions x width, fp32 (the halves as Marian has them)."""
    with torch.inference_mode(False):
        positions = torch.arange(n_positions, device="cpu", dtype=torch.float64)
        exponents = torch.arange(0, width, 2, device="cpu", dtype=torch.float64) / width
        angles = positions[:, None] * SINUSOID_BASE**-exponents
        return torch.cat((angles.sin(), angles.cos()[:, : width // 2]), dim=1).float().to(device)
