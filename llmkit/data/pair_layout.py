"""How documents fill rows of sentence pairs: decided once, from the places of their sentences alone.

A *chunk* is consecutive text of one document. In a row it becomes ``[bos] A eos B eos`` if a sentence begins inside it,
else ``[bos] A eos``. Rows are filled from the left, so hardly anything is padding, and nothing is dropped: where a row
ends inside a sentence, the next row goes on there.

With ``whole_sentences`` the two segments of a pair end where sentences end, because the order of segments that may be
cut could be told from the cut alone. The beginning of a sentence that does not fit then fills the row as a chunk of
its own, and so does its end in the next row.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmkit.data.sentence_files import FIRST, FLAG_BITS, GOES_ON
from llmkit.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmkit.data.token_shards import TokenShards

_LEAST_TEXT = 8  # tokens of text for which a chunk is begun at the end of a row
MIN_SEQ_LEN = 16


@dataclass(frozen=True)
class PairLayout:
    """Chunks (C) in the order of the text, and rows (R) of them. 24 bytes a chunk, 8 a row, 8 a document (N)."""

    start_C: NDArray[np.int64]  # place of the first token
    stop_C: NDArray[np.int64]
    document_C: NDArray[np.int64]
    first_R: NDArray[np.int64]  # R + 1: the chunk a row begins with, and the number of chunks
    text_N: NDArray[np.int64]  # number of the text a document belongs to: sections of one text share it
    n_ids: int  # in all rows, special tokens included
    n_cut: int  # sentences that go on in the next row

    @property
    def n_rows(self) -> int:
        return self.first_R.size - 1


def documents_of(shards: TokenShards) -> Iterator[tuple[list[int], int, bool]]:
    """Of every document: where its sentences begin, the place of its end token, and whether it is a later section of
    the text of the document before."""
    n_before = 1 if shards.bos_id is None else 2  # special tokens between two documents
    for shard in range(len(shards.paths)):
        offset, stop, entries = shards.sentences(shard)
        starts = (entries >> np.uint64(FLAG_BITS)).astype(np.int64) + offset
        firsts = np.flatnonzero(entries & np.uint64(FIRST))
        goes_on = (entries[firsts] & np.uint64(GOES_ON)) != 0
        ends = np.append(starts[firsts[1:]] - n_before, stop - 1)
        bounds = np.append(firsts, entries.size)
        for number in range(firsts.size):
            sentences = starts[bounds[number] : bounds[number + 1]].tolist()
            yield sentences, int(ends[number]), bool(goes_on[number])


def lay_out(shards: TokenShards, seq_len: int, *, whole_sentences: bool) -> PairLayout:
    """The rows of at most ``seq_len`` ids. Raises ConfigError for rows too short to hold a pair."""
    if seq_len < MIN_SEQ_LEN:
        what = f"rows of {seq_len} tokens are too short for pairs of sentences"
        raise ConfigError(what, where="data.seq_len", fix=f"set it to at least {MIN_SEQ_LEN}")
    rows = _Rows(seq_len, 0 if shards.bos_id is None else 1, whole_sentences=whole_sentences)
    texts = array("q")
    for number, (sentences, end, goes_on) in enumerate(documents_of(shards)):
        texts.append(texts[-1] if goes_on and number else number)
        rows.add_document(number, sentences, end)
    return rows.finished(np.array(texts, np.int64))


class _Rows:
    """Rows being filled."""

    def __init__(self, seq_len: int, n_bos: int, *, whole_sentences: bool) -> None:
        self.seq_len, self.n_bos, self.whole_sentences = seq_len, n_bos, whole_sentences
        self.least = n_bos + 1 + _LEAST_TEXT
        self.starts, self.stops, self.documents, self.firsts = array("q"), array("q"), array("q"), array("q")
        self.room = self.n_ids = self.n_cut = 0

    def add_document(self, number: int, sentences: list[int], end: int) -> None:
        place = sentences[0]
        while place < end:
            if self.room < self.least:
                self.firsts.append(len(self.starts))
                self.room = self.seq_len
            stop, has_pair = self._stop(sentences, place, end)
            self.starts.append(place)
            self.stops.append(stop)
            self.documents.append(number)
            n_ids = stop - place + self.n_bos + 1 + has_pair
            self.room -= n_ids
            self.n_ids += n_ids
            place = stop

    def _stop(self, sentences: list[int], place: int, end: int) -> tuple[int, bool]:
        """Where the chunk that begins at ``place`` stops, and whether another sentence begins inside it."""
        following = bisect_right(sentences, place)
        begun = sentences[following] if following < len(sentences) else end
        most = place + self.room - self.n_bos - 2  # of two segments
        if begun >= most:
            stop = min(begun, most + 1)
            self.n_cut += stop < begun
            return stop, False
        stop = min(end, most)
        whole = stop if stop == end else sentences[bisect_right(sentences, stop) - 1]
        if not self.whole_sentences:
            self.n_cut += whole < stop
            return stop, stop > begun
        if sentences[following - 1] < place:  # the rest of a sentence begun in the row before
            return begun, False
        return whole, whole > begun

    def finished(self, text_N: NDArray[np.int64]) -> PairLayout:
        self.firsts.append(len(self.starts))
        start, stop, document, first = (
            np.array(values, np.int64) for values in (self.starts, self.stops, self.documents, self.firsts)
        )
        return PairLayout(start, stop, document, first, text_N, self.n_ids, self.n_cut)
