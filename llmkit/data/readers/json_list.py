"""JSON files that hold a list of objects, for tasks: ``[...]``, or an object around it such as ``{"data": [...]}``.

The whole file is held. Where an object holds several lists, the one called ``data`` or ``rows`` is read.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from llmkit.data.readers.records import BadRow, Fields
from llmkit.data.readers.streams import check_head, open_text
from llmkit.errors import DataError

SUFFIXES = (".json",)
COMPRESSED = True
RECORDS_ONLY = True
_USUAL = ("data", "rows")
_BLANK = " \t\r\n"


def records(path: str, max_bytes: int, numbers: Collection[str] = ()) -> Iterator[Fields | BadRow]:
    """The objects with the line at which each begins. ``max_bytes`` and ``numbers`` have no meaning here."""
    check_head(path)
    with open_text(path) as stream:
        raw = stream.read()
    try:
        text = raw.decode()
        items = _Walk(text, path).items()
    except UnicodeDecodeError as error:
        raise DataError("the file is not UTF-8", where=f"{path}: byte {error.start}", fix="convert it") from error
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}:{error.colno}"
        raise DataError(f"the JSON is broken: {error.msg}", where=where, fix="mend the file") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, or nesting without end
        raise DataError(f"the JSON cannot be read: {error}", where=path, fix="mend the file") from error
    for number, (line, item) in enumerate(items, 1):
        if isinstance(item, dict):
            yield Fields(_unwrapped(item), line, number)
        else:
            yield BadRow(line, "wrong type")


def _unwrapped(item: dict[str, Any]) -> dict[str, Any]:
    """The row alone, where a dataset viewer wrote its number beside it."""
    row = item.get("row")
    return row if "row_idx" in item and isinstance(row, dict) else item


class _Walk:
    """Goes through the outermost list or object only, so that the line of every item is known."""

    def __init__(self, text: str, path: str) -> None:
        self._text, self._path = text, path
        self._decode = json.JSONDecoder().raw_decode
        self._at = self._line_at = 0
        self._line = 1

    def items(self) -> list[tuple[int, Any]]:
        """(line, value) of every item of the list."""
        if not self._next():
            return []
        whole = self._next() == "["
        lists = {"": self._list()} if whole else self._object()
        if self._next() == "{" and not whole:
            what = "the file holds several objects, not one list"
            raise DataError(what, where=f"{self._path}:{self._number()}", fix="rename it to .jsonl, one object a line")
        if self._next():
            raise json.JSONDecodeError("more text after the end", self._text, self._at)
        return self._chosen(lists)

    def _next(self) -> str:
        """The next character that is not blank, without taking it; empty at the end."""
        while self._at < len(self._text) and self._text[self._at] in _BLANK:
            self._at += 1
        return self._text[self._at : self._at + 1]

    def _take(self, wanted: str) -> bool:
        """Takes the next character if it is ``wanted``."""
        found = self._next() == wanted
        self._at += found
        return found

    def _expect(self, wanted: str) -> None:
        if not self._take(wanted):
            raise json.JSONDecodeError(f"{wanted!r} is missing", self._text, self._at)

    def _value(self) -> Any:
        self._next()
        value, self._at = self._decode(self._text, self._at)
        return value

    def _number(self) -> int:
        """The line of the next value."""
        self._next()
        self._line += self._text.count("\n", self._line_at, self._at)
        self._line_at = self._at
        return self._line

    def _list(self) -> list[tuple[int, Any]]:
        self._expect("[")
        found: list[tuple[int, Any]] = []
        while not self._take("]"):
            if found:
                self._expect(",")
            found.append((self._number(), self._value()))
        return found

    def _object(self) -> dict[str, list[tuple[int, Any]]]:
        """The lists in an object."""
        self._expect("{")
        lists: dict[str, list[tuple[int, Any]]] = {}
        first = True
        while not self._take("}"):
            if not first:
                self._expect(",")
            first = False
            key = self._value()
            self._expect(":")
            if self._next() == "[":
                lists[key] = self._list()
            else:
                self._value()
        return lists

    def _chosen(self, lists: dict[str, list[tuple[int, Any]]]) -> list[tuple[int, Any]]:
        """The only list, or the one with a usual name."""
        names = [name for name in _USUAL if name in lists] or list(lists)
        if len(names) != 1:
            shown = ", ".join(map(repr, names)) or "none"
            what = f"the file is an object with {len(names)} lists ({shown}), not a list of records"
            raise DataError(what, where=self._path, fix='write [{...}, {...}] or {"data": [...]}, or JSON lines')
        return lists[names[0]]
