"""Token shards: ids of prepared documents in files that are mapped into memory, and windows cut from them.

A shard is a header of 512 bytes (magic, then JSON padded with spaces) and the ids as little-endian uint16 or uint32.
Every document is stored as ``[bos] ids eos``.
The SHA-256 of the file stands in the manifest of its folder (``cache.py``).
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

from llmkit.errors import DataError

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
    """Writes one shard, batch by batch. A shard without documents leaves no file."""

    def __init__(self, path: Path, vocabulary: Vocabulary) -> None:
        self.path, self.vocabulary = path, vocabulary
        self.n_tokens = self.n_bytes = self.n_documents = 0
        self._dtype = _DTYPES[0] if vocabulary.vocab_size <= 1 << 16 else _DTYPES[1]

    def __enter__(self) -> ShardWriter:
        self._file = self.path.open("wb")
        self._file.write(bytes(HEADER_BYTES))
        return self

    def add(self, documents: Sequence[Sequence[int]], n_bytes: int) -> None:
        """Append documents; ``n_bytes`` is the size of their text. Raises DataError for ids outside the vocabulary."""
        words = self.vocabulary
        bos, eos = ([] if words.bos_id is None else [words.bos_id]), [words.eos_id]
        parts = chain.from_iterable((bos, ids, eos) for ids in documents)
        ids = np.fromiter(chain.from_iterable(parts), np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < words.vocab_size:
            what = f"the tokenizer gave ids {ids.min()} .. {ids.max()}, outside its vocabulary of {words.vocab_size}"
            raise DataError(what, where="tokenizer", fix="its files do not belong together; take them from one place")
        self._file.write(ids.astype(self._dtype).tobytes())
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
        if error is not None or not self.n_documents:
            self.path.unlink()

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

    def _map(self, shard: int) -> NDArray[Any]:
        if shard not in self._maps:
            header = self._headers[shard]
            self._maps[shard] = np.memmap(
                self.paths[shard], header.dtype, "r", offset=HEADER_BYTES, shape=(header.n_tokens,)
            )
        return self._maps[shard]


class WindowDataset:
    """Cuts shards into rows of ``seq_len + 1`` ids that overlap by one: every id but the first is a target once.

    The last row holds what is left. Nothing is dropped and nothing is cropped.
    """

    def __init__(self, shards: TokenShards, seq_len: int) -> None:
        self.shards, self.seq_len = shards, seq_len

    @property
    def n_sequences(self) -> int:
        return -(-max(0, self.n_tokens - 1) // self.seq_len)

    @property
    def n_tokens(self) -> int:
        return self.shards.n_tokens

    @property
    def n_bytes(self) -> int:
        return self.shards.n_bytes

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        if not 0 <= index < self.n_sequences:
            raise IndexError(f"row {index} of {self.n_sequences}")
        start = index * self.seq_len
        return self.shards.window(start, min(start + self.seq_len + 1, self.n_tokens))
