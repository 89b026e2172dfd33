"""Span corruption: restore what was taken out of a text (T5, Raffel et al. 2020, sections 3.1.4 and 3.3.4).

A document ``a b c d e f . eos`` with the spans ``b c`` and ``e`` taken out becomes ::

    source   a <extra_id_0> d <extra_id_1> f . eos
    target   <extra_id_0> b c <extra_id_1> e eos
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import ConfigError
from llmkit.interfaces import Batch, Roles, Row, TokenIds
from llmkit.objectives.rows import Ids
from llmkit.objectives.shares import choose, settle, shares
from llmkit.objectives.source_target import Sides, SourceTarget, documents_of, to_batch

MOST_EXTRA = 1.1  # times the density: how far documents make up for others that are too short to be corrupted


class Spans(NamedTuple):
    """Runs of noise in a row, in order: first index and number of ids of each."""

    starts: Ids
    lengths: Ids


@dataclass(frozen=True)
class SpanCorruption(SourceTarget):
    """Takes ``noise_density`` of a row's tokens out, in spans of ``mean_span_length`` on average.

    The numbers of noise tokens and spans are those of the authors' program, but for a random rounding of the first,
    which makes the density exact on average. They are shared among the documents of the row in proportion to their
    text; within a document every mask with its numbers of noise tokens and spans is equally likely. (The authors'
    program always ends a sequence with noise and never begins it so, which short documents would suffer from.)

    The density counts all tokens. Begin and end tokens are never noise, so of the text proper slightly more is taken
    out. A text of no more than ``mean_span_length`` tokens stays whole; its share falls on the others of the row, up to
    a tenth of theirs. A document without noise has no target.
    """

    n_parts: ClassVar[int] = 1  # of a row, which cut documents

    noise_density: float
    mean_span_length: float

    def problems(self) -> list[tuple[str, str]]:
        found = []
        if not 0 < self.noise_density < 1:
            found.append(("noise_density", "must be above 0 and below 1"))
        if not self.mean_span_length >= 1:
            found.append(("mean_span_length", "must be at least 1"))
        elif 0 < self.noise_density < 1 and self.noise_density * (1 + 1 / self.mean_span_length) > 1:
            most = self.mean_span_length / (1 + self.mean_span_length)
            found.append(("noise_density", f"must be at most {most:.3g}, or no token is left between the spans"))
        return found + super().problems()

    def window(self, seq_len: int) -> tuple[int, int]:
        """As many ids as give a source of at most ``seq_len``, spans being replaced by one id each."""
        share_left = 1 - self.noise_density + self.noise_density / self.mean_span_length
        n_ids = int((seq_len + 2) / share_left) + 1
        while self._source_len(n_ids) > seq_len:
            n_ids -= 1
        return n_ids, 0

    def target_len(self, seq_len: int) -> int:
        """Of a row that is one document; each further document adds its end."""
        n_noise = self._most_noise(seq_len)
        return n_noise + self._n_spans(n_noise) + 1

    def n_sentinels(self, seq_len: int) -> int:
        """Sentinels that a vocabulary must have: a row can be one document with all the spans."""
        return self._n_spans(self._most_noise(seq_len))

    def lacks(self, ids: Roles, seq_len: int) -> tuple[str, str] | None:
        needed, found = self.n_sentinels(seq_len), len(ids.sentinel_ids)
        if found >= needed:
            return None
        what = f"span corruption of {seq_len} tokens needs {needed} sentinels, the vocabulary has {found}"
        return what, f"tokenizer.n_sentinels={needed}, or raise objective.mean_span_length"

    def too_short(self, n_ids_K: Ids, n_text_K: Ids) -> NDArray[np.bool_]:
        """Which pieces, of so many ids and so many ids of text, never have a target."""
        return (n_text_K > 0) & (n_text_K < self.mean_span_length + 1)

    def fate_of_short(self) -> str:
        most = math.ceil(self.mean_span_length + 1) - 1
        return f"have no more than {most} token(s) of text: they are read whole and have no target"

    def collate(self, rows: Sequence[Row], *, seq_len: int, ids: TokenIds) -> Batch:
        """Windows of running text to one batch of two sides. Raises ``ConfigError`` for too few sentinels.

        Where a tenth of a row or more is documents too short to be corrupted, its source is wider than ``seq_len``; no
        document is.
        """
        if problem := self.lacks(ids, seq_len):
            what, fix = problem
            raise ConfigError(what, where="tokenizer.n_sentinels", fix=fix)
        return to_batch([self._corrupt(row, ids) for row in rows], ids)

    def _most_noise(self, seq_len: int) -> int:
        return math.ceil(self.noise_density * self.window(seq_len)[0])

    def _n_spans(self, n_noise: int) -> int:
        return max(round(n_noise / self.mean_span_length), 1) if n_noise else 0

    def _source_len(self, n_ids: int) -> int:
        """The longest source of ``n_ids``, whichever way the noise is rounded."""
        noise = self.noise_density * n_ids
        return max(n_ids - n + self._n_spans(n) for n in (math.floor(noise), math.ceil(noise)))

    def _corrupt(self, row: Row, ids: TokenIds) -> Sides:
        documents_T = documents_of(row.ids, ids.eos_id)
        spans = self._draw(~ids.special[row.ids], documents_T, row.rng())
        return take_out(row.ids, documents_T, spans, ids)

    def _draw(self, is_text_T: NDArray[np.bool_], documents_T: Ids, rng: np.random.Generator) -> Spans:
        """Spans of a row. Its stretches, K in number, are the runs of text that are long enough to be corrupted."""
        text, sizes_K = stretches(is_text_T, self.mean_span_length + 1)
        if not len(text):
            return Spans(text, text)
        has_text = np.zeros(len(documents_T), bool)  # by document
        has_text[documents_T[text]] = True
        in_reach = int(has_text[documents_T].sum())
        n_noise = math.floor(self.noise_density * min(len(documents_T), MOST_EXTRA * in_reach) + rng.random())
        spans_K, noise_K = self._numbers(sizes_K, n_noise, rng)
        starts, lengths = place_spans(sizes_K, noise_K, spans_K, rng)
        return Spans(text[starts], lengths)

    def _numbers(self, sizes_K: Ids, n_noise: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
        """Spans and noise tokens of each stretch; at least one token is kept for every span."""
        n_spans = self._n_spans(n_noise)
        most_K = (sizes_K / (self.mean_span_length + 1)).astype(np.int64)
        spans_K = settle(shares(n_spans, sizes_K, rng.integers(sizes_K.sum())), n_spans, np.zeros_like(sizes_K), most_K)
        if not spans_K.any():
            return spans_K, spans_K
        wanted_K = shares(n_noise, spans_K, rng.integers(spans_K.sum()))
        return spans_K, settle(wanted_K, n_noise, spans_K, np.where(spans_K > 0, sizes_K - spans_K, 0))


def stretches(is_text_T: NDArray[np.bool_], shortest: float) -> tuple[Ids, Ids]:
    """Places of the text in a row, and the sizes of its runs; runs below ``shortest`` are left out of both."""
    text = np.flatnonzero(is_text_T)
    run = np.cumsum(np.diff(text, prepend=-2) > 1) - 1
    sizes = np.bincount(run)
    return text[(sizes >= shortest)[run]], sizes[sizes >= shortest]


def place_spans(sizes_K: Ids, noise_K: Ids, spans_K: Ids, rng: np.random.Generator) -> tuple[Ids, Ids]:
    """Starts and lengths of spans in K stretches laid end to end, every arrangement of a stretch equally likely.

    A stretch that keeps r tokens has r + 1 slots for its spans, no two in one, so that no spans touch; its noise of n
    tokens is divided into spans at some of n - 1 places.
    """
    slots, stretch = choose(sizes_K - noise_K + 1, spans_K, rng)
    kept_before = slots - stretch  # each earlier stretch has one slot more than tokens kept
    inner_K, divided_K = np.maximum(noise_K - 1, 0), np.maximum(spans_K - 1, 0)
    cuts, stretch = choose(inner_K, divided_K, rng)
    noise_before_K = np.cumsum(noise_K) - noise_K
    inner_before_K = np.cumsum(inner_K) - inner_K
    inner_starts = noise_before_K[stretch] + cuts - inner_before_K[stretch] + 1
    noise_before = np.sort(np.concatenate([noise_before_K[spans_K > 0], inner_starts]))
    return kept_before + noise_before, np.diff(noise_before, append=noise_K.sum())


def take_out(row_T: Ids, documents_T: Ids, spans: Spans, ids: TokenIds) -> Sides:
    """Both sides of a row: sentinels count from 0 in each document, and each target ends with the end of text."""
    starts, lengths = spans
    stops = np.cumsum(lengths)  # in the noise laid end to end
    noise = np.repeat(starts - (stops - lengths), lengths) + np.arange(lengths.sum())
    span_documents = documents_T[starts]
    rank = np.arange(len(starts)) - np.searchsorted(span_documents, span_documents)
    sentinels = np.array(ids.sentinel_ids, dtype=np.int64)[rank]
    source, kept = row_T.copy(), np.ones(len(row_T), bool)
    source[starts] = sentinels
    kept[noise], kept[starts] = False, True
    last = np.flatnonzero(np.diff(span_documents, append=-1))  # the last span of each document
    places = np.concatenate([stops[last], stops - lengths])  # an end comes before the sentinel at the same place
    added = np.concatenate([np.full(len(last), ids.eos_id), sentinels])
    added_documents = np.concatenate([span_documents[last], span_documents])
    return Sides(
        source[kept],
        documents_T[kept],
        np.insert(row_T[noise], places, added),
        np.insert(documents_T[noise], places, added_documents),
    )
