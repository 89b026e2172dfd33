"""Rows of sentence pairs, for next-sentence prediction (BERT, Devlin et al. 2019) and sentence-order prediction
(ALBERT, Lan et al. 2020).

Each chunk (``pair_layout.py``) is split into A and B where one of its sentences begins, drawn anew in every epoch. Half
of the pairs of an epoch are then made wrong, exactly: B is replaced by text of another document, or A and B change
places.

The text that replaces B is drawn so that nothing about it alone tells that it is out of place. It is what some chunk of
another document would have as its B: drawn as chunk and split are drawn for right pairs, among those of exactly the
length of the B it replaces. So a B that ends with its document, or is cut at the end of a row, is as likely in wrong
pairs as in right ones, and a B that opens a document is in neither. Splits whose B has a length that is found in one
document only are never drawn, in right pairs either; a chunk without another split has no label. Documents with the
same ids count as one, and so do the sections of a text that was cut at ``data.max_document_bytes``.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from llmkit.data.pair_layout import documents_of, lay_out
from llmkit.data.sampler import permute, stream_keys
from llmkit.errors import DataError
from llmkit.interfaces import IGNORE_INDEX, Pair, Row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from llmkit.data.pair_layout import PairLayout
    from llmkit.data.token_shards import TokenShards

    Ids = NDArray[np.int64]

_STREAM = 0x70616972  # keeps the numbers drawn here apart from those a row's masks are drawn with
_DRAWS, _ROUNDS = 32, 32


class SentencePairDataset:
    """Implements ``interfaces.SequenceDataset`` on token shards with sentences.

    Memory: 48 bytes a chunk (about ``seq_len`` tokens, or a document if that is shorter), 8 a row, 8 a document, and 4
    a sentence where wrong pairs need other documents.
    """

    def __init__(self, shards: TokenShards, seq_len: int, *, order: bool, split: str = "") -> None:
        """``order``: wrong pairs are in the wrong order; otherwise they are of different documents. ``split`` is the
        name of the text in errors.

        Raises DataError when no pair can be made, ConfigError for a ``seq_len`` that is too short.
        """
        self.shards, self.order, self.seq_len = shards, order, seq_len
        self.layout = lay_out(shards, seq_len, whole_sentences=order)
        if not self.layout.n_rows:
            raise _no_pairs(shards, split, order=order)
        chunk, length = _splits(shards, self.layout)
        self._n_with_split = np.unique(chunk).size
        self._text_C = self.layout.text_N[self.layout.document_C]
        self._usable = np.ones(seq_len + 1, bool)
        if not order:
            self._text_C = _merged(shards, self.layout.text_N)[self.layout.document_C]
            self._usable = _in_two_texts(self._text_C[chunk], length, seq_len)
            chunk, length = chunk[self._usable[length]], length[self._usable[length]]
            by_length = np.argsort(length, kind="stable")
            self._pool = chunk[by_length].astype(np.int32)
            self._bounds = np.searchsorted(length[by_length], np.arange(seq_len + 2))
        self._n_splits_C = np.bincount(chunk, minlength=self.layout.start_C.size)
        self._number_C = np.cumsum(self._n_splits_C > 0) - 1
        self.n_pairs = int(self._number_C[-1]) + 1 if chunk.size else 0
        if not self.n_pairs:
            raise _no_pairs(shards, split, order=order)

    @property
    def n_sequences(self) -> int:
        return self.layout.n_rows

    @property
    def n_tokens(self) -> int:
        """Ids in all rows, special tokens included."""
        return self.layout.n_ids

    @property
    def n_bytes(self) -> int:
        return self.shards.n_bytes

    def counts(self) -> dict[str, int]:
        """What the rows hold: rows with a pair that has a label, such pairs, pairs for which no other document has a
        match, chunks in which no second sentence begins, and sentences that go on in the next row."""
        return {
            "n_rows": self.n_sequences,
            "n_rows_with_pair": int(np.unique(self._row_of(np.flatnonzero(self._n_splits_C))).size),
            "n_pairs": self.n_pairs,
            "n_without_match": self._n_with_split - self.n_pairs,
            "n_without_split": self.layout.start_C.size - self._n_with_split,
            "n_cut_sentences": self.layout.n_cut,
        }

    def _row_of(self, chunk: Ids) -> Ids:
        """The rows that chunks stand in."""
        return np.searchsorted(self.layout.first_R, chunk, side="right") - 1

    def row(self, index: int, seed: tuple[int, ...], position: int | None) -> Row:
        """Row ``index``. The last item of ``seed`` is the row's own; what comes before it names the epoch."""
        if not 0 <= index < self.n_sequences:
            raise IndexError(f"row {index} of {self.n_sequences}")
        rng = np.random.default_rng((*seed, _STREAM))
        ids: list[Ids] = []
        pairs: list[Pair] = []
        at = 0
        for chunk in range(self.layout.first_R[index], self.layout.first_R[index + 1]):
            segments, label = self._segments(chunk, seed[:-1], rng)
            second, stop = at + segments[0].size, at + sum(segment.size for segment in segments)
            pairs.append(Pair(at, second, stop, label))
            ids += segments
            at = stop
        return Row(np.concatenate(ids), seed, position, tuple(pairs))

    def _segments(self, chunk: int, epoch: tuple[int, ...], rng: np.random.Generator) -> tuple[list[Ids], int]:
        """One or two segments with their special tokens, and the label."""
        start, stop = int(self.layout.start_C[chunk]), int(self.layout.stop_C[chunk])
        splits = self.shards.sentence_starts(start + 1, stop)
        if not splits.size:
            return [self._wrapped(start, stop, is_first=True)], IGNORE_INDEX
        if self._n_splits_C[chunk]:
            splits = splits[self._usable[stop - splits]]
        split = int(splits[rng.integers(splits.size)])
        spans = [(start, split), (split, stop)]
        label = IGNORE_INDEX
        if self._n_splits_C[chunk]:
            label = permute(int(self._number_C[chunk]), self.n_pairs, _label_keys(epoch)) & 1
        if label == 1:
            spans = [(split, stop), (start, split)] if self.order else [(start, split), self._other(chunk, split, rng)]
        return [self._wrapped(*span, is_first=place == 0) for place, span in enumerate(spans)], label

    def _wrapped(self, start: int, stop: int, *, is_first: bool) -> Ids:
        """``[bos] ids eos`` for the first segment of a chunk, ``ids eos`` for the second."""
        before = [self.shards.bos_id] if is_first and self.shards.bos_id is not None else []
        return np.concatenate([np.array(before, np.int64), self.shards.window(start, stop), [self.shards.eos_id]])

    def _other(self, chunk: int, split: int, rng: np.random.Generator) -> tuple[int, int]:
        """Where the text stands that replaces the B which begins at ``split``.

        The pool lists every split of every chunk. To draw as for right pairs, where each chunk counts once, a split is
        kept with a probability of one in the number of splits of its chunk.
        """
        length, own = int(self.layout.stop_C[chunk]) - split, self._text_C[chunk]
        low, high = self._bounds[length : length + 2]
        for _ in range(_ROUNDS):
            found = self._pool[rng.integers(low, high, _DRAWS)]
            kept = (self._text_C[found] != own) & (rng.random(_DRAWS) * self._n_splits_C[found] < 1)
            if kept.any():
                stop = int(self.layout.stop_C[found[kept.argmax()]])
                return stop - length, stop
        others = self._pool[low:high]
        others = others[self._text_C[others] != own]
        stop = int(self.layout.stop_C[others[rng.integers(others.size)]])
        return stop - length, stop


