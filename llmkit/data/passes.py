"""The two passes over the text, as they run in worker processes: ``scan_chunk`` and ``encode_chunk``.

The scan tells the parent what is there (hashes, counts, a sample of the text); the parent decides which documents are
kept and where they go; the second pass reads the text again and writes token shards. Neither holds more than one batch
of text.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmkit.data.leaks import ValidationWindows, WindowIndex
from llmkit.data.readers.base import BadRow, Chunk, Document, read_chunk
from llmkit.data.sentence_files import Sentences
from llmkit.data.sentences import encode_with_sentences
from llmkit.data.split import ValRule, belongs_to_val, text_keys
from llmkit.data.token_shards import ShardWriter, Vocabulary
from llmkit.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmkit.interfaces import Tokenizer
    from llmkit.settings import DataConfig

BATCH_BYTES = 1 << 20
N_EXAMPLES = 5
SAMPLE_END = b"\0"  # ends each document of a sample file, and stands before those cut; no document holds it
_SAMPLE_ODD = np.uint64(0x9E3779B97F4A7C15)  # makes the sample independent of the validation split


@dataclass
class Batch:
    """Some consecutive documents of a chunk."""

    texts: list[str] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)  # the same in UTF-8
    cut: list[bool] = field(default_factory=list)  # whether the text goes on in the next document

    def hashes(self) -> NDArray[np.uint64]:
        """64 bits of BLAKE2b of each text."""
        digests = (hashlib.blake2b(raw, digest_size=8).digest() for raw in self.raw)
        return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def batches(rows: Iterable[Document | BadRow], on_bad: Callable[[BadRow], None]) -> Iterator[Batch]:
    """The documents among ``rows``, about a mebibyte at a time; bad rows go to ``on_bad``."""
    batch, size = Batch(), 0
    for row in rows:
        if isinstance(row, BadRow):
            on_bad(row)
            continue
        batch.texts.append(row.text)
        batch.raw.append(row.text.encode())
        batch.cut.append(row.cut)
        size += len(batch.raw[-1])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = Batch(), 0
    if batch.texts:
        yield batch


def rows_of(chunk: Chunk, data: DataConfig) -> Iterator[Document | BadRow]:
    """What the reader gives. Raises DataError naming a file that cannot be read any more."""
    try:
        yield from read_chunk(chunk, data)
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", where=chunk.path) from error


@dataclass(frozen=True)
class ScanTask:
    """``whole_texts``: all sections of a text belong to the side of its first one; ``text_key`` is its hash where the
    chunk is known to go on with a text."""

    chunk: Chunk
    data: DataConfig
    val_rule: ValRule
    whole_texts: bool
    text_key: np.uint64 | None
    train_sample: float  # about what fraction of the training documents goes into the sample file
    val_sample: float
    sample_path: Path


@dataclass
class ChunkScan:
    """What one chunk holds. ``sample`` has the places in the chunk of the documents written to the sample file."""

    hashes: NDArray[np.uint64]
    lengths: NDArray[np.uint64]  # bytes of each document
    sample: NDArray[np.int64]
    windows: ValidationWindows
    bad: Counter[str] = field(default_factory=Counter)
    bad_examples: list[BadRow] = field(default_factory=list)
    cut: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))  # goes on in the next document

    @property
    def n_cut(self) -> int:
        return int(self.cut.sum())

    def add_bad(self, row: BadRow) -> None:
        self.bad[row.reason] += 1
        if len(self.bad_examples) < N_EXAMPLES:
            self.bad_examples.append(row)


def scan_chunk(task: ScanTask) -> ChunkScan:
    """First pass over one chunk."""
    nothing = np.empty(0, np.uint64)
    scan = ChunkScan(nothing, nothing, np.empty(0, np.int64), ValidationWindows())
    hashes, lengths, sampled, cut, n_seen = [scan.hashes], [scan.lengths], [scan.sample], [scan.cut], 0
    text_key = task.text_key
    with task.sample_path.open("wb") as file:
        for batch in batches(rows_of(task.chunk, task.data), scan.add_bad):
            hashes.append(batch.hashes())
            cut.append(np.array(batch.cut))
            keys = text_keys(hashes[-1], cut[-1], text_key) if task.whole_texts else hashes[-1]
            text_key = keys[-1] if cut[-1][-1] else None
            is_val = belongs_to_val(keys, task.val_rule)
            scan.windows.add([batch.raw[place] for place in np.flatnonzero(is_val)])
            chosen = in_sample(hashes[-1], np.where(is_val, task.val_sample, task.train_sample))
            chosen[0] |= n_seen == 0  # so that no sample is empty
            sampled.append(np.flatnonzero(chosen) + n_seen)
            for place in np.flatnonzero(chosen):
                file.write(SAMPLE_END * batch.cut[place] + batch.raw[place] + SAMPLE_END)
            lengths.append(np.fromiter(map(len, batch.raw), np.uint64))
            n_seen += len(batch.raw)
    scan.hashes, scan.lengths = np.concatenate(hashes), np.concatenate(lengths)
    scan.sample, scan.cut = np.concatenate(sampled), np.concatenate(cut)
    return scan


def in_sample(hashes: NDArray[np.uint64], fraction: NDArray[np.float64]) -> NDArray[np.bool_]:
    """A fixed pseudo-random choice of about ``fraction`` of the documents."""
    uniform = (hashes * _SAMPLE_ODD >> np.uint64(11)) * 2.0**-53
    return np.asarray(uniform < fraction)


def documents_in(sample_path: Path) -> Iterator[Document]:
    """The documents of a sample file."""
    rest, cut = b"", False
    with sample_path.open("rb") as file:
        while piece := file.read(BATCH_BYTES):
            *whole, rest = (rest + piece).split(SAMPLE_END)
            for raw in whole:
                if raw:
                    yield Document(raw.decode(), 0, cut)
                cut = not raw


@dataclass(frozen=True)
class EncodeTask:
    """``val`` holds one bit a document, set for those of the validation text, and so does ``keep`` for those that are
    kept (None: all); ``digest`` is ``digest_of`` the hashes seen by the scan.

    ``text_path`` is a sample file that holds every document of the chunk, where there is one: reading a format (above
    all parsing the standard library) costs more than reading plain text.
    """

    chunk: Chunk
    text_path: Path | None
    data: DataConfig
    val: bytes
    keep: bytes | None
    digest: str
    load: Callable[[Path], Tokenizer]
    tokenizer_folder: Path
    vocabulary: Vocabulary
    window_index: Path | None
    train_path: Path
    val_path: Path
    sentences: bool  # whether to note where sentences begin
    goes_on: bool  # the first document is a later section of the last one of the chunk before


@dataclass
class ChunkTokens:
    """Sums over the documents of one chunk that were written, and the validation windows met in its training text."""

    n_tokens: dict[str, int]
    n_bytes: dict[str, int]
    n_documents: dict[str, int]
    n_sentences: dict[str, int]
    windows_found: NDArray[np.int64]


def digest_of(hashes: NDArray[np.uint64]) -> str:
    return hashlib.blake2b(hashes.tobytes(), digest_size=16).hexdigest()


# One entry: a process works for one preparation at a time, and each has a folder of its own.
_load_tokenizer = lru_cache(maxsize=1)(lambda load, folder: load(folder))
_load_index = lru_cache(maxsize=1)(WindowIndex.load)


class TextNumbers:
    """Which documents of a split are a later section of the same text as the document before them in that split.

    Sections of the only text of a corpus fall on different sides, and repeated ones may have been dropped, so the
    document before may be of another text. At the beginning of a chunk that goes on with a text, the document before is
    taken to be of that text: two texts that count as one only take no wrong segments from each other.
    """

    def __init__(self, goes_on: bool) -> None:
        self.was_cut = goes_on
        self.number = self.before = 0 if goes_on else -1
        self.last: dict[ShardWriter, int] = {}  # the text of the document written last
        self.of_place: list[int] = []

    def add(self, cut: Sequence[bool]) -> None:
        """The next documents in the order of the text; ``cut``: goes on in the document after it."""
        self.of_place = []
        for is_cut in cut:
            self.number += not self.was_cut
            self.of_place.append(self.number)
            self.was_cut = is_cut

    def goes_on(self, writer: ShardWriter, places: NDArray[np.int64]) -> list[bool]:
        """For the documents that are now written into a split."""
        found = []
        for place in places:
            number = self.of_place[place]
            found.append(number == self.last.get(writer, self.before))
            self.last[writer] = number
        return found


def encode_chunk(task: EncodeTask) -> ChunkTokens:
    """Second pass over one chunk: writes its training and its validation shard."""
    tokenizer: Tokenizer = _load_tokenizer(task.load, task.tokenizer_folder)
    index = _load_index(task.window_index) if task.window_index else None
    hashes, found = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    rows = documents_in(task.text_path) if task.text_path else rows_of(task.chunk, task.data)
    val_bits, keep_bits = _unpacked(task.val), None if task.keep is None else _unpacked(task.keep)
    train = ShardWriter(task.train_path, task.vocabulary, sentences=task.sentences)
    val = ShardWriter(task.val_path, task.vocabulary, sentences=task.sentences)
    with train, val:
        n_seen, numbers = 0, TextNumbers(task.goes_on)
        for batch in batches(rows, lambda _: None):
            hashes.append(batch.hashes())
            kept, is_val = (_bits(bits, n_seen, hashes[-1].size) for bits in (keep_bits, val_bits))
            numbers.add(batch.cut)
            for writer, places in ((train, kept & ~is_val), (val, kept & is_val)):
                _write(writer, tokenizer, batch, np.flatnonzero(places), numbers)
            if index:
                found.append(index.found_in([batch.raw[place] for place in np.flatnonzero(kept & ~is_val)]))
            n_seen += hashes[-1].size
        if digest_of(np.concatenate(hashes)) != task.digest:
            raise changed(task.chunk.path)
    writers = {"train": train, "val": val}
    return ChunkTokens(
        {split: writer.n_tokens for split, writer in writers.items()},
        {split: writer.n_bytes for split, writer in writers.items()},
        {split: writer.n_documents for split, writer in writers.items()},
        {split: writer.n_sentences for split, writer in writers.items()},
        np.unique(np.concatenate(found)),
    )


def _unpacked(bits: bytes) -> NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(bits, np.uint8)).astype(bool)


def _bits(bits: NDArray[np.bool_] | None, start: int, n: int) -> NDArray[np.bool_]:
    """The bits of ``n`` documents from ``start``; a changed file may have more documents than bits."""
    found = np.ones(n, bool)
    if bits is not None:
        known = bits[start : start + n]
        found[: known.size] = known
    return found


def _write(
    writer: ShardWriter, tokenizer: Tokenizer, batch: Batch, places: NDArray[np.int64], numbers: TextNumbers
) -> None:
    if not places.size:
        return
    texts, n_bytes = [batch.texts[place] for place in places], sum(len(batch.raw[place]) for place in places)
    if not writer.with_sentences:
        writer.add(tokenizer.encode_batch(texts), n_bytes)
        return
    encoded = encode_with_sentences(tokenizer, texts)
    goes_on = numbers.goes_on(writer, places)
    sentences = [Sentences(one.starts, later) for one, later in zip(encoded, goes_on, strict=True)]
    writer.add([one.ids for one in encoded], n_bytes, sentences)


def changed(path: str) -> DataError:
    return DataError(
        "the file changed while it was being prepared", where=path, fix="start again once nothing writes to it"
    )
