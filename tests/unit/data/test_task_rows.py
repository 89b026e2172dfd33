"""Rows in memory: what goes in comes out; what does not fit is counted; what cannot be learned is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.loader import eval_batches
from llmkit.data.task_rows import TaskDataset, encode_rows
from llmkit.errors import BadExample, DataError
from llmkit.interfaces import Answer, Row
from llmkit.task_interface import Question
from tests.unit.data.task_support import BYTES, Base, Copy, Label, Spans, questions


class Given(Base):
    """Rows that are given in the question."""

    def rows(self, question: Question, tokenizer: Any, kind: str, max_len: int, *, cut: bool) -> Any:
        return question.fields["rows"]


def encode(
    task: Any,
    rows: list[dict[str, Any]],
    kind: str = "decoder",
    max_len: int = 64,
    long_rows: str = "error",
    **more: Any,
) -> TaskDataset:
    return encode_rows(questions(rows), task, BYTES, kind, max_len, long_rows, **more)


def pairs(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"source": source, "target": target} for source, target in pairs]


def same(a: Row, b: Row) -> bool:
    one, two = a.answer or Answer(), b.answer or Answer()
    arrays = [(a.ids, b.ids), (one.trained, two.trained), (one.target, two.target)]
    return (one.label, one.span, one.second, one.n_cut) == (two.label, two.span, two.second, two.n_cut) and all(
        (x is None) == (y is None) and (x is None or y is None or np.array_equal(x, y)) for x, y in arrays
    )


IDS = st.lists(st.integers(0, 257), min_size=1, max_size=9).map(lambda ids: np.array(ids, np.int64))
MAYBE = st.none() | st.integers(0, 9)


@st.composite
def answers(draw: st.DrawFn, n: int) -> Answer:
    kind = draw(st.sampled_from(["trained", "target", "label", "span", "label and target"]))
    trained = target = label = span = None
    if kind == "trained":
        trained = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)), bool)
        trained[-1] = True
    if "target" in kind:
        target = np.append(draw(IDS), 1)
    if "label" in kind:
        label = draw(st.integers(0, 9))
    if kind == "span":
        span = (draw(st.integers(0, 9)), draw(st.integers(0, 9)))
    return Answer(trained, target, label, span, draw(MAYBE), draw(st.integers(0, 9)))


@st.composite
def row_lists(draw: st.DrawFn) -> list[dict[str, Any]]:
    out = []
    for _ in range(draw(st.integers(1, 5))):
        rows = []
        for _ in range(draw(st.integers(1, 3))):
            ids = np.append(draw(IDS), 1)
            rows.append(Row(ids, (), answer=draw(answers(ids.size))))
        out.append({"rows": rows})
    return out


@settings(derandomize=True, max_examples=80, deadline=None)
@given(asked=row_lists())
def test_rows_come_out_as_they_went_in(asked: list[dict[str, Any]]) -> None:
    dataset = encode(Given(), asked)
    wanted = [(number, row) for number, question in enumerate(asked) for row in question["rows"]]
    assert dataset.n_sequences == len(wanted)
    for place, (number, row) in enumerate(wanted):
        found = dataset.row(place, (5, place), place + 1)
        assert same(found, row)
        assert (found.seed, found.position, found.pairs) == ((5, place), place + 1, ())
        assert found.ids.dtype == np.int64
        assert dataset.question_of(place) == number
    assert dataset.lengths().tolist() == [row.ids.size for _, row in wanted]
    assert dataset.n_tokens == sum(
        row.ids.size + (row.answer.target.size if row.answer is not None and row.answer.target is not None else 0)
        for _, row in wanted
    )
    assert encode(Given(), asked).key == dataset.key
    changed = asked[0]["rows"][0]
    ids = changed.ids.copy()
    ids[0] = (ids[0] + 1) % 258
    other = [{"rows": [changed._replace(ids=ids), *asked[0]["rows"][1:]]}, *asked[1:]]
    assert encode(Given(), other).key != dataset.key


@pytest.mark.parametrize(
    "change",
    [
        {"trained": np.array([False, False, True])},
        {"trained": None, "label": 0},
        {"trained": None, "span": (0, 0)},
        {"second": 1},
        {"n_cut": 1},
    ],
)
def test_the_key_covers_every_part_of_an_answer(change: dict[str, Any]) -> None:
    row = Row(np.array([0, 5, 1]), (), answer=Answer(trained=np.array([False, True, True])))
    assert row.answer is not None
    other = row._replace(answer=row.answer._replace(**change))
    assert encode(Given(), [{"rows": [row]}]).key != encode(Given(), [{"rows": [other]}]).key


def test_rows_are_their_own_copies() -> None:
    dataset = encode(Copy(), pairs(("a", "b")))
    row = dataset.row(0, (), None)
    row.ids[:] = 7
    assert row.answer is not None
    assert row.answer.trained is not None
    row.answer.trained[:] = False
    assert dataset.row(0, (), None).ids.tolist() == [0, 99, 100, 1]
    assert dataset.row(0, (), None).answer.trained.tolist() == [False, False, True, True]  # type: ignore[union-attr]


def test_the_report_counts_rows_tokens_and_lengths() -> None:
    report = encode(Copy(), pairs(("aé", "b"), ("a", "bcd"))).report
    assert (report.n_questions, report.n_kept, report.n_rows) == (2, 2, 2)
    assert (report.n_tokens, report.n_trained, report.longest, report.longest_target) == (12, 6, 6, 0)
    assert report.percentiles == {50: 6, 90: 6, 99: 6}
    report = encode(Copy(), pairs(("aé", "b"), ("a", "bcd")), "encoder_decoder").report
    assert (report.n_tokens, report.n_trained, report.longest, report.longest_target) == (12, 6, 4, 4)
    assert report.lines() == [
        "2 rows of 2 questions, 12 tokens, 6 predicted; longest 4 (50 % within 4, 90 % within 4, 99 % within 4)",
        "targets: longest 4 (50 % within 4, 90 % within 4, 99 % within 4)",
    ]
    assert encode(Label(), [{"text": "a", "label": "no"}] * 3).report.n_trained == 3
    assert encode(Copy(), pairs(("aé", "b"))).n_bytes == 4


def test_percentiles_are_lengths_of_rows() -> None:
    report = encode(Label(), [{"text": "x" * n, "label": "no"} for n in range(1, 101)], max_len=200).report
    assert report.longest == 102
    for share, length in report.percentiles.items():
        assert sum(n + 2 <= length for n in range(1, 101)) >= share


def test_several_windows_of_one_question() -> None:
    asked = [
        {"question": "q", "context": "abcdefghij", "answer": "b", "start": 1},
        {"question": "q", "context": "ab", "answer": "b", "start": 1},
    ]
    dataset = encode(Spans(), asked, "encoder", 8)
    owners = [dataset.question_of(row) for row in range(dataset.n_sequences)]
    assert owners == [0, 0, 0, 0, 1]
    assert [dataset.row(row, (), None).answer.span for row in range(5)] == [(4, 4), (0, 0), (0, 0), (0, 0), (4, 4)]  # type: ignore[union-attr]
    assert (dataset.report.n_kept, dataset.report.n_rows, len(dataset.questions)) == (2, 5, 2)


# -- rows that are too long -----------------------------------------------------------------------------------------

LONG = pairs(("a", "b"), ("x" * 20, "b"), ("a", "y" * 20), ("ab", "c"))


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_error_says_how_many(kind: str) -> None:
    with pytest.raises(DataError, match="2 of 4 questions do not fit in 12 tokens") as caught:
        encode(Copy(), LONG, kind, 12)
    assert "file:2, file:3" in str(caught.value)
    assert caught.value.where == "data.long_rows"
    assert encode(Copy(), LONG, kind, 64).report.dropped.total == 0


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_drop_leaves_them_out(kind: str) -> None:
    dataset = encode(Copy(), LONG, kind, 12, "drop")
    assert [q.number for q in dataset.questions] == [0, 3]
    assert [dataset.question_of(row) for row in range(2)] == [0, 1]
    assert dataset.report.dropped.counts == {"too long": 2}
    assert dataset.report.lines()[-1] == "left out: 2 too long (first: file:2, file:3)"


@pytest.mark.parametrize(("kind", "n_cut"), [("decoder", 11), ("encoder_decoder", 9)])
def test_truncate_cuts_the_question_and_never_the_answer(kind: str, n_cut: int) -> None:
    dataset = encode(Copy(), LONG, kind, 12, "truncate")
    assert [q.number for q in dataset.questions] == [0, 1, 3]
    report = dataset.report
    assert (report.n_truncated, report.n_cut_ids, report.dropped.counts) == (1, n_cut, {"too long": 1})
    assert f"cut to fit: 1 rows, {n_cut} tokens of questions left out" in report.lines()
    for place, question in enumerate(dataset.questions):
        row = dataset.row(place, (), None)
        assert row.answer is not None
        ids = row.ids[row.answer.trained] if kind == "decoder" else row.answer.target
        assert BYTES.decode(list(ids if ids is not None else [])) == question.fields["target"]
        assert row.ids.size <= 12


def test_nothing_left_is_refused() -> None:
    with pytest.raises(DataError, match="no row is left of 1 questions") as caught:
        encode(Copy(), LONG[1:2], max_len=12, long_rows="drop")
    assert "1 too long (first: file:1)" in str(caught.value)
    with pytest.raises(DataError, match="there is no question"):
        encode(Copy(), [])


# -- what cannot be learned -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [Answer(trained=np.zeros(2, bool)), Answer(target=np.zeros(0, np.int64)), Answer(), None],
)
def test_rows_without_anything_to_predict(answer: Answer | None) -> None:
    nothing = {"rows": [Row(np.array([0, 1]), (), answer=answer)]}
    good = {"rows": [Row(np.array([0, 1]), (), answer=Answer(label=1))]}
    with pytest.raises(DataError, match="1 of 1 questions cannot be used"):
        encode(Given(), [nothing])
    with pytest.raises(DataError, match="no row is left"):
        encode(Given(), [nothing, {"rows": []}], max_bad_fraction=1.0)
    dataset = encode(Given(), [nothing, good], max_bad_fraction=0.5)
    assert dataset.report.dropped.counts == {"nothing to predict": 1}
    assert (dataset.n_sequences, dataset.report.n_trained) == (1, 1)


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_an_answer_without_a_trained_end_is_refused(kind: str) -> None:
    with pytest.raises(DataError, match="the end of the answer is not trained: 2 without an end token") as caught:
        encode(Copy(end=False), pairs(("a", "b"), ("c", "d")), kind)
    assert "file:1, file:2" in str(caught.value)
    assert caught.value.fix


def test_the_end_must_be_in_the_last_run() -> None:
    """A turn that ended earlier does not end this one; text after the end token, as templates write it, is fine."""
    ids = np.array([0, 5, 1, 5, 6, 7])
    late = Row(ids, (), answer=Answer(trained=np.array([False, True, True, False, True, True])))
    with pytest.raises(DataError, match="not trained"):
        encode(Given(), [{"rows": [late]}])
    newline = Row(np.array([0, 5, 1, 12]), (), answer=Answer(trained=np.array([False, True, True, True])))
    untrained_end = Row(np.array([0, 5, 1]), (), answer=Answer(trained=np.array([False, True, False])))
    assert encode(Given(), [{"rows": [newline]}]).n_sequences == 1
    with pytest.raises(DataError, match="not trained"):
        encode(Given(), [{"rows": [untrained_end]}])


def test_other_faults_are_limited() -> None:
    rows = [{"text": "a", "label": "no"}] * 9 + [{"text": "a", "label": "maybe"}]
    with pytest.raises(DataError, match=r"1 of 10 questions cannot be used \(10.00%\)") as caught:
        encode(Label(), rows)
    assert "1 unknown label (first: file:10)" in str(caught.value)
    assert caught.value.fix.endswith("data.max_bad_fraction=0.100")
    assert encode(Label(), rows, max_bad_fraction=0.1).report.dropped.counts == {"unknown label": 1}


def test_a_mark_for_every_id() -> None:
    row = Row(np.array([0, 1]), (), answer=Answer(trained=np.array([True])))
    with pytest.raises(ValueError, match="1 marks for 2 ids"):
        encode(Given(), [{"rows": [row]}])


def test_the_loader_reads_it() -> None:
    dataset = encode(Copy(), pairs(*((str(n), str(n)) for n in range(5))))
    seen: list[str] = []
    for rank in (0, 1):
        for batch in eval_batches(dataset, lambda rows: list(rows), 2, rank, 2):  # type: ignore[arg-type,return-value]
            seen += [BYTES.decode(row.ids.tolist()[1:2]) for row in batch]  # type: ignore[attr-defined]
    assert sorted(seen) == list("01234")


def test_other_errors_of_a_task_are_not_hidden() -> None:
    class Broken(Base):
        def rows(self, *_: Any, **__: Any) -> Any:
            raise ValueError("a bug")

    assert issubclass(BadExample, ValueError)
    with pytest.raises(ValueError, match="a bug"):
        encode(Broken(), [{}])
