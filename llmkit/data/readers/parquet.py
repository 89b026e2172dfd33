"""Parquet tables: the text is in the string column ``data.text_field``. Needs the extra ``parquet``."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from llmkit.data.readers.records import BadRow, Chunk, Document, Fields, documents
from llmkit.data.readers.streams import open_file
from llmkit.errors import DataError, missing_extra
from llmkit.settings import DataConfig

SUFFIXES = (".parquet",)
_BATCH_ROWS = 256


def split(path: str, chunk_bytes: int) -> list[Chunk]:
    """Runs of whole row groups, of about ``chunk_bytes`` uncompressed."""
    with _Opened(path) as table:
        sizes = [table.metadata.row_group(i).total_byte_size for i in range(table.metadata.num_row_groups)]
    chunks: list[Chunk] = []
    start = held = 0
    for group, size in enumerate(sizes, 1):
        held += size
        if held >= chunk_bytes or group == len(sizes):
            chunks.append(Chunk(path, start, group, "parquet"))
            start, held = group, 0
    return chunks


def read(chunk: Chunk, settings: DataConfig) -> Iterator[Document | BadRow]:
    """Holds one batch of rows. ``line`` is the row of the chunk."""
    field = settings.text_field
    with _Opened(chunk.path) as table:
        _check_column(table, field, chunk.path)
        groups = list(range(chunk.start, chunk.end))
        batches = table.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups, columns=[field], use_threads=False)
        row = 0
        for batch in _guarded(batches, chunk.path):
            for value in batch.column(0):
                row += 1
                yield from _documents(value, row, settings.max_document_bytes)


def records(path: str, max_bytes: int, numbers: Collection[str] = ()) -> Iterator[Fields | BadRow]:
    """Whole rows, for tasks; ``line`` is the row, from 1. A row that is no UTF-8 is a bad one, so rows are converted
    one by one. ``max_bytes`` and ``numbers`` have no meaning here."""
    with _Opened(path) as table:
        names = table.schema_arrow.names
        row = 0
        for batch in _guarded(table.iter_batches(batch_size=_BATCH_ROWS, use_threads=False), path):
            for values in zip(*batch.columns, strict=True):
                row += 1
                try:
                    yield Fields({name: value.as_py() for name, value in zip(names, values, strict=True)}, row)
                except UnicodeDecodeError:
                    yield BadRow(row, "invalid utf-8")


def first_line(chunk: Chunk) -> int:
    """The row of the file at which a chunk starts, from 1."""
    with _Opened(chunk.path) as table:
        return 1 + sum(int(table.metadata.row_group(i).num_rows) for i in range(chunk.start))


def fields(path: str, settings: DataConfig) -> list[str]:
    """The columns."""
    with _Opened(path) as table:
        return list(table.schema_arrow.names)


class _Opened:
    """A ``pyarrow.parquet.ParquetFile`` whose failures are ``DataError``."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> Any:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise missing_extra("pyarrow", "parquet") from None
        self._file = open_file(self._path)
        try:
            return pyarrow.parquet.ParquetFile(self._file)
        except (pyarrow.ArrowException, OSError) as error:
            self._file.close()
            raise _damaged(self._path, error) from error

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _guarded(batches: Iterator[Any], path: str) -> Iterator[Any]:
    import pyarrow

    try:
        yield from batches
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> DataError:
    return DataError(f"no readable parquet file: {str(error)[:200]}", where=path, fix="write the file again")


def _check_column(table: Any, field: str, path: str) -> None:
    from pyarrow import types

    schema = table.schema_arrow
    if schema.names.count(field) != 1:
        columns = ", ".join(map(repr, schema.names))[:400]
        fix = f"set data.text_field to one of {columns}"
        raise DataError(f"there is no single column {field!r}", where=path, fix=fix)
    kind = schema.field(field).type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise DataError(f"column {field!r} holds {kind}, not text", where=path, fix="choose a string column")


def _documents(value: Any, row: int, limit: int) -> Iterator[Document | BadRow]:
    try:
        text = value.as_py()
    except UnicodeDecodeError:
        yield BadRow(row, "invalid utf-8")
        return
    if text is None:
        yield BadRow(row, "missing field")
    else:
        yield from documents(text, row, limit)
