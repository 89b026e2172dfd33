"""From files to questions: sides, repeats, numbers, limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from llmkit.data.task_rows import Questions, load_questions
from llmkit.errors import ConfigError, DataError
from tests.unit.data.task_support import Copy, Label, Spans, jsonl, settings


def label_rows(n: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"text {number}", "label": ("no", "yes")[number % 2]} for number in range(start, start + n)]


def load(path: Any, task: Any = None, *, split: bool = True, answered: bool = True, **changes: Any) -> Questions:
    return load_questions(task or Label(), settings(path, **changes), split=split, answered=answered)


def test_questions_with_place_and_number(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"review": "a", "stars": "yes"}, {"review": "b", "stars": "no"}])
    found = load(path)
    assert [(q.fields, q.where, q.number) for q in found.train] == [
        ({"text": "a", "label": "yes"}, f"{path}:1", 0),
        ({"text": "b", "label": "no"}, f"{path}:2", 1),
    ]
    assert found.val == []
    assert found.columns == {"text": "review", "label": "stars"}
    assert found.labels() == ["no", "yes"]
    assert found.report.lines() == [
        f"{path}: 2 questions; columns: text=review, label=stars",
        "questions: 2 for training, 0 for validation",
    ]


def test_labels_that_are_numbers_are_in_order(tmp_path: Path) -> None:
    rows = [{"text": str(n), "label": n} for n in (10, 2, 1, 2)] + [{"text": "x", "label": "none"}]
    assert load(jsonl(tmp_path / "a.jsonl", rows)).labels() == ["1", "2", "10", "none"]


def test_the_split_depends_on_the_question_alone(tmp_path: Path) -> None:
    rows = label_rows(400)
    found = load(jsonl(tmp_path / "a.jsonl", rows), val_fraction=0.2)
    again = load(jsonl(tmp_path / "b.jsonl", rows[::-1]), val_fraction=0.2)
    sides = [{q.fields["text"] for q in side} for side in (found.train, found.val)]
    assert sides == [{q.fields["text"] for q in side} for side in (again.train, again.val)]
    assert not sides[0] & sides[1]
    assert sum(map(len, sides)) == 400
    assert 50 < len(found.val) < 115
    more = load(jsonl(tmp_path / "c.jsonl", [*rows, *label_rows(50, 400)]), val_fraction=0.2)
    assert {q.fields["text"] for q in found.val} <= {q.fields["text"] for q in more.val}


def test_equal_questions_are_on_one_side(tmp_path: Path) -> None:
    """Also where their answers differ: the model has seen the text."""
    rows = [{"text": f"text {n % 50}", "label": ("no", "yes")[n // 50 % 2]} for n in range(200)]
    found = load(jsonl(tmp_path / "a.jsonl", rows), val_fraction=0.3)
    sides = [[q.fields["text"] for q in side] for side in (found.train, found.val)]
    assert not set(sides[0]) & set(sides[1])
    assert found.val
    assert found.report.n_shared == 0
    assert found.report.n_repeated == len(sides[0]) - len(set(sides[0]))


def test_questions_of_one_record_are_on_one_side(tmp_path: Path) -> None:
    rows = [
        {"paragraphs": [{"context": f"text {n} a", "qas": [{"question": q, "answer": "a"} for q in "xyz"]}]}
        for n in range(40)
    ]
    found = load(jsonl(tmp_path / "a.jsonl", rows), Spans(), val_fraction=0.3)
    assert len(found.train) + len(found.val) == 120
    assert not {q.fields["context"] for q in found.train} & {q.fields["context"] for q in found.val}
    assert found.val
    first = sorted([*found.train, *found.val], key=lambda q: q.number)
    assert [q.number for q in first] == list(range(120))
    assert [q.where for q in first[:2]] == [f"{tmp_path}/a.jsonl:1, example 1", f"{tmp_path}/a.jsonl:1, example 2"]


def test_validation_of_its_own_and_what_it_shares(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", label_rows(20))
    val = jsonl(tmp_path / "v.jsonl", [{"sentence": "no"}])
    with pytest.raises(DataError, match="no column for 'text' and 'label'") as caught:
        load(path, val_path=val)
    assert caught.value.where == str(val)
    jsonl(
        val, [{"review": "text 3", "label": "no"}, *({"review": r["text"], "label": "no"} for r in label_rows(4, 18))]
    )
    found = load(path, val_path=val, val_fraction=0.5)
    assert (len(found.train), len(found.val)) == (20, 5)
    assert found.report.n_shared == 3
    assert found.report.files[1].columns == {"text": "review", "label": "label"}
    assert found.report.lines()[-1] == "warning: 3 validation questions also stand in the training data"


def test_line_aligned_validation(tmp_path: Path) -> None:
    for name in ("a.en", "a.de", "v.en", "v.de"):
        (tmp_path / name).write_text("".join(f"{name} {n}\n" for n in range(5)))
    sides: dict[str, Any] = {
        "target_path": tmp_path / "a.de",
        "val_path": tmp_path / "v.en",
        "val_target_path": tmp_path / "v.de",
    }
    found = load(tmp_path / "a.en", Copy(), **sides)
    assert (found.train[4].fields, found.val[0].fields) == (
        {"source": "a.en 4", "target": "a.de 4"},
        {"source": "v.en 0", "target": "v.de 0"},
    )
    (tmp_path / "v.de").write_text("one\n")
    with pytest.raises(DataError, match=r"5 lines, .* has 1") as caught:
        load(tmp_path / "a.en", Copy(), **sides)
    assert caught.value.where == "data.val_target_path"
    with pytest.raises(ConfigError, match=r"without data\.val_path"):
        load(tmp_path / "a.en", Copy(), **sides | {"val_path": None})
    with pytest.raises(DataError, match="nothing is found") as caught:
        load(tmp_path / "a.en", Copy(), target_path=tmp_path / "a.de", val_path=tmp_path / "none")
    assert caught.value.where == "data.val_path"


def test_nothing_is_split_where_one_side_is_wanted(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", label_rows(30))
    found = load(path, split=False, val_fraction=0.5, val_path=tmp_path / "none")
    assert [q.number for q in found.train] == list(range(30))
    assert not found.val
    assert not load(path).val  # a fraction of 0


def test_one_record_cannot_be_split(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", label_rows(1) * 5)
    with pytest.raises(DataError, match=r"5 question\(s\) of one record cannot be split") as caught:
        load(path, val_fraction=0.1)
    assert caught.value.where == "data.val_fraction"
    assert len(load(path).train) == 5


def test_few_records_leave_something_on_both_sides(tmp_path: Path) -> None:
    for n in range(2, 12):
        found = load(jsonl(tmp_path / "a.jsonl", label_rows(n)), val_fraction=0.1)
        assert found.train
        assert found.val


def test_few_records_of_many_questions_are_split_by_size(tmp_path: Path) -> None:
    rows = [
        {"paragraphs": [{"context": f"text {n} a", "qas": [{"question": str(q), "answer": "a"} for q in range(size)]}]}
        for n, size in enumerate([2000, 10, 10, 10])
    ]
    found = load(jsonl(tmp_path / "a.jsonl", rows), Spans(), val_fraction=0.01)
    assert len(found.val) == 20


def test_rows_to_predict_need_no_answers(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": None}, {"text": "b", "label": "yes"}])
    found = load(path, answered=False, split=False, max_bad_fraction=0.5)
    assert [(q.fields, q.number) for q in found.train] == [({"text": "a"}, 0), ({"text": "b"}, 2)]
    assert found.report.files[0].bad.counts == {"missing text": 1}
    assert found.labels() == []


def test_a_column_that_only_late_records_have(tmp_path: Path) -> None:
    class Noted(Label):
        optional = ("note",)
        roles: ClassVar = {**Label.roles, "note": ("note",)}

    rows = [*label_rows(300), {"text": "x", "label": "no", "Note": "n"}]
    assert load(jsonl(tmp_path / "a.jsonl", rows), Noted()).columns["note"] == "Note"


def test_the_first_rows_only(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", label_rows(30))
    found = load(path, max_rows=7, val_path=path)
    assert (len(found.train), len(found.val)) == (7, 7)
    article = {"paragraphs": [{"context": "a", "qas": [{"question": str(n), "answer": "a"} for n in range(5)]}]}
    found = load(jsonl(tmp_path / "b.jsonl", [article, article, article]), Spans(), max_rows=2)
    assert [q.fields["question"] for q in found.train] == ["0", "1"]


def test_demo_set_of_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    demo = ModuleType("llmkit.data.demo")
    demo.records = lambda name: ((row, f"builtin:{name}") for row in label_rows(4))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llmkit.data.demo", demo)
    assert [q.where for q in load(None).train] == ["builtin:fake"] * 4
