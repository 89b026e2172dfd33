"""How much texts repeat themselves and one another."""

from __future__ import annotations

from collections.abc import Sequence


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams of all ``texts``, 0 .. 1 (Li et al. 2016); 0 where there is none."""
    ngrams = [gram for text in texts for gram in zip(*(text.split()[i:] for i in range(n)), strict=False)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0
