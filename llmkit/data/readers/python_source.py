"""``builtin:python_source``: each source file of the standard library is a document."""

from __future__ import annotations

from collections.abc import Iterator

from llmkit.data.readers import stdlib
from llmkit.data.readers.records import BadRow, Chunk, Document, documents
from llmkit.settings import DataConfig

BUILTIN = "python_source"


def split(path: str, chunk_bytes: int) -> list[Chunk]:
    return stdlib.split(path, chunk_bytes, "python_source")


def read(chunk: Chunk, settings: DataConfig) -> Iterator[Document | BadRow]:
    """``line`` is the place of the file in the chunk. Files without text (package markers) are no documents."""
    for line, name in enumerate(stdlib.sources()[chunk.start : chunk.end], 1):
        if text := stdlib.source(name).strip("\n"):
            yield from documents(text + "\n", line, settings.max_document_bytes)
