"""The text that comes with Python, for benches that read it themselves."""

from __future__ import annotations

from collections.abc import Iterator

from llmkit.config.compose import compose
from llmkit.data.readers.base import Document, chunks_of, read_chunk
from llmkit.settings import DataConfig


def embedded(*names: str) -> Iterator[str]:
    """The documents of ``python_docs`` or ``python_source``, in their order."""
    data = DataConfig(**compose("prepare", ["data=python_docs"], None).plain["data"])
    for chunk in chunks_of([f"builtin:{name}" for name in names], 1 << 24):
        yield from (row.text for row in read_chunk(chunk, data) if isinstance(row, Document))
