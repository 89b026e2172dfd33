"""Plain text: a file is one document.

A document longer than ``data.max_document_bytes``, or than the chunk, is cut into sections (``records.cut_point``),
each a document of its own. Lines that are no UTF-8, or hold U+0000, are left out and reported one by one; of a line
longer than a section, that section. Sections of nothing but whitespace are no documents.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator

from llmkit.data.readers.records import BadRow, Chunk, Document, Fields, Reason, cut_point
from llmkit.data.readers.streams import byte_ranges, check_head, first_line, lines, open_chunk, open_text
from llmkit.settings import DataConfig

__all__ = ["COMPRESSED", "SUFFIXES", "first_line", "read", "records", "split"]

SUFFIXES = (".txt",)
COMPRESSED = True


def split(path: str, chunk_bytes: int) -> list[Chunk]:
    return byte_ranges(path, chunk_bytes, "txt")


def read(chunk: Chunk, settings: DataConfig) -> Iterator[Document | BadRow]:
    """Holds one section at a time."""
    limit = settings.max_document_bytes
    goes_on = chunk.end < os.path.getsize(chunk.path)
    with open_chunk(chunk) as stream:
        line, data = 1, b""
        while data := data + stream.read(limit + 1 - len(data)):
            at_end = len(data) <= limit
            size = len(data) if at_end else cut_point(data, limit)
            yield from _section(data[:size], line, cut=goes_on or not at_end)
            line += data.count(b"\n", 0, size)
            data = data[size:]


def records(path: str, max_bytes: int, numbers: Collection[str] = ()) -> Iterator[Fields | BadRow]:
    """For tasks every line is a record with the one column ``text``, empty lines too: files may be line-aligned.

    ``numbers`` has no meaning here.
    """
    check_head(path)
    with open_text(path) as stream:
        for line, raw in enumerate(lines(stream, max_bytes), 1):
            if raw is None:
                yield BadRow(line, "over-long line")
                continue
            reason = _refusal(raw)
            text = raw.decode(errors="replace").removesuffix("\n").removesuffix("\r")
            yield Fields({"text": text}, line) if reason is None else BadRow(line, reason)


def _section(data: bytes, line: int, *, cut: bool) -> Iterator[Document | BadRow]:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = ""
    if not text or "\0" in text:
        yield from _by_lines(data, line, cut=cut)
    elif not text.isspace():
        yield Document(text, line, cut)


def _by_lines(data: bytes, line: int, *, cut: bool) -> Iterator[Document | BadRow]:
    """The good lines of a section as one document, after a report of each bad one."""
    good: list[str] = []
    first = 0
    for number, raw in enumerate(_split_lines(data), line):
        reason = _refusal(raw)
        if reason is not None:
            yield BadRow(number, reason)
        else:
            first = first or number
            good.append(raw.decode())
    text = "".join(good)
    if text and not text.isspace():
        yield Document(text, first, cut)


def _split_lines(data: bytes) -> list[bytes]:
    """Lines with their ends; only ``\\n`` ends a line."""
    *whole, rest = data.split(b"\n")
    return [line + b"\n" for line in whole] + ([rest] if rest else [])


def _refusal(raw: bytes) -> Reason | None:
    try:
        return "control characters" if "\0" in raw.decode() else None
    except UnicodeDecodeError:
        return "invalid utf-8"
