"""Records of every format: the same fields, each with its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.task_records import BadRecord, Record
from llmkit.errors import ConfigError, DataError
from tests.unit.data.readers_support import rows as documents
from tests.unit.data.task_support import read

ROWS: list[dict[str, Any]] = [{"text": "good é", "label": "yes"}, {"text": 'a "bad" one', "label": "no"}]


def _table(rows: list[dict[str, Any]], delimiter: str) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


FILES = {
    "a.jsonl": ("\n".join(map(json.dumps, ROWS)), [1, 2]),
    "a.json": (json.dumps(ROWS, indent=1), [2, 6]),
    "b.json": (json.dumps({"version": 1, "data": ROWS, "other": []}), [1, 1]),
    "c.json": (json.dumps({"anything": ROWS}, indent=2), [3, 7]),
    "d.json": (json.dumps({"features": [1], "rows": [{"row_idx": 7, "row": row} for row in ROWS]}), [1, 1]),
    "a.csv": (_table(ROWS, ","), [2, 3]),
    "a.tsv": (_table(ROWS, "\t"), [2, 3]),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_all_formats_give_the_same_records(tmp_path: Path, name: str, compressed: bool) -> None:
    content, lines = FILES[name]
    path = tmp_path / (name + ".gz" * compressed)
    path.write_bytes(gzip.compress(content.encode()) if compressed else content.encode())
    found = read(path)
    assert [dict(record.fields) for record in found if isinstance(record, Record)] == ROWS
    items = [f", item {number}" if ".json." in f"{name}." else "" for number in (1, 2)]
    assert [record.where for record in found] == [f"{path}:{n}{item}" for n, item in zip(lines, items, strict=True)]


def test_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": "é"}], "n": 1}, {"messages": None, "n": 2}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), str(tmp_path / "a.parquet"))
    found = read(tmp_path / "a.parquet")
    assert [(record.fields, record.where) for record in found if isinstance(record, Record)] == [
        (row, f"{tmp_path}/a.parquet:{number}") for number, row in enumerate(rows, 1)
    ]


def test_a_folder_a_list_and_a_glob(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "notes.md"):
        (tmp_path / name).write_text('[{"text": "a"}]' if name == "a.json" else '{"text": "b"}\n')
    texts = [record.fields["text"] for record in read(tmp_path) if isinstance(record, Record)]
    assert texts == ["a", "b"]
    assert [r.where for r in read([tmp_path / "b.jsonl", tmp_path / "a.json"])] == [
        f"{tmp_path}/b.jsonl:1",
        f"{tmp_path}/a.json:1, item 1",
    ]
    assert len(read(f"{tmp_path}/*.json*")) == 2
    with pytest.raises(DataError, match="no reader"):
        read(tmp_path / "notes.md")


def test_json_lists_are_no_text_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"}]')
    with pytest.raises(DataError, match="no reader"):
        documents(tmp_path / "a.json")


def test_bad_records_have_reason_and_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": 1}\n{"text":\n[1]\n\n{"t": "\xff"}\n{"m": [{"c": "\\ud800"}]}\n{"t": "a\\u0000"}\n')
    assert read(path) == [
        Record({"text": 1}, f"{path}:1"),
        BadRecord("broken json", f"{path}:2"),
        BadRecord("wrong type", f"{path}:3"),
        BadRecord("invalid utf-8", f"{path}:5"),
        BadRecord("invalid utf-8", f"{path}:6"),
        BadRecord("control characters", f"{path}:7"),
    ]
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, 2,\n {"a": 3}]')
    assert [(type(found), found.where) for found in read(path)] == [
        (Record, f"{path}:1, item 1"),
        (BadRecord, f"{path}:1"),
        (Record, f"{path}:2, item 3"),
    ]


@pytest.mark.parametrize(
    ("content", "what", "where"),
    [
        ('[{"a": 1},]', "broken", ":1:11"),
        ('[{"a": 1}\n {"a": 2}]', "',' is missing", ":2:2"),
        ('{"a": 1}\n{"a": 2}\n', "several objects", ":2"),
        ("[1] 2", "more text after the end", ":1:5"),
        ('{"text": ["a"], "label": ["b"]}', r"2 lists \('text', 'label'\)", ""),
        ('{"a": 1}', r"0 lists \(none\)", ""),
        ("7", "'{' is missing", ":1:1"),
        ("[" * 100_000, "cannot be read", ""),
        ('[{"a": "', "broken", ":1:8"),
    ],
)
def test_a_json_file_that_is_no_list(tmp_path: Path, content: str, what: str, where: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError, match=what) as caught:
        read(path)
    assert caught.value.where == f"{path}{where}"
    assert caught.value.fix


def test_empty_files_have_no_records(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl", "a.csv", "a.txt"):
        (tmp_path / name).write_text("")
        assert read(tmp_path / name) == []


@settings(derandomize=True, max_examples=60, deadline=None)
@given(value=st.recursive(st.none() | st.integers(0, 9) | st.text('a\n\\"[{é', max_size=4), st.lists, max_leaves=5))
def test_json_items_are_those_that_json_reads(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    rows = [{"n": n, "value": value} for n in range(3)]
    path = tmp_path_factory.mktemp("json") / "a.json"
    for indent in (None, 2):
        path.write_text(
            json.dumps({"first": value if not isinstance(value, list) else None, "all": rows}, indent=indent)
        )
        found = read(path)
        assert [record.fields for record in found if isinstance(record, Record)] == rows
        lines = [int(record.where.split(":")[1].split(",")[0]) for record in found]
        text = path.read_text().split("\n")
        assert all("{" in text[line - 1] for line in lines)
        assert indent is None or [text[line].strip() for line in lines] == [f'"n": {n},' for n in range(3)]


# -- text files -----------------------------------------------------------------------------------------------------


def test_line_aligned_files(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("one\n\u2028two\x85\n\nfour")
    (tmp_path / "a.de").write_text("eins\r\nzwei\r\ndrei\r\nvier\r\n")
    found = read(tmp_path / "a.en", tmp_path / "a.de")
    assert [tuple(record.fields.values()) for record in found if isinstance(record, Record)] == [
        ("one", "eins"),
        ("\u2028two\x85", "zwei"),
        ("", "drei"),
        ("four", "vier"),
    ]
    assert found[-1].where == f"{tmp_path}/a.en:4"


def test_a_bad_line_on_one_side_does_not_shift_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_bytes(b"one\n\xff\nthree\n")
    (tmp_path / "a.de").write_bytes(b"eins\nzwei\n\0\n")
    found = read(tmp_path / "a.en", tmp_path / "a.de")
    assert found[1:] == [
        BadRecord("invalid utf-8", f"{tmp_path}/a.en:2"),
        BadRecord("control characters", f"{tmp_path}/a.de:3"),
    ]


@pytest.mark.parametrize(("n_source", "n_target"), [(3, 2), (0, 2), (2, 1500)])
def test_unequal_numbers_of_lines(tmp_path: Path, n_source: int, n_target: int) -> None:
    (tmp_path / "a.en").write_text("x\n" * n_source)
    (tmp_path / "a.de").write_text("y\n" * n_target)
    with pytest.raises(DataError, match=f"{n_source:,} lines, .* has {n_target:,}") as caught:
        read(tmp_path / "a.en", tmp_path / "a.de")
    assert caught.value.where == "data.target_path"


def test_line_aligned_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one file on each side"):
        read([tmp_path / "a"], tmp_path / "b")


def test_lines_of_text_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    found = read(tmp_path / "a.txt")
    assert [record.fields for record in found if isinstance(record, Record)] == [
        {"text": t} for t in ("one", "", "two")
    ]


# -- tables ---------------------------------------------------------------------------------------------------------


def test_a_table_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("one\teins\ntwo\tzwei\nthree\n")
    found = read(path, columns={"source": 1, "target": "2"})
    assert found == [
        Record({"1": "one", "2": "eins"}, f"{path}:1"),
        Record({"1": "two", "2": "zwei"}, f"{path}:2"),
        BadRecord("wrong column count", f"{path}:3"),
    ]
    path.write_text("0\t1\nid\tone\n")
    assert read(path, columns={"text": "1"}) == [Record({"0": "id", "1": "one"}, f"{path}:2")]


def test_a_column_that_appears_twice(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    with pytest.raises(DataError, match="'text' appears twice"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize(
    "lines",
    [
        ['"Stop!" he said.\t"Halt!" sagte er.'],
        ['"open\tnever closed', "next\trow"],
        ['"a\tb', 'c"', "e\tf"],
    ],
)
def test_quotes_in_tsv_files_that_do_not_keep_to_their_rules(tmp_path: Path, lines: list[str]) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("\n".join(["en\tde", *lines]))
    found = read(path)
    cells = [line.split("\t") for line in lines]
    assert [list(record.fields.values()) if isinstance(record, Record) else None for record in found] == [
        row if len(row) == 2 else None for row in cells
    ]


def test_a_quote_that_is_wrong_in_csv_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\nfine,yes\n"Stop!" he said,no\n')
    with pytest.raises(DataError, match="cannot be read") as caught:
        read(tmp_path / "a.csv")
    assert caught.value.where == f"{tmp_path}/a.csv:3"


CELL = st.text("ab \"'\n,\té", max_size=6)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@settings(derandomize=True, max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(CELL, CELL), max_size=6))
def test_what_csv_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, rows: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("table") / f"a{suffix}"
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="," if suffix == ".csv" else "\t").writerows([("x", "y"), *rows])
    found = read(path)
    assert [tuple(record.fields.values()) for record in found if isinstance(record, Record)] == rows


# -- demo sets ------------------------------------------------------------------------------------------------------


def test_demo_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = ModuleType("llmkit.data.demo")
    demo.records = lambda name: iter([({"text": name}, f"builtin:{name}:1")])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llmkit.data.demo", demo)
    assert read("builtin:sentiment") == [Record({"text": "sentiment"}, "builtin:sentiment:1")]


def test_real_files(data_dir: Path) -> None:
    """SQuAD files hold one record an article."""
    for name, n_questions in (("policyqa.train", 4152), ("xquad.en", 1190)):
        records = read(data_dir / "qa" / f"{name}.json")
        asked = [
            qa
            for record in records
            if isinstance(record, Record)
            for paragraph in record.fields["paragraphs"]
            for qa in paragraph["qas"]
        ]
        assert len(asked) == n_questions
    assert (
        len(read(data_dir / "translation/multi30k.valid.en.txt", data_dir / "translation/multi30k.valid.de.txt"))
        == 1014
    )
