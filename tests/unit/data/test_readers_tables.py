"""csv, tsv and parquet, against Python's csv module and pyarrow."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.readers.base import absolute_line, chunks_of, fields_found, read_chunk
from llmkit.errors import DataError, SetupError
from tests.unit.data.readers_support import SETTINGS, bad, rows, texts, write

FIELD = st.text(st.sampled_from("ab ,\t\"'\né😀"), max_size=30)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@settings(derandomize=True, max_examples=80, deadline=None)
@given(table=st.lists(st.tuples(FIELD, FIELD), max_size=10), line_end=st.sampled_from(["\n", "\r\n"]))
def test_what_csv_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, table: list[tuple[str, str]], line_end: str
) -> None:
    out = io.StringIO()
    writer = csv.writer(out, delimiter="\t" if suffix == ".tsv" else ",", lineterminator=line_end)
    writer.writerows([("id", "text"), *table])
    path = write(tmp_path_factory.mktemp("csv") / f"a{suffix}", out.getvalue())
    assert texts(path) == [text for _, text in table if text.strip()]
    assert len(bad(path)) == sum(not text.strip() for _, text in table)


def test_bad_rows_of_a_table_are_named_by_their_first_line(tmp_path: Path) -> None:
    content = b'id,text\n1,"two\nlines"\n2\n3,a,b\n\n4,\xff\n5,\x00\n6,\n7,good\n'
    path = write(tmp_path / "a.csv", content)
    assert texts(path) == ["two\nlines", "good"]
    assert [row.line for row in rows(path) if hasattr(row, "text")] == [2, 9 + 1]
    assert bad(path) == [
        (4, "wrong column count"),
        (5, "wrong column count"),
        (7, "invalid utf-8"),
        (8, "control characters"),
        (9, "empty"),
    ]


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        ('text\nfine\n"open\nto the end\n', 3, "still open"),
        ('text\nfine\n"open' + "\nmore" * 2000, 3, "longer than data.max_line_bytes"),
        ("text\nfine\n" + "x" * 5000, 3, "longer than data.max_line_bytes"),
        ("text\rfine\rmore\r", 1, "cannot be read"),
        ("id,body\n1,a\n", 1, "no column 'text'"),
        ("text,text\na,b\n", 1, "twice"),
    ],
)
def test_a_table_that_cannot_be_read_says_where(tmp_path: Path, content: str, line: int, what: str) -> None:
    path = write(tmp_path / "a.csv", content)
    with pytest.raises(DataError, match=what) as caught:
        rows(path, max_line_bytes=1024)
    assert caught.value.where == f"{path}:{line}"
    assert caught.value.fix


def test_missing_column_lists_the_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,body\n1,a\n")
    with pytest.raises(DataError, match="'id', 'body'"):
        rows(path)
    assert fields_found(str(path), SETTINGS) == ["body", "id"]


def test_a_long_field_is_read_and_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text\n" + "x" * 300_000 + "\n")  # above the csv module's own limit of 131,072
    assert [len(text) for text in texts(path, max_document_bytes=200_000)] == [200_000, 100_000]


def test_header_alone_is_nothing(tmp_path: Path) -> None:
    assert rows(write(tmp_path / "a.csv", "id,text\n")) == []


def _parquet(path: Path, table: dict[str, Any], **options: Any) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(table), str(path), **options)
    return path


def test_parquet_in_chunks_of_row_groups(tmp_path: Path) -> None:
    values = [f"document {n}" for n in range(1000)] + [None, "", "a\0b", "x" * 200]
    path = _parquet(tmp_path / "a.parquet", {"id": range(1004), "text": values}, row_group_size=100)
    chunks = chunks_of([str(path)], 3000)
    assert len(chunks) > 2
    assert [chunk.start for chunk in chunks[1:]] == [chunk.end for chunk in chunks[:-1]]
    assert (chunks[0].start, chunks[-1].end) == (0, 11)
    found = [(absolute_line(chunk, row.line), row) for chunk in chunks for row in read_chunk(chunk, SETTINGS)]
    assert [getattr(row, "text", None) for _, row in found] == [*values[:1000], None, None, None, "x" * 200]
    assert [line for line, _ in found] == list(range(1, 1005))
    assert [row.reason for _, row in found if hasattr(row, "reason")] == [
        "missing field",
        "empty",
        "control characters",
    ]
    assert texts(path, max_document_bytes=128)[-2:] == ["x" * 128, "x" * 72]
    assert fields_found(str(path), SETTINGS) == ["id", "text"]


def test_parquet_columns_that_do_not_fit(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", {"id": [1, 2], "body": ["a", "b"]})
    with pytest.raises(DataError, match="'id', 'body'"):
        rows(path)
    with pytest.raises(DataError, match="holds int64, not text"):
        rows(path, text_field="id")


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_damaged_parquet(tmp_path: Path, keep: int) -> None:
    path = _parquet(tmp_path / "a.parquet", {"text": ["a" * 100, "b" * 100]})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="no readable parquet") as caught:
        rows(path)
    assert caught.value.where == str(path)


def test_missing_extra_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(SetupError) as caught:
        rows(path)
    assert caught.value.fix == "pip install 'llmkit[parquet]'"
