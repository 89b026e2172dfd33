"""Bad rows of tasks: each kind is counted exactly, with file and line, and too many of them are a typed error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.data.task_rows import encode_rows, load_questions
from llmkit.errors import DataError
from tests.unit.data.task_support import BYTES, Chat, Copy, Label, Spans, settings


def write(path: Path, good: list[Any], bad: dict[int, Any]) -> Path:
    """Forty lines, good ones in turn, and the bad ones at the lines that are their keys; a text stands for itself."""
    lines = [bad.get(line, good[line % len(good)]) for line in range(1, 41)]
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


CASES: dict[str, tuple[Any, list[Any], dict[int, Any], dict[str, list[int]]]] = {
    "missing column": (
        Label(),
        [{"text": "a", "label": "no"}],
        {3: {"text": "a"}, 9: {"label": "no"}, 40: {"text": "a", "label": None}},
        {"missing label": [3, 40], "missing text": [9]},
    ),
    "empty target": (
        Copy(),
        [{"en": "a", "de": "b"}],
        {1: {"en": "a", "de": ""}, 2: {"en": "a", "de": " \n"}, 7: {"en": "a", "de": None}},
        {"empty target": [1, 2], "missing de (target)": [7]},
    ),
    "wrong roles": (
        Chat(),
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
        {5: {"messages": [{"role": "assistant", "content": "b"}]}, 6: {"messages": "a"}},
        {"wrong roles": [5, 6]},
    ),
    "lines that cannot be read": (
        Label(),
        [{"text": "a", "label": "no"}],
        {
            2: '{"text": "a", "label": "no",}',
            4: "[1]",
            8: '{"text": "\\ud800", "label": "no"}',
            9: "{",
            10: "{",
            11: "{",
        },
        {"broken json": [2, 9, 10, 11], "wrong type": [4], "invalid utf-8": [8]},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_exact_counts_with_file_and_line(tmp_path: Path, name: str) -> None:
    task, good, bad, wanted = CASES[name]
    path = write(tmp_path / "a.jsonl", good, bad)
    report = load_questions(task, settings(path, max_bad_fraction=0.5)).report.files[0]
    assert report.bad.counts == {reason: len(lines) for reason, lines in wanted.items()}
    assert report.bad.places == {reason: [f"{path}:{n}" for n in lines[:3]] for reason, lines in wanted.items()}
    assert (report.n_records, report.n_questions) == (40, 40 - len(bad))
    with pytest.raises(DataError, match=f"{len(bad)} of 40 records") as caught:
        load_questions(task, settings(path, max_bad_fraction=0.02))
    for reason, lines in wanted.items():
        assert f"{len(lines)} {reason} (first: {path}:{lines[0]}" in str(caught.value)
    assert caught.value.exit_code == 3
    allowed = float(caught.value.fix.rpartition("=")[2])
    assert load_questions(task, settings(path, max_bad_fraction=allowed)).report.n_train == 40 - len(bad)


def test_numbers_count_bad_rows_too(tmp_path: Path) -> None:
    """So that predictions can be put back beside the rows of the file."""
    path = write(tmp_path / "a.jsonl", [{"text": "a", "label": "no"}], {1: "{", 3: {"label": "no"}})
    found = load_questions(Label(), settings(path, max_bad_fraction=0.1))
    assert [question.number for question in found.train[:3]] == [1, 3, 4]


def test_answer_not_in_context(tmp_path: Path) -> None:
    """One question of an article is bad, the others are not."""

    def paragraph(answers: list[str]) -> dict[str, Any]:
        return {"context": "a b c", "qas": [{"question": answer, "answer": answer} for answer in answers]}

    articles = [{"paragraphs": [paragraph(["a", "x", "b"]), paragraph(["c"])]}, {"paragraphs": [paragraph(["y"])]}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "data": articles}, indent=1))
    found = load_questions(Spans(), settings(path, max_bad_fraction=0.4))
    (files,) = found.report.files
    assert files.bad.counts == {"answer not in context": 2}
    line = path.read_text().split("\n").index("  {", 5) + 1
    second = [n for n, text in enumerate(path.read_text().split("\n"), 1) if text == "  {"][1]
    assert line == second
    assert files.bad.places["answer not in context"] == [f"{path}:4, item 1, example 2", f"{path}:{second}, item 2"]
    assert [(q.fields["question"], q.number) for q in found.train] == [("a", 0), ("b", 2), ("c", 3)]


def test_unknown_label(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "a", "label": "no"}], {4: {"text": "a", "label": "maybe"}})
    found = load_questions(Label(), settings(path))
    with pytest.raises(DataError, match="1 of 40 questions cannot be used") as caught:
        encode_rows(found.train, Label(), BYTES, "encoder", 16, "error")
    assert f"1 unknown label (first: {path}:4)" in str(caught.value)
    dataset = encode_rows(found.train, Label(), BYTES, "encoder", 16, "error", max_bad_fraction=0.03)
    assert dataset.report.dropped.places == {"unknown label": [f"{path}:4"]}
    assert dataset.n_sequences == 39


@pytest.mark.parametrize(("policy", "n_rows"), [("drop", 38), ("truncate", 39)])
def test_too_long(tmp_path: Path, policy: str, n_rows: int) -> None:
    bad = {7: {"en": "x" * 50, "de": "b"}, 30: {"en": "a", "de": "y" * 50}}
    path = write(tmp_path / "a.jsonl", [{"en": "a", "de": "b"}], bad)
    found = load_questions(Copy(), settings(path))
    with pytest.raises(DataError, match="2 of 40 questions do not fit in 20 tokens") as caught:
        encode_rows(found.train, Copy(), BYTES, "decoder", 20, "error")
    assert f"2 too long (first: {path}:7, {path}:30)" in str(caught.value)
    dataset = encode_rows(found.train, Copy(), BYTES, "decoder", 20, policy)
    assert dataset.n_sequences == n_rows
    assert dataset.report.dropped.counts == {"too long": 40 - n_rows}
    assert dataset.report.dropped.places["too long"][-1] == f"{path}:30"


def test_no_row_can_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("en,de\na,\nb,\n")
    with pytest.raises(DataError, match=r"no record .* can be used; there are the columns en, de") as caught:
        load_questions(Copy(), settings(path, max_bad_fraction=1.0))
    assert f"2 empty target (first: {path}:2, {path}:3)" in str(caught.value)
    path.write_text("")
    with pytest.raises(DataError, match="can be used; there is no record in it"):
        load_questions(Copy(), settings(path))


def test_a_missing_column_in_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("body,stars\na,no\n")
    with pytest.raises(DataError, match="no column for 'text'; there are the columns body, stars") as caught:
        load_questions(Label(), settings(path))
    assert caught.value.where == str(path)
    assert "data.columns.text=..." in caught.value.fix
    assert load_questions(Label(), settings(path, columns={"text": "body"})).report.n_train == 1
