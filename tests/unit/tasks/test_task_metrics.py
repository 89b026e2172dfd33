"""What tasks hand to the metrics, and what they make of the answer. The metrics themselves are tested elsewhere."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from llmkit.errors import DataError
from llmkit.metrics.classification import ClassReport, ClassScores
from llmkit.task_interface import Prediction
from tests.unit.tasks.support import ask, task


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand-ins that note their arguments."""
    noted: list[Any] = []

    def stand_in(module: str, name: str, reply: Any) -> None:
        fake = sys.modules.get(f"llmkit.{module}")
        if not isinstance(fake, ModuleType) or not hasattr(fake, "stands_in"):
            fake = ModuleType(f"llmkit.{module}")
            fake.stands_in = True  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, f"llmkit.{module}", fake)

        def call(*arguments: Any, **named: Any) -> Any:
            noted.append((name, (*arguments, named) if named else arguments))
            return reply(*arguments) if callable(reply) else reply

        setattr(fake, name, call)

    table = {label: ClassScores(0.1, 0.2, 0.3, 4) for label in ("negative", "positive")}
    report = ClassReport(0.7, 0.6, 0.2, table, [[1, 0], [1, 1]])
    stand_in("metrics.classification", "classification_report", report)
    stand_in("metrics.rouge", "rouge", {"rouge1": 10.0, "rougeL": 9.0})
    stand_in("metrics.translation", "sacre_bleu", (30.0, 50.0, ("nrefs:1", "nc:6")))
    stand_in("metrics.squad", "squad_scores", {"exact_match": 50.0, "f1": 60.0})
    stand_in("metrics.pass_at_k", "pass_at_k", lambda n, c, k: float(c >= k))
    stand_in("code_runner", "run_tests", lambda programs, *_: [SimpleNamespace(passed="good" in p) for p in programs])
    sys.modules["llmkit.code_runner"].Limits = SimpleNamespace  # type: ignore[attr-defined]
    return noted


def test_sentiment(calls: list[Any]) -> None:
    job = task("sentiment", labels=["negative", "positive"])
    questions = [ask(job, text="a", label=0), ask(job, text="b", label=1)]
    said = [Prediction("negative"), Prediction("negative")]
    assert job.metrics(questions, said) == {"accuracy": 0.7, "macro_f1": 0.6, "mcc": 0.2}
    name, arguments = calls[0]
    assert (name, arguments) == (
        "classification_report",
        (["negative", "positive"], ["negative", "negative"], ["negative", "positive"]),
    )
    assert job.best_metric in job.metrics(questions, said)
    details = job.details(questions, said)
    assert details["labels"] == ["negative", "positive"]
    row = {"precision": 0.1, "recall": 0.2, "f1": 0.3, "support": 4}
    assert details["per_class"] == {"negative": row, "positive": row}
    assert details["confusion"] == [[1, 0], [1, 1]]


def test_summarization(calls: list[Any]) -> None:
    job = task("summarization")
    questions = [
        ask(job, document="d", summary=["one two", "three four five six"]),
        ask(job, document="e", summary="x"),
    ]
    found = job.metrics(questions, [Prediction(" a b "), Prediction("")])
    assert calls == [("rouge", (["a b", ""], [["one two", "three four five six"], ["x"]]))]
    assert (found["words"], found["reference_words"], found["length_ratio"]) == (1.0, 2.0, 0.5)
    assert job.best_metric in found
    assert job.details(questions, []) == {}


def test_translation(calls: list[Any]) -> None:
    job = task("translation")
    questions = [ask(job, source="a", target="b ")]
    assert job.metrics(questions, [Prediction(" c\n")]) == {"bleu": 30.0, "chrf": 50.0}
    assert calls == [("sacre_bleu", (["c"], [["b"]], "de"))]
    assert job.details(questions, [Prediction("c")]) == {"signatures": {"bleu": "nrefs:1", "chrf": "nc:6"}}


def test_questions_with_and_without_an_answer(calls: list[Any]) -> None:
    job = task("qa", unanswerable=True)
    fields = {"question": "q", "context": "a b"}
    questions = [ask(job, **fields, answers=["a", "a b"]), ask(job, **fields, is_impossible=True)]
    found = job.metrics(questions, [Prediction(" a"), Prediction("Unanswerable ")])
    assert calls == [("squad_scores", (["a", ""], [["a", "a b"], []], {"version": 2}))]
    assert job.best_metric in found


def test_the_words_for_no_answer_are_words_where_all_have_one(calls: list[Any]) -> None:
    job = task("qa")
    job.metrics([ask(job, question="q", context="unanswerable", answers="unanswerable")], [Prediction("unanswerable")])
    assert calls == [("squad_scores", (["unanswerable"], [["unanswerable"]], {"version": 1}))]


def test_code_that_is_not_run(calls: list[Any]) -> None:
    job = task("code")
    questions = [ask(job, instruction="i", code=code, tests=["assert x"]) for code in ("x = 1", "y = 2")]
    found = job.metrics(questions, [Prediction("```python\nx = 1\n```"), Prediction("y = ")])
    assert found == {"exact_match": 50.0, "valid_syntax": 50.0, "chrf": 50.0}
    assert calls == [("sacre_bleu", (["x = 1", "y ="], [["x = 1"], ["y = 2"]]))]
    assert job.best_metric in found


def test_code_that_is_run(calls: list[Any]) -> None:
    """Every sample of every question that has tests, and no k beyond the number of samples."""
    job = task("code", run_code=True, k=[1, 2, 5])
    tests = {"tests": ["assert good"], "setup": "import re"}
    questions = [ask(job, instruction="i", code="x", **extra) for extra in (tests, {}, tests)]
    said = [Prediction("x", samples=("y",)), Prediction("z"), Prediction("w", samples=("v",))]
    found = job.metrics(questions, said)
    (programs, limits, insecure), *_ = (arguments for name, arguments in calls if name == "run_tests")
    assert programs == [f"{text}\n\nimport re\nassert good\n" for text in "xywv"], "the setup may use the code"
    assert (vars(limits), insecure) == ({"seconds": 10.0, "memory_mb": 512}, False)
    assert (found["pass_at_1"], found["pass_at_2"], found["n_tested"]) == (1.0, 1.0, 2.0)
    assert "pass_at_5" not in found
    assert [arguments for name, arguments in calls if name == "pass_at_k"] == [(2, 2, 1)] * 2 + [(2, 2, 2)] * 2


def test_nothing_to_run(calls: list[Any]) -> None:
    job = task("code", run_code=True)
    with pytest.raises(DataError, match="no question has tests"):
        job.metrics([ask(job, instruction="i", code="x")], [Prediction("x")])


def test_the_score_of_one_answer(calls: list[Any]) -> None:
    """By the metric that means something for one answer; no code is run for it."""
    code = task("code", run_code=True)
    assert code.answer_score(ask(code, instruction="i", code="x", tests=["assert x"]), Prediction("y")) == 50.0
    assert [name for name, _ in calls] == ["sacre_bleu"]
    summary, qa = task("summarization"), task("qa")
    assert summary.answer_score(ask(summary, document="d", summary="x"), Prediction("x")) == 9.0
    assert qa.answer_score(ask(qa, question="q", context="a b", answers=["a"]), Prediction("b")) == 60.0
    label = task("sentiment", labels=["negative", "positive"])
    question = ask(label, text="a", label=1)
    assert label.answer_score(question, Prediction("negative", {"negative": 0.8, "positive": 0.2})) == 0.2
    chat = task("chat")
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert chat.answer_score(ask(chat, messages=talk), Prediction("a a a b")) == 0.5
