"""Vocabularies made up for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmkit.interfaces import TokenIds


def token_ids(
    vocab_size: int = 64, *, bos_id: int | None = None, eos_id: int = 1, pad_id: int = 0, **roles: Any
) -> TokenIds:
    """Ids whose roles are special; every other id begins a word unless ``word_starts`` says otherwise."""
    mask_id, sentinels = roles.get("mask_id"), tuple(roles.get("sentinel_ids", ()))
    infill = roles.get("infill_ids")
    special = np.zeros(vocab_size, bool)
    special[[i for i in (bos_id, eos_id, pad_id, mask_id, *sentinels, *(infill or ())) if i is not None]] = True
    starts = roles.get("word_starts", np.ones(vocab_size, bool))
    return TokenIds(vocab_size, bos_id, eos_id, pad_id, mask_id, sentinels, infill, special, starts)
