"""Records of a task's files: their fields, where each stands, and which column is which.

Records come from JSON lines, a JSON list, tables (csv, tsv, parquet), lines of plain text (column ``text``), or two
line-aligned text files (columns ``source`` and ``target``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from llmkit.data.readers.base import BUILTIN_PREFIX, Fields, find_sources, read_file_records
from llmkit.data.readers.txt import records as text_lines
from llmkit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from llmkit.data.readers.base import BadRow
    from llmkit.settings import TaskDataConfig

MAX_RECORD_BYTES = 64 << 20  # of a line or a row; a longer one is a bad record
N_PLACES = 3  # first places that are kept of every kind of fault
_MAX_INNER = 16  # an object with more keys is a table of its own, not a group of columns
_TABLES = (".csv", ".tsv")


@dataclass(frozen=True, slots=True)
class Record:
    """One record: its values by column, and ``file:line`` for messages."""

    fields: Mapping[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be read, and why."""

    reason: str
    where: str


@dataclass
class Faults:
    """What could not be used: how often each reason, and the first places of each."""

    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)  # at most N_PLACES a reason

    def add(self, reason: str, where: str) -> None:
        """Count one."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < N_PLACES:
            places.append(where)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def lines(self) -> list[str]:
        """A line for each reason, the most frequent first: ``12 empty target (first: reviews.jsonl:7)``."""
        ordered = sorted(self.counts.items(), key=lambda item: -item[1])
        return [f"{count:,} {reason} (first: {', '.join(self.places[reason])})" for reason, count in ordered]


def read_records(
    path: str | list[str], target_path: str | None, settings: TaskDataConfig
) -> Iterator[Record | BadRecord]:
    """The records of a file, folder, glob, ``builtin:`` demo set, or list of these, in order.

    With ``target_path`` line n of ``path`` belongs to line n of it. Of ``settings`` only ``columns`` is read: numbers
    in it say that a table has no header. Raises DataError for a file that cannot be read as a whole.
    """
    if target_path is not None:
        found = _aligned(path, target_path)
    else:
        numbers = {str(column) for column in settings.columns.values() if str(column).isdigit()}
        found = _all_files([path] if isinstance(path, str) else path, numbers)
    for record in found:
        reason = _refusal(record.fields) if isinstance(record, Record) else None
        yield record if reason is None else BadRecord(reason, record.where)


def _all_files(entries: Sequence[str], numbers: Collection[str]) -> Iterator[Record | BadRecord]:
    for entry in entries:
        if entry.startswith(BUILTIN_PREFIX):
            yield from _demo(entry.removeprefix(BUILTIN_PREFIX))
            continue
        for path in find_sources(entry, records=True).paths:
            for found in read_file_records(path, MAX_RECORD_BYTES, numbers):
                yield _placed(found, path)


def _demo(name: str) -> Iterator[Record]:
    from llmkit.data.demo import records

    for fields, where in records(name):
        yield Record(fields, where)


def _placed(found: Fields | BadRow, path: str) -> Record | BadRecord:
    where = f"{path}:{found.line}"
    if not isinstance(found, Fields):
        return BadRecord(found.reason, where)
    return Record(found.values, where if found.item is None else f"{where}, item {found.item}")


def _aligned(path: str | list[str], target_path: str) -> Iterator[Record | BadRecord]:
    if not isinstance(path, str):
        fix = "join the files, or give both texts as columns of a table"
        raise ConfigError("line-aligned files are one file on each side", where="data.path", fix=fix)
    sides = (text_lines(name, MAX_RECORD_BYTES) for name in (path, target_path))
    n_lines = [0, 0]
    for source, target in zip_longest(*sides):
        n_lines[0] += source is not None
        n_lines[1] += target is not None
        if source is not None and target is not None:
            yield _joined(_placed(source, path), _placed(target, target_path))
    if n_lines[0] != n_lines[1]:
        what = f"{path} has {n_lines[0]:,} lines, {target_path} has {n_lines[1]:,}"
        raise DataError(what, where="data.target_path", fix="give files whose lines belong together")


def _joined(source: Record | BadRecord, target: Record | BadRecord) -> Record | BadRecord:
    """Two lines as one record."""
    if isinstance(source, BadRecord):
        return source
    if isinstance(target, BadRecord):
        return target
    return Record({"source": source.fields["text"], "target": target.fields["text"]}, source.where)


def _refusal(fields: Mapping[str, Any]) -> str | None:
    """Why no text of a record can be trusted."""
    for text in _texts(fields):
        if "\0" in text:
            return "control characters"
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a character
            return "invalid utf-8"
    return None


def _texts(value: Any) -> Iterator[str]:
    """Every string in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def columns_in(records: Iterable[Record]) -> list[str]:
    """The columns of any record, in the order in which they first appear; ``a.b`` for the inside of an object."""
    seen: dict[str, None] = {}
    for record in records:
        for name, value in record.fields.items():
            seen[name] = None
            if isinstance(value, Mapping) and len(value) <= _MAX_INNER:
                seen.update(dict.fromkeys(f"{name}.{inner}" for inner in value))
    return list(seen)


