"""A tokenizer whose ids are bytes: every cut through a character is possible."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

BOS, EOS, PAD, FIRST = 0, 1, 2, 3


class ByteTokenizer:
    """Implements ``interfaces.Tokenizer``: id = byte + 3."""

    vocab_size = FIRST + 256
    bos_id: int | None = BOS
    eos_id = EOS
    pad_id = PAD
    fingerprint = "bytes"

    def encode(self, text: str) -> list[int]:
        return [FIRST + byte for byte in text.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - FIRST for i in ids if i >= FIRST).decode(errors="replace")

    def save(self, folder: Path) -> None:
        raise AssertionError("nothing to save")
