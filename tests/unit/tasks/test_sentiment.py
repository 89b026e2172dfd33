"""Labels: given or found, by name or by number, and rows of the three kinds of model."""

from __future__ import annotations

from typing import Any

import pytest

from llmkit.errors import BadExample, ConfigError, DataError
from tests.unit.tasks.support import BOS, EOS, PatternTokenizer, ask, task

THREE = ["negative", "neutral", "positive"]


@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder_decoder"])
def test_a_row_is_a_document_and_a_label(kind: str) -> None:
    tokenizer, job = PatternTokenizer(), task("sentiment", labels=THREE)
    assert job.answers(kind) == "class"
    question = ask(job, text=" good film ", label="positive")
    (row,) = job.rows(question, tokenizer, kind, 99, cut=False)
    assert row.ids.tolist() == [BOS, *tokenizer.encode("good film"), EOS]
    assert (row.answer.label, row.answer.trained, row.answer.span) == (2, None, None)
    assert list(job.prompt(question, tokenizer, kind, 99)) == row.ids.tolist()


@pytest.mark.parametrize(
    ("value", "wanted"),
    [("positive", "positive"), (" Positive ", "positive"), (0, "negative"), ("2", "positive"), (1.0, "neutral")],
)
def test_given_labels_are_found_by_name_or_number(value: Any, wanted: str) -> None:
    assert ask(task("sentiment", labels=THREE), text="a", label=value).fields["label"] == wanted


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        *(("happy", "unknown label"), (3, "unknown label"), (-1, "unknown label"), (True, "unknown label")),
        *(("", "empty label"), (0.5, "label is not text"), ([0], "label is not text"), (None, "missing label")),
    ],
)
def test_labels_that_are_none(value: Any, reason: str) -> None:
    with pytest.raises(BadExample, match=f"^{reason}$"):
        task("sentiment", labels=THREE).read({"text": "a", "label": value}, answered=True)


def test_a_name_goes_before_a_number() -> None:
    assert ask(task("sentiment", labels=["1", "0"]), text="a", label=0).fields["label"] == "0"


def test_labels_of_the_data() -> None:
    open_task = task("sentiment")
    assert [ask(open_task, text="a", label=value).fields["label"] for value in (1, "1", 1.0, True, "Bad ")] == [
        *("1", "1", "1", "true", "Bad")
    ]
    with pytest.raises(BadExample, match="unknown label"):
        ask(open_task, text="a", label=-1)
    job = open_task.with_labels(["1", "0"])
    assert job.labels == ["1", "0"]
    assert job.with_labels(["x", "y"]) is job
    with pytest.raises(BadExample, match="unknown label"):
        job.rows(ask(open_task, text="a", label="2"), PatternTokenizer(), "encoder", 9, cut=False)


@pytest.mark.parametrize(
    ("labels", "words"), [(["1"], "two labels, the data has '1'"), ([], "has none"), (["a", "B", "A"], "capitals")]
)
def test_labels_of_the_data_that_make_no_choice(labels: list[str], words: str) -> None:
    with pytest.raises(DataError, match=words) as error:
        task("sentiment").with_labels(labels)
    assert "task.labels=" in error.value.fix


def test_without_labels_no_row() -> None:
    job = task("sentiment")
    with pytest.raises(ConfigError, match="not known"):
        job.rows(ask(job, text="a", label="x"), PatternTokenizer(), "encoder", 9, cut=False)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["a"], "must be at least 2, or null"), (["a", " "], "one is empty"), (["a", "A"], "'a' and 'A' are the same")],
)
def test_problems(labels: list[str], message: str) -> None:
    assert ("labels", message) in task("sentiment", labels=labels).problems()


def test_the_end_of_a_long_text_is_cut() -> None:
    tokenizer, job = PatternTokenizer(), task("sentiment", labels=THREE)
    question = ask(job, text="one two three", label=0)
    with pytest.raises(BadExample, match=r"^too long$"):
        job.rows(question, tokenizer, "encoder", 4, cut=False)
    (row,) = job.rows(question, tokenizer, "encoder", 4, cut=True)
    assert row.ids.tolist() == [BOS, *tokenizer.encode("one two"), EOS]
    assert row.answer.n_cut == 1
    assert list(job.prompt(question, tokenizer, "encoder", 4)) == row.ids.tolist()
