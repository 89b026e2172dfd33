"""Summarization, translation and written answers: rows, prompts, columns and bad records."""

from __future__ import annotations

from typing import Any

import pytest

from llmkit.errors import BadExample, ConfigError
from tests.unit.tasks.support import BOS, EOS, PatternTokenizer, ask, task, written

TEXT_TASKS = ("qa", "summarization", "translation", "code")


@pytest.mark.parametrize("name", [*TEXT_TASKS, "sentiment"])
def test_the_recipe_has_no_problem(name: str) -> None:
    job = task(name)
    assert job.problems() == []
    assert job.name == name
    assert set(job.optional) <= set(job.roles)


def test_a_decoder_row_trains_the_answer_and_its_end() -> None:
    tokenizer, job = PatternTokenizer(), task("translation")
    question = ask(job, source="Hello there", target="Guten Tag")
    (row,) = job.rows(question, tokenizer, "decoder", 99, cut=False)
    assert row.ids[0] == BOS
    assert row.ids[-1] == EOS
    assert tokenizer.decode(row.ids.tolist()) == "English: Hello there\nGerman: Guten Tag"
    assert tokenizer.decode(row.ids[row.answer.trained].tolist()) == " Guten Tag"
    assert row.answer.trained[-1]
    assert row.answer.target is None
    assert list(job.prompt(question, tokenizer, "decoder", 99)) == row.ids[~row.answer.trained].tolist()


def test_an_encoder_decoder_row_has_two_sides() -> None:
    tokenizer, job = PatternTokenizer(bos_id=None), task("translation")
    question = ask(job, source="Hello there", target="Guten Tag")
    (row,) = job.rows(question, tokenizer, "encoder_decoder", 99, cut=False)
    assert row.ids.tolist() == [*tokenizer.encode("Hello there"), EOS]
    assert row.answer.target.tolist() == [*tokenizer.encode("Guten Tag"), EOS]
    assert row.answer.trained is None
    assert list(job.prompt(question, tokenizer, "encoder_decoder", 99)) == row.ids.tolist()


@pytest.mark.parametrize("name", ["summarization", "translation", "code"])
def test_an_encoder_writes_nothing(name: str) -> None:
    job = task(name)
    assert job.answers("decoder") == job.answers("encoder_decoder") == "text"
    with pytest.raises(ConfigError, match="writes no text"):
        job.answers("encoder")


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_the_longest_row_that_fits(kind: str) -> None:
    """``max_len`` is the number of ids on each side, special ones included."""
    tokenizer, job = PatternTokenizer(), task("summarization", decoder_prompt="{document}\n")
    question = ask(job, document="one two three", summary="four five")
    (row,) = job.rows(question, tokenizer, kind, 99, cut=False)
    size = len(row.ids)
    assert len(job.rows(question, tokenizer, kind, size, cut=False)) == 1
    with pytest.raises(BadExample, match=r"^too long$"):
        job.rows(question, tokenizer, kind, size - 1, cut=False)
    (cut,) = job.rows(question, tokenizer, kind, size - 1, cut=True)
    assert (len(cut.ids), cut.answer.n_cut) == (size - 1, 1)
    assert written(cut, tokenizer) == written(row, tokenizer) == "four five"


def test_a_target_is_never_cut() -> None:
    job = task("summarization", source_prompt="{document}")
    question = ask(job, document="one", summary="a b c d")
    for cut in (True, False):
        with pytest.raises(BadExample, match=r"^too long$"):
            job.rows(question, PatternTokenizer(), "encoder_decoder", 4, cut=cut)
        with pytest.raises(BadExample, match=r"^too long$"):
            job.rows(question, PatternTokenizer(), "decoder", 9, cut=cut)


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_a_prompt_is_cut_to_its_limit(kind: str) -> None:
    job, tokenizer = task("summarization"), PatternTokenizer()
    question = ask(job, answered=False, document="one two three four five six seven")
    whole = job.prompt(question, tokenizer, kind, 99)
    short = job.prompt(question, tokenizer, kind, len(whole) - 2)
    assert len(short) == len(whole) - 2
    assert "five" in tokenizer.decode(short)
    assert "six" not in tokenizer.decode(short)
    assert tokenizer.decode(short).endswith("TL;DR:" if kind == "decoder" else "five")


def test_every_summary_or_the_first_is_trained() -> None:
    tokenizer = PatternTokenizer()
    for train_on, wanted in (("first", ["one"]), ("all", ["one", "two"])):
        job = task("summarization", train_on=train_on)
        rows = job.rows(ask(job, document="d", summary=["one ", "two"]), tokenizer, "decoder", 99, cut=False)
        assert [written(row, tokenizer) for row in rows] == wanted


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("summarization", {"document": "d", "summary": " "}, "empty target"),
        ("summarization", {"document": "d", "summary": []}, "empty target"),
        ("summarization", {"document": "", "summary": "s"}, "empty document"),
        ("summarization", {"summary": "s"}, "missing document"),
        ("translation", {"source": "a", "target": ""}, "empty target"),
        ("translation", {"source": "a", "target": 3}, "target is not text"),
        ("code", {"instruction": "a", "code": "\n"}, "empty target"),
        ("code", {"instruction": "a", "code": "x", "tests": {"a": 1}}, "tests is not text"),
        ("code", {"instruction": "a", "code": "x", "signature": 1}, "signature is not text"),
    ],
)
def test_bad_records(name: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadExample, match=f"^{reason}$"):
        task(name).read(fields, answered=True)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("summarization", {"document": "d"}),
        ("translation", {"source": "s"}),
        ("code", {"instruction": "i"}),
        ("sentiment", {"text": "t"}),
        ("qa", {"question": "q", "context": "c"}),
    ],
)
def test_rows_to_predict_need_no_answer(name: str, fields: dict[str, Any]) -> None:
    """With or without it they are read as the same question."""
    job = task(name)
    answer = {"summary": "a", "target": "a", "code": "a", "label": "a", "answers": "c"}
    (bare,) = job.read(fields, answered=False)
    assert job.read({**fields, **{r: a for r, a in answer.items() if r in job.roles}}, answered=False) == [bare]
    kind = "encoder" if name == "sentiment" else "decoder"
    assert len(job.prompt(ask(job, answered=False, **fields), PatternTokenizer(), kind, 99)) > 1


def test_translation_finds_its_columns_by_language() -> None:
    job = task("translation", source="fr", target="en")
    assert job.roles["source"][:3] == ("fr", "translation.fr", "French")
    assert job.roles["target"][:3] == ("en", "translation.en", "English")
    assert task("translation", source="xx").values(ask(job, source="a", target="b"))["source_language"] == "xx"


def test_translation_needs_two_languages() -> None:
    assert task("translation", target="en").problems() == [("target", "is the language of the source too (en)")]
    assert task("translation", target=" ").problems() == [("target", "must name a language")]
