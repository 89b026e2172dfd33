"""Plain text and JSON lines: what comes out is what is in the file, whatever the chunks."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.readers.base import BadRow, Document, absolute_line, chunks_of, fields_found, read_chunk
from llmkit.data.readers.records import cut_point, documents
from tests.unit.data.readers_support import SETTINGS, bad, rows, texts, write

TEXT = st.text(st.sampled_from("ab \n\r\té漢😀\u2028"), max_size=300)
repeatable = settings(derandomize=True, max_examples=150, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@repeatable
@given(text=TEXT, chunk_bytes=st.integers(1, 400), limit=st.integers(64, 200))
def test_documents_of_all_chunks_give_back_the_text(folder: Path, text: str, chunk_bytes: int, limit: int) -> None:
    path = write(folder / "property.txt", text)
    found = rows(path, chunk_bytes, max_document_bytes=limit)
    assert not [row for row in found if isinstance(row, BadRow)]
    joined = "".join(row.text for row in found if isinstance(row, Document))
    if joined != text:  # only sections of whitespace alone are left out
        assert joined.split() == text.split()
        assert any(piece.isspace() for piece in _all_sections(path, chunk_bytes, limit))
    assert all(0 < len(row.text.encode()) <= limit for row in found if isinstance(row, Document))


def _all_sections(path: Path, chunk_bytes: int, limit: int) -> list[str]:
    """The sections by another road: cut every chunk's bytes by the same three rules, in one loop."""
    data, sections = path.read_bytes(), []
    for chunk in chunks_of([str(path)], chunk_bytes):
        piece = data[chunk.start : chunk.end]
        while piece:
            size = len(piece) if len(piece) <= limit else cut_point(piece, limit)
            sections.append(piece[:size].decode())
            piece = piece[size:]
    assert "".join(sections) == data.decode()
    return sections


@repeatable
@given(text=TEXT, chunk_bytes=st.integers(1, 400))
def test_chunks_tile_the_file_at_line_starts(folder: Path, text: str, chunk_bytes: int) -> None:
    path = write(folder / "tile.txt", text)
    chunks = chunks_of([str(path)], chunk_bytes)
    data = path.read_bytes()
    assert b"".join(data[chunk.start : chunk.end] for chunk in chunks) == data
    assert all(chunk.start < chunk.end for chunk in chunks)
    assert all(data[chunk.start - 1 : chunk.start] == b"\n" for chunk in chunks[1:])
    longest = max((len(line) + 1 for line in data.split(b"\n")), default=0)
    assert all(chunk.end - chunk.start < chunk_bytes + longest for chunk in chunks)


BROKEN = [
    (b'{"text": "a",}', "broken json"),
    (b'{"text": "a"} {"text": "b"}', "broken json"),
    (b"{", "broken json"),
    (b'{"text": 1' + b"1" * 5000 + b"}", "broken json"),
    (b"[" * 100_000 + b"]" * 100_000, "broken json"),
    (b'["text"]', "wrong type"),
    (b'"text"', "wrong type"),
    (b'{"text": 3}', "wrong type"),
    (b'{"text": ["a"]}', "wrong type"),
    (b'{"other": "a"}', "missing field"),
    (b'{"text": null}', "missing field"),
    (b'{"text": ""}', "empty"),
    (b'{"text": " \\n\\t"}', "empty"),
    (b'{"text": "a\\u0000b"}', "control characters"),
    (b'{"text": "\\ud800"}', "invalid utf-8"),
    (b'{"text": "\xff"}', "invalid utf-8"),
    (b'{"text": "' + b"x" * 300_000 + b'"}', "over-long line"),
]


@pytest.mark.parametrize(("line", "reason"), BROKEN, ids=[f"{reason}-{n}" for n, (_, reason) in enumerate(BROKEN)])
def test_a_broken_line_is_named_and_its_neighbours_are_kept(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    assert texts(path, max_line_bytes=250_000) == ["before", "after"]
    assert bad(path, max_line_bytes=250_000) == [(2, reason)]


JSON_LINE = st.one_of(
    TEXT.map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()),
    TEXT.map(lambda text: json.dumps({"text": text}).encode()),
    st.sampled_from([line for line, _ in BROKEN if len(line) < 5000] + [b"", b"  ", b"\r"]),
)


@repeatable
@given(lines=st.lists(JSON_LINE, max_size=20), end=st.sampled_from([b"", b"\n"]), chunk_bytes=st.integers(1, 2000))
def test_jsonl_is_the_same_in_any_chunks(folder: Path, lines: list[bytes], end: bytes, chunk_bytes: int) -> None:
    path = write(folder / "chunks.jsonl", b"\n".join(lines) + end)
    whole = [(type(row), row.line, getattr(row, "text", None)) for row in rows(path, 1 << 30)]
    parts = [
        (type(row), absolute_line(chunk, row.line), getattr(row, "text", None))
        for chunk in chunks_of([str(path)], chunk_bytes)
        for row in read_chunk(chunk, SETTINGS)
    ]
    assert parts == whole
    assert [text for _, _, text in whole if text] == list(filter(None, map(_text_by_json, lines)))


