"""Token shards: ids of prepared documents in files that are mapped into memory, and windows cut from them.

A shard is a header of 512 bytes (magic, then JSON padded with spaces) and the ids as little-endian uint16 or uint32.
Every document is stored as ``[bos] ids eos``. A file beside the shard may say where sentences begin
(``sentence_files.py``). The SHA-256 of the file stands in the manifest of its folder (``cache.py``).
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmkit.data.sentence_files import FLAG_BITS, Sentences, SentenceWriter, map_sentences, sentence_path
from llmkit.errors import DataError
from llmkit.interfaces import Row

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEADER_BYTES = 512
_MAGIC = b"LLMKTOK1"
_DTYPES = ("<u2", "<u4")


@dataclass(frozen=True)
class Vocabulary:
    """What the shards must know of the tokenizer."""

    vocab_size: int
    bos_id: int | None
    eos_id: int


@dataclass(frozen=True)
class ShardHeader(Vocabulary):
    """What a shard file says of itself. ``n_bytes`` counts the UTF-8 bytes of the text behind the ids."""

    dtype: str
    n_tokens: int
    n_bytes: int
    n_documents: int

    @property
    def file_bytes(self) -> int:
        return HEADER_BYTES + self.n_tokens * np.dtype(self.dtype).itemsize

    def pack(self) -> bytes:
        packed = _MAGIC + json.dumps(asdict(self)).encode()
        assert len(packed) <= HEADER_BYTES
        return packed.ljust(HEADER_BYTES)


def read_header(path: Path) -> ShardHeader:
    """The header of a shard whose size fits it. Raises DataError for anything else."""
    try:
        with path.open("rb") as file:
            raw = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"a token shard cannot be read: {error.strerror}", where=str(path)) from error
    header = _parse_header(raw)
    if header is None:
        raise DataError("the header of a token shard is damaged", where=str(path))
    if size != header.file_bytes:
        raise DataError(f"a token shard has {size} bytes instead of {header.file_bytes}", where=str(path))
    return header


def _parse_header(raw: bytes) -> ShardHeader | None:
    if len(raw) != HEADER_BYTES or not raw.startswith(_MAGIC):
        return None
    try:
        values = json.loads(raw[len(_MAGIC) :])
    except ValueError:
        return None
    names = {field.name for field in fields(ShardHeader)}
    if not isinstance(values, dict) or set(values) != names or values["dtype"] not in _DTYPES:
        return None
    return ShardHeader(**values)


class ShardWriter:
    """Writes one shard, batch by batch, and its sentences if they are wanted. Without documents it leaves no file."""

    def __init__(self, path: Path, vocabulary: Vocabulary, *, sentences: bool = False) -> None:
        self.path, self.vocabulary, self.with_sentences = path, vocabulary, sentences
        self.n_tokens = self.n_bytes = self.n_documents = 0
        self._dtype = _DTYPES[0] if vocabulary.vocab_size <= 1 << 16 else _DTYPES[1]

    def __enter__(self) -> ShardWriter:
        self._file = self.path.open("wb")
        self._file.write(bytes(HEADER_BYTES))
        self._sentences = SentenceWriter(sentence_path(self.path)) if self.with_sentences else None
        return self

    @property
    def n_sentences(self) -> int:
        return 0 if self._sentences is None else self._sentences.n_sentences

    def add(self, documents: Sequence[Sequence[int]], n_bytes: int, sentences: Sequence[Sentences] = ()) -> None:
        """Append documents; ``n_bytes`` is the size of their text. Raises DataError for ids outside the vocabulary."""
        words = self.vocabulary
        bos, eos = ([] if words.bos_id is None else [words.bos_id]), [words.eos_id]
        parts = chain.from_iterable((bos, ids, eos) for ids in documents)
        ids = np.fromiter(chain.from_iterable(parts), np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < words.vocab_size:
            what = f"the tokenizer gave ids {ids.min()} .. {ids.max()}, outside its vocabulary of {words.vocab_size}"
            raise DataError(what, where="tokenizer", fix="its files do not belong together; take them from one place")
        self._file.write(ids.astype(self._dtype).tobytes())
        if self._sentences is not None and documents:
            sizes = np.array([len(bos) + len(document) + len(eos) for document in documents])
            self._sentences.add(sentences, self.n_tokens + np.cumsum(sizes) - sizes + len(bos))
        self.n_tokens += ids.size
        self.n_bytes += n_bytes
        self.n_documents += len(documents)

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if error is None and self.n_documents:
            self._file.seek(0)
            self._file.write(self._header().pack())
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        keep = error is None and self.n_documents > 0
        if not keep:
            self.path.unlink()
        if self._sentences is not None:
            self._sentences.close(keep=keep)

    def _header(self) -> ShardHeader:
        return ShardHeader(
            **asdict(self.vocabulary),
            dtype=self._dtype,
            n_tokens=self.n_tokens,
            n_bytes=self.n_bytes,
            n_documents=self.n_documents,
        )


class TokenShards:
    """The ids of one split of one source as a single long array; its files are mapped when first touched."""

    def __init__(self, paths: Sequence[Path], vocabulary: Vocabulary) -> None:
        """Opens and checks the header of every file. Raises DataError when one does not fit ``vocabulary``."""
        self.paths = tuple(paths)
        self.vocab_size, self.eos_id, self.bos_id = vocabulary.vocab_size, vocabulary.eos_id, vocabulary.bos_id
        self._headers = [read_header(path) for path in paths]
        for path, header in zip(paths, self._headers, strict=True):
            found = Vocabulary(header.vocab_size, header.bos_id, header.eos_id)
            if found != vocabulary:
                raise DataError(f"a token shard is of another tokenizer: {found}", where=str(path))
        self._starts = (0, *accumulate(header.n_tokens for header in self._headers))
        self._maps: dict[int, NDArray[Any]] = {}
        self._sentences: dict[int, NDArray[np.uint64]] = {}

    @property
    def n_tokens(self) -> int:
        return self._starts[-1]

    @property
    def n_bytes(self) -> int:
        return sum(header.n_bytes for header in self._headers)

    @property
    def n_documents(self) -> int:
        return sum(header.n_documents for header in self._headers)

    def window(self, start: int, stop: int) -> NDArray[np.int64]:
        """The ids ``start .. stop - 1``, across files."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"window {start} .. {stop} of {self.n_tokens} tokens")
        out = np.empty(stop - start, np.int64)
        filled = 0
        shard = bisect_right(self._starts, start) - 1
        while filled < out.size:
            begin = start + filled - self._starts[shard]
            piece = self._map(shard)[begin : begin + out.size - filled]
            out[filled : filled + piece.size] = piece
            filled += piece.size
            shard += 1
        return out

    def sentences(self, shard: int) -> tuple[int, int, NDArray[np.uint64]]:
        """Place of the shard's first token, of the first behind it, and its entries (``sentence_files.py``), whose
        places count from its first token. Raises DataError when preparation did not look for sentences."""
        if shard not in self._sentences:
            self._sentences[shard] = map_sentences(self.paths[shard], self._headers[shard].n_documents)
        return self._starts[shard], self._starts[shard + 1], self._sentences[shard]

    def sentence_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Places of the sentences that begin at ``start .. stop - 1``, all in one shard."""
        offset, _, entries = self.sentences(bisect_right(self._starts, start) - 1)
        bounds = np.array([start - offset, stop - offset], np.uint64) << np.uint64(FLAG_BITS)
        first, last = np.searchsorted(entries, bounds)
        return (entries[first:last] >> np.uint64(FLAG_BITS)).astype(np.int64) + offset

    def _map(self, shard: int) -> NDArray[Any]:
        if shard not in self._maps:
            header = self._headers[shard]
            self._maps[shard] = np.memmap(
                self.paths[shard], header.dtype, "r", offset=HEADER_BYTES, shape=(header.n_tokens,)
            )
        return self._maps[shard]


class WindowDataset:
    """Cuts shards into rows of ``stride + overlap`` ids, a row every ``stride`` ids.

    The last row holds what is left. Nothing is dropped and nothing is cropped: with an overlap of one, every id but the
    first is a target once.
    """

    def __init__(self, shards: TokenShards, stride: int, overlap: int) -> None:
        self.shards, self.stride, self.overlap = shards, stride, overlap

    @property
    def n_sequences(self) -> int:
        return -(-max(0, self.n_tokens - self.overlap) // self.stride)

    @property
    def n_tokens(self) -> int:
        return self.shards.n_tokens

    @property
    def n_bytes(self) -> int:
        return self.shards.n_bytes

    def row(self, index: int, seed: tuple[int, ...], position: int | None) -> Row:
        if not 0 <= index < self.n_sequences:
            raise IndexError(f"row {index} of {self.n_sequences}")
        start = index * self.stride
        ids = self.shards.window(start, min(start + self.stride + self.overlap, self.n_tokens))
        return Row(ids, seed, position)
