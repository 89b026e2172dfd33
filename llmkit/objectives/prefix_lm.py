"""Prefix language modelling: read the beginning of a text, write the rest (T5, Raffel et al. 2020, section 3.3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from llmkit.interfaces import Batch, Row, TokenIds
from llmkit.objectives.rows import Ids
from llmkit.objectives.shares import settle
from llmkit.objectives.source_target import Sides, SourceTarget, to_batch

LEAST_IDS = 2  # one to read and one to write


@dataclass(frozen=True)
class PrefixLM(SourceTarget):
    """Cuts every document at a random place: the encoder reads what is before, the decoder writes what follows.

    A row is two windows of text. The documents of the first are cut at a share drawn evenly from ``min_fraction`` to
    ``max_fraction``, those of the second at the share that mirrors it, so that every row has as long a source and as
    long a target as any other: nothing is padded. A document of one token is left out. Where the documents are so short
    that the rounding to whole tokens would lengthen the source, their shares give way.

    Decoder-only models are not trained with it: they would have to look at the prefix in both directions, which the
    published Llama and GPT-2 do not compute, so that an exported model would not be the one that was trained.
    """

    n_parts: ClassVar[int] = 2  # of a row, which cut documents

    min_fraction: float
    max_fraction: float

    def problems(self) -> list[tuple[str, str]]:
        found = []
        if not 0 <= self.min_fraction <= 1:
            found.append(("min_fraction", "must be in [0, 1]"))
        if not self.min_fraction <= self.max_fraction <= 1:
            found.append(("max_fraction", "must be in [min_fraction, 1]"))
        return found + super().problems()

    @property
    def mean_fraction(self) -> float:
        """The source's share of a row."""
        return (self.min_fraction + self.max_fraction) / 2

    def window(self, seq_len: int) -> tuple[int, int]:
        """Two windows, of ``seq_len`` or as much less as keeps both sides within ``seq_len``."""
        longer_share = max(self.mean_fraction, 1 - self.mean_fraction)
        return 2 * int(seq_len / (2 * longer_share) + 1e-9), 0

    def target_len(self, seq_len: int) -> int:
        n_ids = self.window(seq_len)[0]
        return n_ids - round(self.mean_fraction * n_ids)

    def too_short(self, n_ids_K: Ids, n_text_K: Ids) -> NDArray[np.bool_]:
        """Which pieces, of so many ids and so many ids of text, are left out."""
        return n_ids_K < LEAST_IDS

    def fate_of_short(self) -> str:
        return "are a single token, which cannot be cut in two: they are left out"

    def collate(self, rows: Sequence[Row], *, seq_len: int, ids: TokenIds) -> Batch:
        """Rows of two windows to one batch of two sides."""
        return to_batch([self._cut(row, ids.eos_id) for row in rows], ids)

    def _cut(self, row: Row, eos_id: int) -> Sides:
        """A document, or the part of it in one of the two windows, is a piece; the number of pieces is K."""
        row_T, rng = row.ids, row.rng()
        half = len(row_T) // 2
        ends = np.flatnonzero(row_T == eos_id) + 1
        edges = np.unique(np.concatenate([[0, half, len(row_T)], ends]))
        lengths = np.diff(edges)
        used = ~self.too_short(lengths, lengths)
        row_T = row_T[np.repeat(used, lengths)]
        first_K, lengths_K = edges[:-1][used] < half, lengths[used]
        fraction = rng.uniform(self.min_fraction, self.max_fraction)
        wanted_K = np.where(first_K, fraction, self.min_fraction + self.max_fraction - fraction) * lengths_K
        rounded_K = np.diff(np.floor(np.cumsum(wanted_K) + rng.random()), prepend=0).astype(np.int64)
        total = round(self.mean_fraction * len(row_T))
        prefix_K = settle(rounded_K, total, np.ones_like(lengths_K), lengths_K - 1)
        document_T = np.repeat(np.arange(len(lengths_K)), lengths_K)
        place_T = np.arange(len(row_T)) - (np.cumsum(lengths_K) - lengths_K)[document_T]
        read_T = place_T < prefix_K[document_T]
        return Sides(row_T[read_T], document_T[read_T], row_T[~read_T], document_T[~read_T])
