"""Finds sources and reads them in chunks, whatever their format.

A reader is a module of this package with ``SUFFIXES`` (``COMPRESSED = True`` adds .gz and .zst) or ``BUILTIN``, the
name of an embedded corpus, and two functions::

    split(path: str, chunk_bytes: int) -> list[Chunk]
    read(chunk: Chunk, settings: DataConfig) -> Iterator[Document | BadRow]

It is found by its place in this folder. Optional: ``first_line(chunk)``, the line of the file at which a chunk starts;
``fields(path, settings)``, the names of the fields in the first rows; and, for tasks, whose rows have several fields::

    records(path: str, max_bytes: int, numbers: Collection[str]) -> Iterator[Fields | BadRow]

``numbers`` are columns that were asked for by number, in tables without a header. A module with ``RECORDS_ONLY = True``
has ``SUFFIXES`` and ``records`` and nothing else: text is never read from its files.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import os
import pkgutil
import platform
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import cast

from llmkit.data.readers.records import BadRow, Chunk, Document, Fields, Reason
from llmkit.data.readers.streams import COMPRESSIONS, open_file
from llmkit.errors import DataError
from llmkit.settings import DataConfig

__all__ = [
    "BadRow",
    "Chunk",
    "Document",
    "Fields",
    "Found",
    "Reason",
    "absolute_line",
    "chunks_of",
    "expand_paths",
    "fields_found",
    "find_sources",
    "fingerprint",
    "read_chunk",
    "read_file_records",
]

BUILTIN_PREFIX = "builtin:"
FORMAT_VERSION = 1  # raise when any reader yields other documents for the same bytes: a part of every fingerprint
_EDGE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Found:
    """The sources behind a ``data.path``, in a fixed order, and how many files in folders had no known suffix."""

    paths: list[str]
    n_ignored: int


@cache
def _readers(*, records: bool) -> dict[str, ModuleType]:
    """Reader modules by suffix (``.txt``) or built-in name (``builtin:python_docs``): of text, or of ``records``."""
    found: dict[str, ModuleType] = {}
    package = importlib.import_module(__package__ or "llmkit.data.readers")
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        if hasattr(module, "records") if records else not hasattr(module, "RECORDS_ONLY"):
            found.update(dict.fromkeys(getattr(module, "SUFFIXES", ()), module))
            if hasattr(module, "BUILTIN"):
                found[BUILTIN_PREFIX + module.BUILTIN] = module
    return found


def _module_of(path: str, *, records: bool = False) -> ModuleType | None:
    readers = _readers(records=records)
    if path.startswith(BUILTIN_PREFIX):
        return readers.get(path)
    name = path.lower()
    stem, compression = os.path.splitext(name)
    suffix = os.path.splitext(stem)[1] if compression in COMPRESSIONS else compression
    module = readers.get(suffix)
    if compression in COMPRESSIONS and not getattr(module, "COMPRESSED", False):
        return None
    return module


def _known(*, records: bool = False) -> str:
    return ", ".join(sorted(_readers(records=records)))


def find_sources(path: str | list[str], *, records: bool = False) -> Found:
    """Files behind a file, folder, glob, built-in name, or a list of these; of text, or of ``records``.

    Folders are searched recursively through symbolic links, each real folder once. In folders and globs, hidden names
    and unknown suffixes are ignored and counted. Raises ``DataError`` when nothing is found or a named file has no
    reader.
    """
    entries = [path] if isinstance(path, str) else path
    found = [_expand(entry, records=records) for entry in entries]
    paths = [name for one in found for name in one.paths]
    if not paths:
        raise DataError("data.path names no source", where="data.path", fix="give a file, a folder or a glob")
    return Found(paths, sum(one.n_ignored for one in found))


def expand_paths(path: str | list[str]) -> list[str]:
    """The paths of ``find_sources``."""
    return find_sources(path).paths


def _expand(entry: str, *, records: bool) -> Found:
    if entry.startswith(BUILTIN_PREFIX):
        if _module_of(entry, records=records) is None:
            fix = f"known are {_known(records=records)}"
            raise DataError(f"there is no built-in corpus {entry!r}", where="data.path", fix=fix)
        return Found([entry], 0)
    name = os.path.expanduser(entry)
    if os.path.isdir(name):
        return _some([name], name, records=records)
    if os.path.lexists(name):
        return Found([_checked(name, records=records)], 0)
    matches = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else []
    if not matches:
        fix = f"check the spelling; relative paths start at {os.getcwd()}"
        raise DataError(f"nothing is found at {entry!r}", where="data.path", fix=fix)
    return _some(matches, name, records=records)


def _checked(name: str, *, records: bool = False) -> str:
    if _module_of(name, records=records) is None:
        known = _known(records=records)
        fix = f"known are {known}, text formats also with .gz or .zst; rename the file or convert it"
        raise DataError(f"no reader for {os.path.basename(name)!r}", where=name, fix=fix)
    return name


def _some(names: list[str], where: str, *, records: bool) -> Found:
    """Everything that can be read among files and in folders; an error when there is nothing."""
    paths: list[str] = []
    seen: set[str] = set()
    ignored = sum(_collect(name, paths, seen, records=records) for name in names)
    if not paths:
        what = f"there is no file that can be read ({ignored} ignored)"
        raise DataError(what, where=where, fix=f"known are {_known(records=records)}")
    return Found(sorted(set(paths)), ignored)  # a ** glob names a folder and what is in it


def _collect(name: str, paths: list[str], seen: set[str], *, records: bool) -> int:
    """Appends a file, or those of a folder not ``seen`` before, to ``paths``; the number of ignored ones."""
    if not os.path.isdir(name):
        known = _module_of(name, records=records) is not None
        paths += [name] if known else []
        return int(not known)
    real = os.path.realpath(name)
    if real in seen:
        return 0
    seen.add(real)
    try:
        inside = os.listdir(name)
    except OSError as error:
        raise DataError(f"the folder cannot be read: {error.strerror}", where=name) from error
    visible = [os.path.join(name, entry) for entry in inside if not entry.startswith(".")]
    return len(inside) - len(visible) + sum(_collect(path, paths, seen, records=records) for path in visible)


def fingerprint(path: str) -> str:
    """SHA-256 that changes when the source does: size, modification time, first and last 64 KiB; for a built-in, the
    Python version, whose library it is."""
    digest = hashlib.sha256(f"{FORMAT_VERSION}:".encode())
    if path.startswith(BUILTIN_PREFIX):
        digest.update(f"{path}:{platform.python_implementation()}:{platform.python_version()}".encode())
        return digest.hexdigest()
    with open_file(path) as file:
        stat = os.fstat(file.fileno())
        digest.update(f"{stat.st_size}:{stat.st_mtime_ns}:".encode())
        digest.update(file.read(_EDGE_BYTES))
        file.seek(max(0, stat.st_size - _EDGE_BYTES))
        digest.update(file.read(_EDGE_BYTES))
    return digest.hexdigest()


def chunks_of(paths: Iterable[str], chunk_bytes: int) -> list[Chunk]:
    """The chunks of all sources in order. Looks at the head of every file: one in a foreign encoding or with the wrong
    suffix raises ``DataError`` here, before any work is spread over processes."""
    chunks: list[Chunk] = []
    for path in paths:
        module = _module_of(path)
        if module is None:
            _checked(path)
        else:
            chunks += module.split(path, chunk_bytes)
    return chunks


def read_chunk(chunk: Chunk, data: DataConfig) -> Iterator[Document | BadRow]:
    """Documents and bad rows of one chunk, in order. Uses of ``data``: ``text_field``, ``max_document_bytes``,
    ``max_line_bytes``."""
    module = importlib.import_module(f"{__package__}.{chunk.reader}")
    return cast("Iterator[Document | BadRow]", module.read(chunk, data))


def read_file_records(path: str, max_bytes: int, numbers: Collection[str]) -> Iterator[Fields | BadRow]:
    """Records and bad rows of one file, in order; ``line`` is that of the file. ``max_bytes``: of a line or row.

    Raises ``DataError`` for a file that cannot be read as a whole.
    """
    module = _module_of(_checked(path, records=True), records=True)
    assert module is not None
    return cast("Iterator[Fields | BadRow]", module.records(path, max_bytes, numbers))


def absolute_line(chunk: Chunk, line: int) -> int:
    """The line (row) of the file for a ``line`` that counts from the start of ``chunk``.

    Reads the file up to the chunk: for the few lines shown to a user, not for all.
    """
    module = importlib.import_module(f"{__package__}.{chunk.reader}")
    first = module.first_line(chunk) if hasattr(module, "first_line") else 1
    return int(first) + line - 1


def fields_found(path: str, data: DataConfig) -> list[str]:
    """Names of the fields in the first rows of a source: what to offer when ``data.text_field`` is in none."""
    module = _module_of(path)
    return sorted(module.fields(path, data)) if module is not None and hasattr(module, "fields") else []
