"""Demo sets: small data for every task, behind ``builtin:<name>``. See the README beside this file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from llmkit.data.demo import library
from llmkit.data.readers.base import BUILTIN_PREFIX, Fields, read_file_records
from llmkit.errors import DataError

Found = tuple[Mapping[str, Any], str]  # the fields of a record, and where it stands, for messages

_MAX_LINE_BYTES = 1 << 20


def records(name: str) -> Iterator[Found]:
    """The records of a demo set in a fixed order, each with ``place:line``.

    ``name`` is a task's name, or ``qa_v2``: ``qa`` has the questions that have an answer, ``qa_v2`` all of them. Raises
    DataError for another name.
    """
    if name not in _SETS:
        fix = f"known are {', '.join(BUILTIN_PREFIX + known for known in _SETS)}"
        raise DataError(f"there is no demo set {BUILTIN_PREFIX + name!r}", where="data.path", fix=fix)
    return ((fields, f"{BUILTIN_PREFIX}{name}{place}") for fields, place in _SETS[name]())


def _file(name: str) -> Iterator[Found]:
    """The records of a file beside this one."""
    for found in read_file_records(str(Path(__file__).with_name(name)), _MAX_LINE_BYTES, ()):
        if not isinstance(found, Fields):
            raise DataError(f"line {found.line}: {found.reason}", where=f"llmkit/data/demo/{name}", fix="install again")
        yield found.values, f":{found.line}"


def _answerable() -> Iterator[Found]:
    """The articles with the questions that have an answer."""
    for article, place in _file("qa.jsonl"):
        paragraphs = [
            {**paragraph, "qas": [asked for asked in paragraph["qas"] if not asked["is_impossible"]]}
            for paragraph in article["paragraphs"]
        ]
        yield {**article, "paragraphs": paragraphs}, place


_SETS: dict[str, Callable[[], Iterator[Found]]] = {
    "sentiment": partial(_file, "sentiment.jsonl"),
    "qa": _answerable,
    "qa_v2": partial(_file, "qa.jsonl"),
    "summarization": library.summaries,
    "translation": partial(_file, "translation.tsv"),
    "code": library.functions,
    "chat": partial(_file, "chat.jsonl"),
}