def column_value(fields: Mapping[str, Any], column: str) -> Any:
    """What stands in a column of ``columns_in``; None where the record does not have it."""
    if column in fields:
        return fields[column]
    outer, _, inner = column.partition(".")
    value = fields.get(outer)
    return value.get(inner) if inner and isinstance(value, Mapping) else None


def match_columns(
    roles: Mapping[str, tuple[str, ...]],
    optional: Collection[str],
    present: Sequence[str],
    overrides: Mapping[str, str],
    where: str = "data.path",
) -> dict[str, str]:
    """Which column of ``present`` has which role: what ``overrides`` says, else the usual spellings in ``roles``.

    Capitals do not matter, nor does ``-`` or a blank for ``_``. A column called like the role, or by its first
    spelling, goes before the other spellings; several that are equally good are an error, as is a role that no column
    has, unless it is in ``optional``. Raises ConfigError for a role that the task does not have, DataError otherwise.
    """
    found = {role: _override(roles, role, str(column), present, where) for role, column in overrides.items()}
    free = [column for column in present if column not in found.values()]
    order = sorted((role for role in roles if role not in found), key=lambda role: role in optional)
    for names_of in (_usual, _other):  # so that no role takes the column that is called like another role
        for role in order:
            column = None if role in found else _only(role, names_of(role, roles[role]), free, where)
            if column is not None:
                found[role] = column
                free.remove(column)
    missing = [role for role in order if role not in found and role not in optional]
    if missing:
        names = " and ".join(map(repr, missing))
        fix = f"say which it is: {' '.join(f'data.columns.{role}=...' for role in missing)}"
        what = f"no column for {names}; there are {_listed(present)}"
        marks = (
            [mark for mark in ";\t|," if mark in present[0]] if len(present) == 1 and where.endswith(_TABLES) else []
        )
        for mark in marks:
            fix = f"the columns seem to be parted by {mark!r}: write the table with commas as .csv or with tabs as .tsv"
            raise DataError(what, where=where, fix=fix)
        raise DataError(what, where=where, fix=fix + _no_header(where, missing))
    return {role: found[role] for role in roles if role in found}


def _override(roles: Mapping[str, Any], role: str, column: str, present: Sequence[str], where: str) -> str:
    if role not in roles:
        what = f"the task has no column for {role!r}"
        raise ConfigError(what, where=f"data.columns.{role}", fix=f"it has {', '.join(roles)}")
    same = [name for name in present if name == column] or [name for name in present if _plain(name) == _plain(column)]
    if len(same) != 1:
        what = f"there is no column {column!r}; there are {_listed(present)}"
        raise DataError(what, where=where, fix=f"correct data.columns.{role}={column}")
    return same[0]


def _usual(role: str, spellings: Sequence[str]) -> set[str]:
    return {_plain(name) for name in (role, *spellings[:1])}


def _other(role: str, spellings: Sequence[str]) -> set[str]:
    return {_plain(name) for name in spellings[1:]}


def _only(role: str, names: Collection[str], free: Sequence[str], where: str) -> str | None:
    """The one column with any of these names, None without one."""
    columns = [column for column in free if _plain(column) in names]
    if len(columns) > 1:
        what = f"{' and '.join(map(repr, columns))} may both be {role!r}; there are {_listed(free)}"
        raise DataError(what, where=where, fix=f"say which it is: data.columns.{role}={columns[0]}")
    return columns[0] if columns else None


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def _listed(columns: Sequence[str]) -> str:
    shown = ", ".join(column if len(column) <= 40 else f"{column[:40]}..." for column in columns)
    return f"the columns {shown[:600]}" if columns else "no columns"


def _no_header(where: str, missing: Sequence[str]) -> str:
    """The advice for a table that may have no header."""
    if not where.endswith(_TABLES):
        return ""
    numbered = " ".join(f"data.columns.{role}={number}" for number, role in enumerate(missing, 1))
    return f"; in a table without a header by number: {numbered}"
