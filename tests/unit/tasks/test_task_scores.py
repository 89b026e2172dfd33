"""Tasks with the real metrics: predictions as models give them, those that are missing among them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from llmkit.task_interface import Prediction, Question
from tests.unit.tasks.support import PatternTokenizer, ask, task


@pytest.mark.parametrize("name", ["sentiment", "qa", "summarization", "translation", "code", "chat"])
def test_no_questions(name: str) -> None:
    """Every metric is there and is 0, and nothing is said of tests that no question has."""
    if name in ("translation", "code"):
        pytest.importorskip("sacrebleu", reason="BLEU and chrF are those of the package sacrebleu")
    changes: dict[str, Any] = {"sentiment": {"labels": ["no", "yes"]}, "code": {"run_code": True}}.get(name, {})
    job = task(name, **changes)
    found = job.metrics([], [])
    assert set(found.values()) == {0.0}
    assert job.best_metric in found or name in ("code", "chat")
    json.dumps(job.details([], []), allow_nan=False)


def test_a_text_that_was_not_classified_is_wrong_and_is_shown() -> None:
    job = task("sentiment", labels=["no", "yes"])
    questions = [ask(job, text="t", label=label) for label in ("no", "no", "yes")]
    said = [Prediction("no"), Prediction(""), Prediction("yes")]
    assert job.metrics(questions, said)["accuracy"] == pytest.approx(2 / 3)
    details = job.details(questions, said)
    assert details["labels"] == ["no", "yes", "(no answer)"]
    assert details["confusion"] == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert details["per_class"]["no"]["support"] == 2


@pytest.mark.parametrize(("target", "tokenizer"), [("de", "13a"), ("zh", "zh"), ("ja", "char")])
def test_bleu_of_a_language_and_its_signature(target: str, tokenizer: str) -> None:
    pytest.importorskip("sacrebleu", reason="BLEU and chrF are those of the package sacrebleu")
    job = task("translation", target=target)
    questions = [ask(job, source="a", target="今日は天気が良い日")]
    said = [Prediction("今日は天気が悪い日\n")]
    assert (job.metrics(questions, said)["bleu"] > 0) == (target != "de")
    assert f"|tok:{tokenizer}|" in job.details(questions, said)["signatures"]["bleu"]


def test_code_has_the_signature_of_chrf() -> None:
    pytest.importorskip("sacrebleu", reason="chrF is that of the package sacrebleu")
    job = task("code")
    questions = [ask(job, instruction="i", code="x = 1")]
    said = [Prediction("```python\nx = 1\n```")]
    assert job.metrics(questions, said)["chrf"] == 100
    assert job.details(questions, said)["signatures"]["chrf"].startswith("nrefs:1|")


def span_said(job: Any, question: Question, span: float, no_answer: float) -> Prediction:
    """The first word of the context, with these scores."""
    windows = job.windows(question, PatternTokenizer(), 99)
    logits_T2 = np.zeros((len(windows[0].ids), 2))
    logits_T2[0] = no_answer / 2
    logits_T2[windows[0].second] = span / 2
    said: Prediction = job.span_prediction(question, windows, [logits_T2])
    return said


def test_the_best_threshold_makes_the_best_score() -> None:
    """Spans that lost to "no answer" are scored too. Set as ``task.null_threshold`` it gives what it promises."""
    job = task("qa", unanswerable=True)
    fields = {"question": "q", "context": "one two"}
    questions = [ask(job, **fields, answers=["one"])] * 2 + [ask(job, **fields, is_impossible=True)]
    scores = [(4.0, 1.0), (0.1, 0.4), (1.0, 1.9)]
    said = [span_said(job, *pair) for pair in ((q, *s) for q, s in zip(questions, scores, strict=True))]
    assert [prediction.text for prediction in said] == ["one", "", ""]
    assert job.metrics(questions, said)["f1"] == pytest.approx(200 / 3)
    found = job.details(questions, said)["null_threshold"]
    assert found["best_f1"] == found["best_exact_match"] == pytest.approx(100)

    better = task("qa", unanswerable=True, null_threshold=found["best_f1_threshold"])
    said = [span_said(better, *pair) for pair in ((q, *s) for q, s in zip(questions, scores, strict=True))]
    assert better.metrics(questions, said)["f1"] == pytest.approx(100)


def test_questions_without_scores_are_answered_with_nothing() -> None:
    """A question that left no room for a window."""
    job = task("qa", unanswerable=True)
    questions = [ask(job, question="q", context="one", answers=["one"])] * 2
    details = job.details(questions, [span_said(job, questions[0], 2.0, 1.0), Prediction("")])
    assert details["null_threshold"]["best_f1"] == 50
    json.dumps(details, allow_nan=False)


def test_written_answers_and_version_1_have_no_threshold() -> None:
    fields = {"question": "q", "context": "one", "answers": ["one"]}
    for job, said in (
        (task("qa", unanswerable=True), Prediction("one")),
        (task("qa"), Prediction("one", {"span": 1.0, "no_answer": 0.0})),
    ):
        assert job.details([ask(job, **fields)], [said]) == {}


def test_summaries_are_scored_by_sentence() -> None:
    job = task("summarization")
    questions = [ask(job, document="d", summary="Two two. One one.")]
    found = job.metrics(questions, [Prediction("One one. Two two.\n")])
    assert (found["rougeL"], found["rougeLsum"]) == pytest.approx((50.0, 100.0))
