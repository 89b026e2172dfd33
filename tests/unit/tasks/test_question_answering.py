"""SQuAD's files, windows over long contexts, and the best span."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import BadExample
from llmkit.task_interface import Prediction, Question
from llmkit.tasks.spans import best_span, find_answer, ids_of, starts
from tests.unit.tasks.support import BOS, EOS, PatternTokenizer, ask, task, written

CONTEXT = "The tower was built in 1887 by Eiffel."


def article(*asked: dict[str, Any], context: str = CONTEXT) -> dict[str, Any]:
    return {"paragraphs": [{"context": context, "qas": list(asked)}]}


def test_an_article_holds_many_questions_and_faults_stand_in_their_place() -> None:
    fields = article(
        {"id": "1", "question": "When?", "answers": [{"text": "1887", "answer_start": 23}]},
        {"id": "2", "question": " ", "answers": [{"text": "1887", "answer_start": 23}]},
        {"id": "3", "question": "Who?", "answers": []},
    )
    first, *faults = task("qa").read(fields, answered=True)
    assert first == {"question": "When?", "context": CONTEXT, "answers": [{"text": "1887", "start": 23}]}
    assert [type(fault) for fault in faults] == [BadExample, BadExample]
    assert list(map(str, faults)) == ["empty question", "empty target"]
    asked = task("qa").read(fields, answered=False)
    assert len(asked) == 3
    assert asked[2] == {"question": "Who?", "context": CONTEXT}


@pytest.mark.parametrize(
    "answers",
    [
        "Eiffel",
        ["Eiffel"],
        {"text": ["Eiffel"], "answer_start": [31]},
        {"text": "Eiffel", "answer_start": 31},
        [{"text": "Eiffel", "answer_start": "31"}],
        [{"text": " Eiffel", "answer_start": 30}],
        [{"text": "Eiffel", "answer_start": 28}],
        [{"text": "Eiffel"}],
    ],
)
def test_the_spellings_of_an_answer(answers: Any) -> None:
    question = ask(task("qa"), question="Who?", context=CONTEXT, answers=answers)
    assert question.fields["answers"] == [{"text": "Eiffel", "start": 31}]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"context": "c", "answers": "c"}, "missing question"),
        ({"question": "q", "answers": "c"}, "missing context"),
        ({"question": "q", "context": "c"}, "missing answers"),
        ({"question": "q", "context": "c", "answers": " "}, "empty target"),
        ({"question": "q", "context": "c", "answers": []}, "empty target"),
        ({"question": "q", "context": "c", "answers": 3}, "answers is not text"),
        ({"question": "q", "context": "c", "answers": [3]}, "text is not text"),
        ({"paragraphs": "x"}, "paragraphs is no list"),
        ({"paragraphs": [{"context": "c"}]}, "a paragraph without qas"),
        ({"paragraphs": []}, "no question in the article"),
    ],
)
def test_bad_records(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadExample, match=f"^{reason}$"):
        task("qa").read(fields, answered=True)


def test_an_answer_outside_the_context_is_no_span_but_may_be_written() -> None:
    job, tokenizer = task("qa"), PatternTokenizer()
    question = ask(job, question="Who?", context=CONTEXT, answers="Gustave")
    with pytest.raises(BadExample, match=r"^answer not in context$"):
        job.rows(question, tokenizer, "encoder", 99, cut=False)
    (row,) = job.rows(question, tokenizer, "decoder", 99, cut=False)
    assert written(row, tokenizer) == "Gustave"


def test_unanswerable_questions() -> None:
    job, tokenizer = task("qa", unanswerable=True), PatternTokenizer()
    for fields in ({"answers": []}, {"answers": {"text": [], "answer_start": []}}, {"is_impossible": True}):
        question = ask(job, question="Why?", context=CONTEXT, **fields)
        assert question.fields["answers"] == []
    (row,) = job.rows(question, tokenizer, "encoder", 99, cut=False)
    assert row.answer.span == (0, 0)
    (row,) = job.rows(question, tokenizer, "encoder_decoder", 99, cut=False)
    assert written(row, tokenizer) == "unanswerable"


def test_problems() -> None:
    assert task("qa", null_threshold=1.0).problems() == [("null_threshold", "has no meaning without unanswerable=true")]
    assert task("qa", no_answer=" ").problems() == [("no_answer", "must be a word or more")]


def test_one_window_holds_question_and_context() -> None:
    job, tokenizer = task("qa"), PatternTokenizer()
    question = ask(job, question="Who built it?", context=CONTEXT, answers="Eiffel")
    (row,) = job.rows(question, tokenizer, "encoder", 99, cut=False)
    asked, context = tokenizer.encode("Who built it?"), tokenizer.encode(CONTEXT)
    assert row.ids.tolist() == [BOS, *asked, EOS, *context, EOS]
    assert row.answer.second == len(asked) + 2
    first, last = row.answer.span
    assert tokenizer.decode(row.ids[first : last + 1].tolist()) == " Eiffel"


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 60))
def test_windows_cover_everything_and_share_enough(length: int, room: int, stride: int) -> None:
    shared = min(stride, room // 2)
    found = starts(length, room, shared)
    parts = [range(start, min(start + room, length)) for start in found]
    assert set().union(*parts) == set(range(length))
    assert all(len(part) == min(room, length) for part in parts)
    assert all(len(set(a) & set(b)) >= shared for a, b in pairwise(parts))
    assert len(set(found)) == len(found)


def test_only_windows_with_the_whole_answer_point_at_it() -> None:
    job, tokenizer = task("qa", stride=2), PatternTokenizer()
    context = "a b c d e f g h i j"
    question = ask(job, question="q", context=context, answers={"text": ["e f"], "answer_start": [8]})
    rows = job.rows(question, tokenizer, "encoder", 8, cut=False)  # four ids of context each
    shown = [tokenizer.decode(row.ids[3:-1].tolist()) for row in rows]
    assert shown == ["a b c d", " c d e f", " e f g h", " g h i j"]
    assert [row.answer.span for row in rows] == [(0, 0), (5, 6), (3, 4), (0, 0)]


def test_an_answer_that_no_window_holds_is_too_long() -> None:
    job = task("qa", stride=1)
    question = ask(job, question="q", context="a b c d e f g h", answers="b c d e f")
    with pytest.raises(BadExample, match=r"^too long$"):
        job.rows(question, PatternTokenizer(), "encoder", 8, cut=True)
    with pytest.raises(BadExample, match=r"^too long$"):
        job.windows(question, PatternTokenizer(), 4)


def test_the_second_place_of_a_word_is_found_where_the_file_says() -> None:
    assert find_answer("an ant and an ape", "an", 11) == 11
    assert find_answer("an ant and an ape", "an", 10) == 11
    assert find_answer("an ant and an ape", "an", None) == 0
    assert find_answer("an ant", "an", -2) == 0
    assert find_answer("an ant", "bee", 0) is None


def test_ids_that_cover_the_answer_partly_are_none() -> None:
    spans_S2 = np.array([[0, 3], [3, 3], [4, 7], [7, 9]])
    assert ids_of(spans_S2, 0, 3) == (0, 0)
    assert ids_of(spans_S2, 4, 9) == (2, 3)
    assert ids_of(spans_S2, 5, 8) == (2, 3)
    assert ids_of(spans_S2, 7, 12) is None
    assert ids_of(spans_S2, 10, 12) is None


def test_a_context_that_was_cut_must_keep_the_answer() -> None:
    job, tokenizer = task("qa"), PatternTokenizer()
    long = CONTEXT + " It is high." * 20
    early = ask(job, question="When?", context=long, answers="1887")
    late = ask(job, question="When?", context="It is high. " * 20 + CONTEXT, answers="1887")
    (row,) = job.rows(early, tokenizer, "decoder", 40, cut=True)
    assert row.answer.n_cut > 0
    assert written(row, tokenizer) == "1887"
    with pytest.raises(BadExample, match=r"^answer cut away$"):
        job.rows(late, tokenizer, "decoder", 40, cut=True)


# -- the best span --------------------------------------------------------------------------------------------------


def plain_best(windows: Any, logits: Any, max_ids: int | None) -> tuple[float, int, int, int]:
    """By trying every pair."""
    pairs = [
        (float(scores[i, 0] + scores[j, 1]), -n, -i, -j)
        for n, (window, scores) in enumerate(zip(windows, logits, strict=True))
        for i in range(window.second, len(window.ids) - 1)
        for j in range(i, len(window.ids) - 1)
        if max_ids is None or j - i < max_ids
    ]
    score, n, i, j = max(pairs)
    return score, -n, -i, -j


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.sampled_from([None, 1, 3, 99]), st.booleans())
def test_best_span_is_that_of_trying_all(seed: int, length: int, max_ids: int | None, ties: bool) -> None:
    context = " ".join("abcdefghij"[i % 10] for i in range(length))
    job, tokenizer = task("qa", stride=2), PatternTokenizer()
    question = Question({"question": "q", "context": context}, "", 0)
    windows = job.windows(question, tokenizer, 12)
    numbers = np.random.default_rng(seed)
    logits = [numbers.integers(0, 3, (len(w.ids), 2)).astype(float) for w in windows]
    if not ties:
        logits = [numbers.normal(size=each.shape) for each in logits]
    best = best_span(windows, logits, max_ids)
    assert (best.score, best.window, best.first, best.last) == plain_best(windows, logits, max_ids)
    assert best.no_answer == min(each[0].sum() for each in logits)


def peaked(windows: Any, number: int, first: int, last: int) -> list[np.ndarray]:
    logits = [np.zeros((len(window.ids), 2), dtype=np.float32) for window in windows]
    logits[number][first, 0] = logits[number][last, 1] = 3
    return logits


def test_the_span_is_text_of_the_context() -> None:
    job, tokenizer = task("qa", stride=2), PatternTokenizer(r" ?\w+|.")
    question = Question({"question": "Who?", "context": CONTEXT}, "", 0)
    windows = job.windows(question, tokenizer, 10)
    number, place = next(
        (n, w.ids.tolist().index(tokenizer.encode(" 1887")[0]))
        for n, w in enumerate(windows)
        if tokenizer.encode(" 1887")[0] in w.ids
    )
    said = job.span_prediction(question, windows, peaked(windows, number, place, place))
    assert said == Prediction("1887", {"span": 6.0, "no_answer": 0.0})


def test_no_answer_must_beat_the_threshold() -> None:
    tokenizer = PatternTokenizer()
    question = Question({"question": "Who?", "context": CONTEXT}, "", 0)
    for changes, text in (
        ({}, "The"),
        ({"unanswerable": True}, ""),
        ({"unanswerable": True, "null_threshold": 3.9}, ""),
        ({"unanswerable": True, "null_threshold": 4.0}, "The"),
    ):
        job = task("qa", **changes)
        windows = job.windows(question, tokenizer, 99)
        logits = [np.zeros((len(window.ids), 2)) for window in windows]
        logits[0][0] = 2.0
        assert job.span_prediction(question, windows, logits).text == text


def test_contexts_keep_their_places() -> None:
    """Outer white space of a context counts in ``answer_start``."""
    question = ask(task("qa"), question="q", context="  an ape", answers={"text": ["ape"], "answer_start": [5]})
    assert question.fields["answers"] == [{"text": "ape", "start": 5}]
    assert re.match(r"an ape\n", task("qa").filled(question, "decoder").text)
