"""The source files of the running interpreter's standard library: the embedded corpus behind ``builtin:`` paths.

Files are only read and parsed, never imported. Tests, installed packages, build settings of this machine and the help
topics (which are data) are left out.
"""

from __future__ import annotations

import os
import sysconfig
import tokenize
from functools import cache
from pathlib import Path

from llmkit.data.readers.records import Chunk
from llmkit.errors import DataError

_SKIPPED_FOLDERS = {
    "__pycache__", "site-packages", "dist-packages", "pydoc_data", "test", "tests", "idle_test", "_bundled",
}  # fmt: skip
_PARSED_BYTES = 1 << 20  # source bytes a chunk: small, so that parsing spreads over the cores


def folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@cache
def sources() -> tuple[str, ...]:
    """Paths relative to ``folder()``, with forward slashes, sorted by code point."""
    found: list[str] = []
    for here, folders, files in os.walk(folder()):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        found += [Path(here, name).relative_to(folder()).as_posix() for name in files if _wanted(name)]
    if not found:
        raise DataError(
            "this Python comes without the source of its library",
            where=str(folder()),
            fix="set data.path to text of your own",
        )
    return tuple(sorted(found))


def _wanted(name: str) -> bool:
    return (
        name.endswith(".py")
        and not name.startswith(("test_", "_test", "_sysconfigdata"))
        and not name.endswith("_test.py")
    )


def split(path: str, chunk_bytes: int, reader: str) -> list[Chunk]:
    """Runs of files, by their places in ``sources()``."""
    limit = min(chunk_bytes, _PARSED_BYTES)
    names = sources()
    chunks: list[Chunk] = []
    start = held = 0
    for place, name in enumerate(names, 1):
        held += (folder() / name).stat().st_size
        if held >= limit or place == len(names):
            chunks.append(Chunk(path, start, place, reader))
            start, held = place, 0
    return chunks


def source(name: str) -> str:
    """The text of one file, in the encoding it declares."""
    try:
        with tokenize.open(folder() / name) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise DataError(
            f"a file of Python's library cannot be read: {error}",
            where=str(folder() / name),
            fix="set data.path to text of your own",
        ) from error
