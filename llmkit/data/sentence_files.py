"""Files that say where sentences begin in a token shard: ``train-00-000000.sentences.npy`` beside its ``.bin``.

A one-dimensional ``.npy`` array of little-endian uint64, rising, one entry a sentence::

    place of its first token in the shard (special tokens count) << 2 | GOES_ON | FIRST

``FIRST`` marks the first sentence of a document. A document whose text gave no ids has one entry all the same, at its
end token. ``GOES_ON`` marks documents that are a later section of a text cut at ``data.max_document_bytes``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llmkit.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FIRST, GOES_ON, FLAG_BITS = 1, 2, 2
_HEADER_BYTES = 128
_DTYPE = "<u8"


class Sentences(NamedTuple):
    """Where the sentences of a document begin among its ids, and whether it goes on from the document before."""

    starts: Sequence[int]
    goes_on: bool


def sentence_path(shard: Path) -> Path:
    """The file that belongs to a shard."""
    return shard.with_suffix(".sentences.npy")


class SentenceWriter:
    """Writes the file of one shard, batch by batch."""

    def __init__(self, path: Path) -> None:
        self.path, self.n_sentences, self._n_entries = path, 0, 0
        self._file = path.open("wb")
        self._file.write(bytes(_HEADER_BYTES))

    def add(self, documents: Sequence[Sentences], first_tokens: NDArray[np.int64]) -> None:
        """Append documents; ``first_tokens`` are the places in the shard that their first ids take."""
        sizes = [max(1, len(document.starts)) for document in documents]
        starts = np.concatenate([np.asarray(document.starts or (0,), np.int64) for document in documents])
        entries = (starts + np.repeat(first_tokens, sizes)) << FLAG_BITS
        firsts = np.cumsum(sizes) - sizes
        entries[firsts] |= FIRST
        entries[firsts] |= np.array([GOES_ON * document.goes_on for document in documents])
        self._file.write(entries.astype(_DTYPE).tobytes())
        self._n_entries += entries.size
        self.n_sentences += sum(len(document.starts) for document in documents)

    def close(self, *, keep: bool) -> None:
        """Finish the file, or remove it."""
        if keep:
            self._file.seek(0)
            shape = (self._n_entries,)
            header = {"descr": _DTYPE, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self._file, header)
            assert self._file.tell() == _HEADER_BYTES, "numpy leaves room for any length in a header of 128 bytes"
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if not keep:
            self.path.unlink()


def map_sentences(shard: Path, n_documents: int) -> NDArray[np.uint64]:
    """The entries of a shard, mapped into memory. Raises DataError for a file that cannot be what was written."""
    path = sentence_path(shard)
    try:
        entries = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"the sentences of a token shard cannot be read: {error}", where=str(path)) from error
    if entries.dtype != np.dtype(_DTYPE) or entries.ndim != 1 or entries.size < n_documents:
        raise DataError("the sentences of a token shard are damaged", where=str(path))
    return np.asarray(entries)
