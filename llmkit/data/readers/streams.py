"""Files as streams of text bytes: byte ranges, gzip and zstd, and the checks that tell a wrong file at once.

Everything here raises ``DataError`` with the file and, for damage, the offset. Memory is bounded whatever a file holds.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol

from llmkit.data.readers.records import Chunk
from llmkit.errors import DataError, LLMKitError, missing_extra

COMPRESSIONS = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}  # suffix: the first bytes of such a file
_OTHER_FORMATS = {
    b"\xfd7zXZ\0": "an xz archive",
    b"BZh": "a bzip2 archive",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a parquet file",
}
_BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_UTF8_MARK = b"\xef\xbb\xbf"
_HEAD_BYTES = 4096
_BLOCK_BYTES = 1 << 20
_ZSTD_FEED_BYTES = 1024  # four bytes can stand for 128 KiB, so this bounds one output at 32 MiB


_Failures = tuple[type[Exception], ...]


class _Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Guarded(io.RawIOBase):
    """Bytes from ``source``, every way of failing turned into a ``DataError`` with the offset in ``file``."""

    def __init__(self, source: _Source, file: BinaryIO, path: str, failures: _Failures) -> None:
        self._source, self._file, self._path = source, file, path
        self._failures: _Failures = (*failures, OSError)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        try:
            data = self._source.read(len(view))
        except self._failures as error:
            raise DataError(
                f"the file is damaged or cut off: {error}",
                where=f"{self._path}: byte {self._file.tell()}",
                fix="copy or download the file again",
            ) from error
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Range:
    """The next ``size`` bytes of a file, no fewer."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    def read(self, size: int, /) -> bytes:
        data = self._file.read(min(size, self._left))
        if not data and self._left and size:
            raise EOFError("the file became shorter while it was read")
        self._left -= len(data)
        return data


