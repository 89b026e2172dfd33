"""Which column has which role."""

from __future__ import annotations

import pytest

from llmkit.data.task_records import Record, column_value, columns_in, match_columns
from llmkit.errors import ConfigError, DataError

ROLES = {"text": ("text", "sentence", "review body"), "label": ("label", "stars"), "id": ("id",)}


def match(*present: str, where: str = "a.jsonl", **overrides: str) -> dict[str, str]:
    return match_columns(ROLES, ("id",), present, overrides, where)


@pytest.mark.parametrize(
    ("present", "text", "label"),
    [
        (["text", "label"], "text", "label"),
        (["ID", " Text ", "LABEL"], " Text ", "LABEL"),
        (["stars", "review-body"], "review-body", "stars"),
        (["Review Body", "stars"], "Review Body", "stars"),
        (["sentence", "text", "stars", "label"], "text", "label"),  # the usual name goes before the others
    ],
)
def test_usual_spellings(present: list[str], text: str, label: str) -> None:
    found = match(*present)
    assert (found["text"], found["label"]) == (text, label)
    assert list(found) == [role for role in ROLES if role in found]
    assert found.get("id") == next((name for name in present if name.lower() == "id"), None)


def test_what_is_said_goes_before_what_is_usual() -> None:
    assert match("text", "body", "label", text="body") == {"text": "body", "label": "label"}
    assert match("text", "Body", "label", text="body")["text"] == "Body"
    assert match("text", "stars", "label", text="label")["label"] == "stars"  # a column has one role


def test_absence_lists_the_columns_and_what_to_write() -> None:
    with pytest.raises(
        DataError, match="no column for 'text' and 'label'; there are the columns body, score"
    ) as caught:
        match("body", "score")
    assert caught.value.where == "a.jsonl"
    assert caught.value.fix == "say which it is: data.columns.text=... data.columns.label=..."
    with pytest.raises(DataError, match="there are no columns"):
        match()


def test_a_table_may_have_no_header() -> None:
    with pytest.raises(DataError) as caught:
        match("Ein guter Film", "gut", where="a.tsv")
    assert caught.value.fix.endswith("by number: data.columns.text=1 data.columns.label=2")


def test_a_table_parted_by_other_marks() -> None:
    with pytest.raises(DataError) as caught:
        match("text;label", where="a.csv")
    assert "seem to be parted by ';'" in caught.value.fix


def test_a_column_has_one_role() -> None:
    roles = {"extra": ("extra", "note"), "first": ("first", "note", "second"), "second": ("second", "note")}
    optional = ("extra",)
    assert match_columns(roles, optional, ["note", "second"], {}) == {"first": "note", "second": "second"}
    assert match_columns(roles, optional, ["second", "Note"], {}) == {"first": "Note", "second": "second"}
    with pytest.raises(DataError, match="no column for 'second'"):
        match_columns(roles, optional, ["note"], {})


@pytest.mark.parametrize("present", [["sentence", "review body"], ["Text", "TEXT"], ["sentence", "Sentence"]])
def test_ambiguity_is_an_error(present: list[str]) -> None:
    with pytest.raises(DataError, match=f"'{present[0]}' and '{present[1]}' may both be 'text'") as caught:
        match(*present, "label")
    assert caught.value.fix == f"say which it is: data.columns.text={present[0]}"
    assert match(*present, "label", text=present[0])["text"] == present[0]


def test_a_column_that_was_asked_for_must_be_there() -> None:
    with pytest.raises(DataError, match="no column 'body'; there are the columns text, label") as caught:
        match("text", "label", text="body")
    assert caught.value.fix == "correct data.columns.text=body"
    with pytest.raises(ConfigError, match="no column for 'txt'") as refused:
        match("text", "label", txt="text")
    assert refused.value.where == "data.columns.txt"
    assert refused.value.fix == "it has text, label, id"


def test_inside_of_objects() -> None:
    records = [
        Record({"translation": {"en": "one", "de": "eins"}, "a.b": 1}, "x:1"),
        Record({"id": 2, "big": {str(n): n for n in range(99)}}, "x:2"),
    ]
    assert columns_in(records) == ["translation", "translation.en", "translation.de", "a.b", "id", "big"]
    assert column_value(records[0].fields, "translation.de") == "eins"
    assert column_value(records[0].fields, "a.b") == 1
    assert column_value(records[1].fields, "translation.de") is None
    assert column_value({"translation": "text"}, "translation.de") is None
