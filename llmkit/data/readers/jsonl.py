"""JSON lines: one object a line, its text in ``data.text_field``."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any

from llmkit.data.readers.records import BadRow, Chunk, Document, Fields, Refused, documents
from llmkit.data.readers.streams import byte_ranges, check_head, first_line, lines, open_chunk, open_text
from llmkit.settings import DataConfig

__all__ = ["COMPRESSED", "SUFFIXES", "fields", "first_line", "read", "records", "split"]

SUFFIXES = (".jsonl", ".ndjson")
COMPRESSED = True
_FIELD_ROWS = 100


def split(path: str, chunk_bytes: int) -> list[Chunk]:
    return byte_ranges(path, chunk_bytes, "jsonl")


def read(chunk: Chunk, settings: DataConfig) -> Iterator[Document | BadRow]:
    """Blank lines are skipped. Holds one line of at most ``data.max_line_bytes``."""
    with open_chunk(chunk) as stream:
        for line, raw in enumerate(lines(stream, settings.max_line_bytes), 1):
            if raw is None:
                yield BadRow(line, "over-long line")
            elif not raw.isspace():
                try:
                    text = _text(raw, settings.text_field)
                except Refused as refused:
                    yield BadRow(line, refused.reason)
                else:
                    yield from documents(text, line, settings.max_document_bytes)


def fields(path: str, settings: DataConfig) -> set[str]:
    """Names of the fields in the first rows that can be read."""
    found: set[str] = set()
    with open_text(path) as stream:
        for raw in islice(lines(stream, settings.max_line_bytes), _FIELD_ROWS):
            try:
                found.update(_row(raw or b""))
            except Refused:
                continue
    return found


def records(path: str, max_bytes: int, numbers: Collection[str] = ()) -> Iterator[Fields | BadRow]:
    """Whole objects, for tasks. ``numbers`` has no meaning here."""
    check_head(path)
    with open_text(path) as stream:
        for line, raw in enumerate(lines(stream, max_bytes), 1):
            if raw is None:
                yield BadRow(line, "over-long line")
            elif not raw.isspace():
                try:
                    yield Fields(_row(raw), line)
                except Refused as refused:
                    yield BadRow(line, refused.reason)


def _row(raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode())
    except UnicodeDecodeError:
        raise Refused("invalid utf-8") from None
    except (ValueError, RecursionError):  # also a number of too many digits, and nesting without end
        raise Refused("broken json") from None
    if not isinstance(row, dict):
        raise Refused("wrong type")
    return row


def _text(raw: bytes, field: str) -> str:
    value = _row(raw).get(field)
    if value is None:
        raise Refused("missing field")
    if not isinstance(value, str):
        raise Refused("wrong type")
    return value
