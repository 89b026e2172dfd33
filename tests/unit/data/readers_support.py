"""Reading files in tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llmkit.data.readers.base import BadRow, Document, chunks_of, read_chunk
from llmkit.settings import DataConfig

SETTINGS = DataConfig(
    path="",
    weights=None,
    val_path=None,
    val_fraction=0.01,
    old_val_path=None,
    text_field="text",
    max_document_bytes=1 << 20,
    max_line_bytes=1 << 20,
    max_bad_fraction=0.001,
    deduplicate=False,
    seq_len=64,
    n_workers=1,
    cache_dir=None,
)


def rows(path: Path | str, chunk_bytes: int = 1 << 20, **settings: Any) -> list[Document | BadRow]:
    data = replace(SETTINGS, **settings)
    return [row for chunk in chunks_of([str(path)], chunk_bytes) for row in read_chunk(chunk, data)]


def texts(path: Path | str, chunk_bytes: int = 1 << 20, **settings: Any) -> list[str]:
    return [row.text for row in rows(path, chunk_bytes, **settings) if isinstance(row, Document)]


def bad(path: Path | str, chunk_bytes: int = 1 << 20, **settings: Any) -> list[tuple[int, str]]:
    return [(row.line, row.reason) for row in rows(path, chunk_bytes, **settings) if isinstance(row, BadRow)]


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