def _text_by_json(line: bytes) -> str | None:
    try:
        text = json.loads(line.decode())["text"]
        text.encode()
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return text if text.strip() and "\0" not in text else None


def test_over_long_line_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "' + b"x" * 30_000_000 + b'"}\n{"text": "after"}\n')
    assert _peak_bytes(lambda: _assert_after(path)) < 4_000_000


def _assert_after(path: Path) -> None:
    assert texts(path, max_line_bytes=1024) == ["after"]
    assert bad(path, max_line_bytes=1024) == [(1, "over-long line")]


def test_one_long_line_of_text_is_cut_and_never_held(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "word " * 4_000_000)

    def read() -> None:
        (chunk,) = chunks_of([str(path)], 1 << 20)
        sizes = [len(row.text) for row in read_chunk(chunk, SETTINGS) if isinstance(row, Document)]
        assert sum(sizes) == 20_000_000
        assert max(sizes) <= 1 << 20

    assert _peak_bytes(read) < 8 << 20


def _peak_bytes(action: Callable[[], None]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_only_bad_lines_of_a_text_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one\ntw\xffo\nthr\x00ee\nfour\x07\nfive")
    assert texts(path) == ["one\nfour\x07\nfive"]
    assert bad(path) == [(2, "invalid utf-8"), (3, "control characters")]


def test_bad_lines_keep_their_number_over_chunks(tmp_path: Path) -> None:
    content = b"".join(b"line %d\n" % n for n in range(1, 200))
    path = write(tmp_path / "a.txt", content.replace(b"line 150\n", b"line \xff\n").replace(b"line 3\n", b"\0\n"))
    found = [
        absolute_line(chunk, row.line)
        for chunk in chunks_of([str(path)], 100)
        for row in read_chunk(chunk, SETTINGS)
        if isinstance(row, BadRow)
    ]
    assert found == [3, 150]


def test_a_cut_document_says_that_it_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "abc\n" * 50)
    found = rows(path, max_document_bytes=64)
    assert [len(row.text) for row in found if isinstance(row, Document)] == [64, 64, 64, 8]
    assert [row.cut for row in found if isinstance(row, Document)] == [True, True, True, False]
    assert [row.line for row in found] == [1, 17, 33, 49]
    assert [row.cut for row in rows(path, 100) if isinstance(row, Document)] == [True, False]  # cut by the chunk
    table = write(tmp_path / "a.jsonl", json.dumps({"text": "abc\n" * 20}) + '\n{"text": "short"}\n')
    assert [(row.line, row.cut) for row in rows(table, max_document_bytes=64) if isinstance(row, Document)] == [
        (1, True),
        (1, False),
        (2, False),
    ]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("a" * 60 + "\nbb bb" * 9, "a" * 60 + "\n"),
        ("a" * 40 + " " + "b" * 60, "a" * 40 + " "),
        ("漢" * 40, "漢" * 21),
        ("😀" * 40, "😀" * 16),
        ("aé" * 60, "aé" * 21 + "a"),
    ],
)
def test_where_a_long_text_is_cut(text: str, first: str) -> None:
    sections = [row.text for row in documents(text, 1, 64) if isinstance(row, Document)]
    assert sections[0] == first
    assert "".join(sections) == text


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("content", [b"", b"\n", b"\n \r\n\n", b"\xef\xbb\xbf"])
def test_nothing_but_blank_lines_is_nothing(tmp_path: Path, name: str, content: bytes) -> None:
    path = write(tmp_path / name, content)
    if name == "a.csv" and b" " in content:
        return  # a header of one blank column: an error of its own
    assert rows(path) == []


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.txt", "\ufeffhello")) == ["hello"]
    assert texts(write(tmp_path / "a.jsonl", '\ufeff{"text": "hello"}')) == ["hello"]
    assert texts(write(tmp_path / "a.csv", '\ufefftext\n"hello"\n')) == ["hello"]


def test_fields_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"body": "a"}\nbroken\n[]\n\n{"title": "b", "body": "c"}\n')
    assert fields_found(str(path), SETTINGS) == ["body", "title"]
    assert fields_found(str(write(tmp_path / "a.txt", "x")), SETTINGS) == []
    assert fields_found("builtin:python_docs", SETTINGS) == []


def test_line_ends_of_other_systems_are_kept(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.txt", "a\r\nb\rc\n")) == ["a\r\nb\rc\n"]
    assert texts(write(tmp_path / "a.jsonl", '{"text": "a"}\r\n{"text": "b"}\r\n')) == ["a", "b"]
