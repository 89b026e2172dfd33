"""What a reader yields, and the rules every text goes through whatever the format.

Rules for the text of one row or section:

* whitespace alone is ``empty``;
* U+0000 is refused (``control characters``); every other control character is kept;
* a lone surrogate, which no UTF-8 can hold, is ``invalid utf-8``;
* text longer than ``data.max_document_bytes`` is cut into sections, each a document of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Reason = Literal[
    "broken json",
    "missing field",
    "wrong type",
    "empty",
    "invalid utf-8",
    "control characters",
    "over-long line",
    "wrong column count",
]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of one source that is read on its own.

    ``start`` and ``end`` are byte offsets, row-group numbers (parquet), or places in the list of files (built-ins).
    """

    path: str
    start: int
    end: int
    reader: str  # module name in this package


@dataclass(frozen=True, slots=True)
class Document:
    """One document. ``line`` counts from 1 at the start of the chunk; ``base.absolute_line`` gives that of the file.

    ``cut``: the text goes on in the next document, because ``data.max_document_bytes`` or the chunk ended here.
    """

    text: str
    line: int
    cut: bool = False


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row, line or section that cannot be used; ``line`` as in ``Document``."""

    line: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Fields:
    """A record with all its fields, by column. ``line`` counts from 1 in the file; ``item`` in a list of records."""

    values: Mapping[str, Any]
    line: int
    item: int | None = None


class Refused(Exception):
    """A row that cannot be used; ends in a ``BadRow``."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


def cut_point(data: bytes, limit: int) -> int:
    """Where to cut ``data``, which is longer than ``limit``.

    After the last line end in the first ``limit`` bytes, else after the last ASCII whitespace, else before the UTF-8
    character that does not fit.
    """
    newline = data.rfind(b"\n", 0, limit)
    if newline >= 0:
        return newline + 1
    space = max(data.rfind(blank, 0, limit) for blank in (b" ", b"\t", b"\r"))
    if space >= 0:
        return space + 1
    for point in range(limit, max(limit - 4, 0), -1):
        if data[point] & 0xC0 != 0x80:  # not a continuation byte: a character starts here
            return point
    return limit


def refusal(text: str) -> Reason | None:
    """Why ``text`` cannot be a document."""
    if "\0" in text:
        return "control characters"
    if not text or text.isspace():
        return "empty"
    return None


def documents(text: str, line: int, limit: int) -> Iterator[Document | BadRow]:
    """The documents of one row's text, cut to ``limit`` bytes; all of them carry the row's line."""
    try:
        data = text.encode()
    except UnicodeEncodeError:
        yield BadRow(line, "invalid utf-8")
        return
    if (reason := refusal(text)) is not None:
        yield BadRow(line, reason)
    elif len(data) <= limit:
        yield Document(text, line)
    else:
        yield from _sections(data, line, limit)


def _sections(data: bytes, line: int, limit: int) -> Iterator[Document | BadRow]:
    start = 0
    while start < len(data):
        rest = data[start : start + limit + 1]
        size = len(rest) if len(rest) <= limit else cut_point(rest, limit)
        text = rest[:size].decode()
        start += size
        yield BadRow(line, "empty") if text.isspace() else Document(text, line, cut=start < len(data))
