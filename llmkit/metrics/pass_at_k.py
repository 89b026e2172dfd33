"""How likely one of k programs passes its tests."""

from __future__ import annotations

from math import comb


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): unbiased, from ``n`` programs of which ``c`` passed (Chen et al. 2021, equation 1)."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {c} right among {n}")
    return 1 - comb(n - c, k) / comb(n, k)
