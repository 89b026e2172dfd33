"""What a summed negative log-likelihood means in the units that people compare."""

from __future__ import annotations

import math


def bits_per_byte(nll_nats: float, n_bytes: int) -> float:
    """Total negative log-likelihood in bits over the UTF-8 bytes of the text: comparable between tokenizers."""
    return nll_nats / (math.log(2) * n_bytes)


def perplexity(nats_per_token: float) -> float:
    """``exp`` of the mean loss; infinite where that overflows."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf
