"""Comma- and tab-separated tables with a header row and the quotes of RFC 4180; the text is in ``data.text_field``."""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from typing import Any, BinaryIO

from llmkit.data.readers.records import BadRow, Chunk, Document, Fields, documents
from llmkit.data.readers.streams import check_head, compression_of, lines, open_chunk, open_text
from llmkit.errors import DataError
from llmkit.settings import DataConfig

SUFFIXES = (".csv", ".tsv")
COMPRESSED = True
_STRICT: dict[str, Any] = {"strict": True}
_PLAIN: dict[str, Any] = {"quoting": csv.QUOTE_NONE}


def split(path: str, chunk_bytes: int) -> list[Chunk]:
    """One chunk: a quoted field may hold line ends, so where rows begin is known from the start of the file only."""
    check_head(path)
    size = os.path.getsize(path)
    return [Chunk(path, 0, size, "delimited")] if size else []


def read(chunk: Chunk, settings: DataConfig) -> Iterator[Document | BadRow]:
    """Holds one row of at most ``data.max_line_bytes``. A quote that is never closed is an error, not a long text."""
    with open_chunk(chunk) as stream:
        table = _Table(stream, chunk.path, settings.max_line_bytes)
        header = table.header()
        column = _column(header, settings.text_field, chunk.path) if header else 0
        for row in table:
            if not row:
                continue  # a blank line
            if len(row) != len(header):
                yield BadRow(table.row_line, "wrong column count")
            else:
                yield from documents(row[column], table.row_line, settings.max_document_bytes)


def fields(path: str, settings: DataConfig) -> list[str]:
    """The columns."""
    with open_text(path) as stream:
        return _Table(stream, path, settings.max_line_bytes).header()


def records(path: str, max_bytes: int, numbers: Collection[str] = ()) -> Iterator[Fields | BadRow]:
    """Whole rows, for tasks. Columns asked for by number that are no names in the header mean that there is none: the
    columns are then called ``1``, ``2`` and so on.

    Many .tsv files have no quotes by rule: in one that breaks the rules of quotes, they are characters like others.
    """
    check_head(path)
    with open_text(path) as stream:
        table = _Table(stream, path, max_bytes, _STRICT if _keeps_to_quotes(path, max_bytes) else _PLAIN)
        names = table.header()
        rows: Iterator[tuple[int, list[str]]] = ((table.row_line, row) for row in table)
        if not set(numbers) <= set(names):
            rows = chain([(table.row_line, names)], rows)
            names = [str(number) for number, _ in enumerate(names, 1)]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"column {repeated[0]!r} appears twice", where=f"{path}:1", fix="rename one of them")
        for line, row in rows:
            if row and len(row) != len(names):
                yield BadRow(line, "wrong column count")
            elif row:
                yield Fields(dict(zip(names, row, strict=True)), line)


def _keeps_to_quotes(path: str, max_bytes: int) -> bool:
    """False for a .tsv in which text stands behind a closing quote, or a quote is open at the end, or swallows the rest
    of a row."""
    if not _has_tabs(path):
        return True
    with open_text(path) as stream:
        table = _Table(stream, path, max_bytes, _STRICT)
        try:
            n_columns = len(table.header())
            return not any(len(row) not in (0, n_columns) and any("\n" in field for field in row) for row in table)
        except DataError:
            return False


def _has_tabs(path: str) -> bool:
    return os.path.splitext(path.lower().removesuffix(compression_of(path)))[1] == ".tsv"


def _column(header: list[str], field: str, path: str) -> int:
    if header.count(field) == 1:
        return header.index(field)
    what = f"there is no column {field!r}" if field not in header else f"column {field!r} appears twice"
    columns = ", ".join(map(repr, header))[:400]
    raise DataError(what, where=f"{path}:1", fix=f"set data.text_field to one of {columns}")


class _Table:
    """Rows of a stream, with the line at which each begins. Bytes that are no UTF-8 come out as lone surrogates, which
    ``records.documents`` refuses."""

    def __init__(self, stream: BinaryIO, path: str, limit: int, rules: Mapping[str, Any] | None = None) -> None:
        """``rules``: further arguments of ``csv.reader``."""
        self.row_line, self._path, self._limit = 1, path, limit
        self._stream = stream
        self._line, self._row_bytes, self._ended = 0, 0, False
        # a limit of the whole process; a higher one harms nobody, since rows are bounded here
        csv.field_size_limit(max(csv.field_size_limit(), limit))
        self._reader = csv.reader(self._lines(), delimiter="\t" if _has_tabs(path) else ",", **rules or {})

    def header(self) -> list[str]:
        """The first row that is not blank."""
        return next((row for row in self if row), [])

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        self.row_line, self._row_bytes = self._line + 1, 0
        try:
            row = next(self._reader)
        except csv.Error as error:
            raise self._error(f"the row cannot be read ({error})") from error
        if self._ended and self._row_bytes:
            raise self._error("a quoted field is still open at the end of the file")
        return row

    def _lines(self) -> Iterator[str]:
        for raw in lines(self._stream, self._limit):
            self._line += 1
            self._row_bytes += self._limit + 1 if raw is None else len(raw)
            if raw is None or self._row_bytes > self._limit:
                raise self._error(f"the row is longer than data.max_line_bytes ({self._limit})")
            yield raw.decode(errors="surrogateescape")
        self._ended = True

    def _error(self, what: str) -> DataError:
        fix = "close the quote that opens in this row, or raise data.max_line_bytes"
        return DataError(what, where=f"{self._path}:{self.row_line}", fix=fix)