class _Zstd:
    """Decompressed bytes of any number of frames. zstandard's stream reader would take a cut frame for the end."""

    def __init__(self, file: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise missing_extra("zstandard", "zstd") from None
        self.failures: _Failures = (zstandard.ZstdError, EOFError)
        self._new: Callable[[], Any] = zstandard.ZstdDecompressor().decompressobj
        self._file, self._frame, self._frame_started = file, self._new(), False
        self._ready, self._offset = b"", 0

    def read(self, size: int, /) -> bytes:
        while self._offset == len(self._ready):
            if not self._fill():
                return b""
        data = self._ready[self._offset : self._offset + size]
        self._offset += len(data)
        return data

    def _fill(self) -> bool:
        """Decompresses the next few bytes; False at the end."""
        left_over = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame, self._frame_started = self._new(), False
        fed = left_over or self._file.read(_ZSTD_FEED_BYTES)
        if not fed and self._frame_started:
            raise EOFError("the last zstd frame is not complete")
        self._frame_started = bool(fed)
        self._ready, self._offset = (self._frame.decompress(fed) if fed else b""), 0
        return bool(fed)


def open_file(path: str) -> BinaryIO:
    """The raw bytes of ``path``."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(
            f"the file cannot be read: {error.strerror}", where=path, fix="check the path and its permissions"
        ) from error


def compression_of(path: str) -> str:
    """``.gz``, ``.zst`` or nothing."""
    suffix = os.path.splitext(path.lower())[1]
    return suffix if suffix in COMPRESSIONS else ""


def open_text(path: str, start: int = 0, end: int | None = None) -> BinaryIO:
    """The decompressed bytes of ``path``, or bytes ``[start, end)`` of a plain file, without a byte order mark."""
    file = open_file(path)
    try:
        source, failures = _source(file, path, start, end)
        stream = io.BufferedReader(_Guarded(source, file, path, failures), 64 * 1024)
        if start == 0 and stream.peek(3).startswith(_UTF8_MARK):
            stream.read(len(_UTF8_MARK))
    except LLMKitError:
        file.close()
        raise
    return stream


def _source(file: BinaryIO, path: str, start: int, end: int | None) -> tuple[_Source, _Failures]:
    """What to read from, and what it may raise."""
    compression = compression_of(path)
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file), (EOFError, zlib.error)
    if compression == ".zst":
        zstd = _Zstd(file)
        return zstd, zstd.failures
    size = os.fstat(file.fileno()).st_size if end is None else end
    file.seek(start)
    return _Range(file, size - start), (EOFError,)


def open_chunk(chunk: Chunk) -> BinaryIO:
    """The text bytes of a chunk made by ``byte_ranges``."""
    return open_text(chunk.path, chunk.start, chunk.end)


def lines(stream: BinaryIO, limit: int) -> Iterator[bytes | None]:
    """Lines with their ends; None for one longer than ``limit`` bytes, which is skipped without being held."""
    while raw := stream.readline(limit + 1):
        if len(raw) <= limit or raw.endswith(b"\n"):
            yield raw
            continue
        while (more := stream.readline(_BLOCK_BYTES)) and not more.endswith(b"\n"):
            pass
        yield None


def check_head(path: str) -> None:
    """Raises ``DataError`` when the suffix lies about the compression, or the text is in UTF-16 or UTF-32."""
    with open_file(path) as file:
        magic = file.read(8)
    if not magic:
        return
    suffix = compression_of(path)
    if suffix and not magic.startswith(COMPRESSIONS[suffix]):
        raise DataError(f"the name ends in {suffix} but the content does not", where=path, fix="rename the file")
    if not suffix:
        _check_plain(path, magic)
    with open_text(path) as stream:
        head = stream.read(_HEAD_BYTES)
    if encoding := foreign_encoding(head):
        name = os.path.basename(path)
        raise DataError(
            f"the text is in {encoding}, not UTF-8",
            where=path,
            fix=f"iconv -f {encoding} -t UTF-8 '{name}' > 'utf8_{name}'",
        )


def _check_plain(path: str, magic: bytes) -> None:
    for suffix, first in COMPRESSIONS.items():
        if magic.startswith(first):
            raise DataError(
                f"the content is compressed but the name does not end in {suffix}",
                where=path,
                fix=f"rename it to {os.path.basename(path)!r} + {suffix!r}",
            )
    for first, what in _OTHER_FORMATS.items():
        if magic.startswith(first):
            raise DataError(f"the file is {what}, not text", where=path, fix="unpack or rename it")


def foreign_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, told by a byte order mark or by where the zero bytes of mostly ASCII text lie."""
    for mark, name in _BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return name
    if len(head) < 4:
        return None
    zeros = [head[lane::4].count(0) / len(head[lane::4]) for lane in range(4)]
    patterns = {"UTF-32LE": "t?00", "UTF-32BE": "00?t", "UTF-16LE": "t0t0", "UTF-16BE": "0t0t"}
    for name, pattern in patterns.items():
        full = 0.9 if name.startswith("UTF-32") else 0.5
        if all(_lane_fits(share, kind, full) for share, kind in zip(zeros, pattern, strict=True)):
            return name
    return None


def _lane_fits(share: float, kind: str, full: float) -> bool:
    """Whether a lane with this share of zero bytes can be text (``t``), zeros (``0``) or either (``?``)."""
    return kind == "?" or (share >= full if kind == "0" else share <= 0.1)


def byte_ranges(path: str, chunk_bytes: int, reader: str) -> list[Chunk]:
    """Chunks of about ``chunk_bytes`` that begin at line starts. A compressed file is one chunk."""
    check_head(path)
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if compression_of(path):
            return [Chunk(path, 0, size, reader)]
        starts = [0]
        while (start := _next_line(file, starts[-1] + chunk_bytes)) < size:
            starts.append(start)
    return [Chunk(path, a, b, reader) for a, b in zip(starts, [*starts[1:], size], strict=True) if a < b]


def _next_line(file: BinaryIO, offset: int) -> int:
    """Start of the first line at or after ``offset``; the file's size when there is none."""
    file.seek(offset - 1)
    position = offset - 1
    while block := file.read(64 * 1024):
        newline = block.find(b"\n")
        if newline >= 0:
            return position + newline + 1
        position += len(block)
    return max(position, offset)


def count_lines(path: str, end: int) -> int:
    """Line ends in the first ``end`` bytes of a file."""
    with open_file(path) as file:
        blocks: Callable[[], bytes] = lambda: file.read(min(_BLOCK_BYTES, end - file.tell()))  # noqa: E731
        return sum(block.count(b"\n") for block in iter(blocks, b""))


def first_line(chunk: Chunk) -> int:
    """The line of the file at which a chunk of ``byte_ranges`` starts."""
    return count_lines(chunk.path, chunk.start) + 1