@lru_cache(maxsize=16)
def _label_keys(epoch: tuple[int, ...]) -> tuple[int, ...]:
    """Names the permutation that gives the pairs of an epoch their labels."""
    return stream_keys(int(np.random.SeedSequence(epoch).generate_state(1, np.uint64)[0]), 0, _STREAM)


def _splits(shards: TokenShards, layout: PairLayout) -> tuple[Ids, Ids]:
    """Every place where a chunk can be split: the number of the chunk and the length of its B."""
    chunks, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for shard in range(len(shards.paths)):
        offset, stop, _ = shards.sentences(shard)
        starts = shards.sentence_starts(offset, stop)
        chunk = np.searchsorted(layout.start_C, starts, side="right") - 1
        inside = (starts > layout.start_C[chunk]) & (starts < layout.stop_C[chunk])
        chunks.append(chunk[inside])
        lengths.append(layout.stop_C[chunk[inside]] - starts[inside])
    return np.concatenate(chunks), np.concatenate(lengths)


def _in_two_texts(text: Ids, length: Ids, seq_len: int) -> NDArray[np.bool_]:
    """For every length of a B whether it is found in more than one text."""
    low, high = np.full(seq_len + 1, np.iinfo(np.int64).max), np.full(seq_len + 1, -1)
    np.minimum.at(low, length, text)
    np.maximum.at(high, length, text)
    return low < high


def _merged(shards: TokenShards, text_N: Ids) -> Ids:
    """``text_N`` with one number for texts that share a document with the same ids."""
    merged = np.arange(text_N.size)

    def root(text: int) -> int:
        while merged[text] != text:
            text = merged[text]
        return text

    for number, equal in _repeats(shards):
        one, other = root(text_N[number]), root(text_N[equal])
        merged[max(one, other)] = min(one, other)
    while (merged != merged[merged]).any():
        merged = merged[merged]
    return merged[text_N]


def _repeats(shards: TokenShards) -> Iterator[tuple[int, int]]:
    """Documents whose ids are those of an earlier one, and that one. Only documents of equal length are read."""
    spans = np.array([(sentences[0], end) for sentences, end, _ in documents_of(shards)])
    _, place, n_equal = np.unique(spans[:, 1] - spans[:, 0], return_inverse=True, return_counts=True)
    candidates = np.flatnonzero(n_equal[place] > 1)
    hashes = np.fromiter((_hash(shards.window(start, end)) for start, end in spans[candidates].tolist()), np.uint64)
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    for number in np.flatnonzero(first[group] != np.arange(candidates.size)):
        yield int(candidates[number]), int(candidates[first[group[number]]])


def _hash(ids: Ids) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest())


def _no_pairs(shards: TokenShards, split: str, *, order: bool) -> DataError:
    where = str(shards.paths[0].parent) if shards.paths else "data.path"
    text = f"the {split} text" if split else "the text"
    other = "raise data.val_fraction or set data.val_path" if split == "validation" else "give more text"
    if order:
        what = f"in {text} no row holds two sentences of one document"
        return DataError(what, where=where, fix=f"give running text, or raise data.seq_len; else {other}")
    return DataError(
        f"of {text} no pair of sentences can be made: wrong pairs take their second part from another document",
        where=where,
        fix=f"{other}: it takes several documents of several sentences each",
    )
