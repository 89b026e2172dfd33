"""The sources of a preparation, and what decides its tokens."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.data.readers.base import BUILTIN_PREFIX, find_sources, fingerprint
from llmkit.data.sentences import VERSION as SENTENCES_VERSION
from llmkit.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmkit.settings import DataConfig

VERSION = 1  # raise when the same inputs give other tokens
CHUNK_BYTES = 16 << 20  # a chunk is read, and written as a shard, in one piece; plain text is cut where it ends
_COMPRESSED = {".gz": 4, ".zst": 4, ".parquet": 3}  # about how much text a byte holds


@dataclass(frozen=True)
class Source:
    """One item of ``data.path``, or everything behind ``data.val_path``."""

    label: str
    paths: list[str]
    n_ignored: int
    fingerprints: dict[str, str]
    is_val: bool = False

    def n_bytes(self) -> int:
        """About how much text it holds; embedded corpora, which are small, count nothing."""
        files = [path for path in self.paths if not path.startswith(BUILTIN_PREFIX)]
        return sum(_size(path) * _COMPRESSED.get(os.path.splitext(path)[1], 1) for path in files)


def _size(path: str) -> int:
    """0 for a file that is gone; whoever reads it says so."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def find(data: DataConfig) -> list[Source]:
    """The sources in the order of ``data.path``; the validation source, if any, comes last."""
    sources = [_source(item, item) for item in paths_of(data)]
    if data.val_path is not None:
        label = data.val_path if isinstance(data.val_path, str) else ", ".join(data.val_path)
        try:
            sources.append(_source(label, data.val_path, is_val=True))
        except DataError as error:
            error.where = error.where.replace("data.path", "data.val_path")
            raise
    return sources


def paths_of(data: DataConfig) -> list[str]:
    """The items of ``data.path``: one source each."""
    return [data.path] if isinstance(data.path, str) else list(data.path)


def _source(label: str, path: str | list[str], is_val: bool = False) -> Source:
    found = find_sources(path if isinstance(path, str) else list(path))
    return Source(label, found.paths, found.n_ignored, {name: fingerprint(name) for name in found.paths}, is_val)


def inputs_of(
    data: DataConfig, sources: list[Source], tokenizer: Mapping[str, Any], *, sentences: bool
) -> dict[str, Any]:
    """Everything that decides what is written: settings, tokenizer, and the files in their order."""
    names = ["val" if source.is_val else str(number) for number, source in enumerate(sources)]
    files = [{_absolute(path): mark for path, mark in source.fingerprints.items()} for source in sources]
    return {
        "version": VERSION,
        "chunk_bytes": CHUNK_BYTES,
        "data": {
            "text_field": data.text_field,
            "max_document_bytes": data.max_document_bytes,
            "max_line_bytes": data.max_line_bytes,
            "val_fraction": data.val_fraction,
            "deduplicate": data.deduplicate,
        },
        "tokenizer": dict(tokenizer),
        "files": dict(zip(names, files, strict=True)),
        **({"sentences": SENTENCES_VERSION} if sentences else {}),
    }


def identity_of(data: DataConfig) -> list[str]:
    """What makes two preparations comparable: the same items of ``data.path``."""
    return [_absolute(item) for item in paths_of(data)]


def _absolute(path: str) -> str:
    return path if path.startswith(BUILTIN_PREFIX) else os.path.abspath(os.path.expanduser(path))
