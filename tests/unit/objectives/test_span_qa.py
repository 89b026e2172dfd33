"""Spans: packed rows against single ones, the loss of transformers, smoothing and R-Drop over an example's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.interfaces import Batch, Row
from llmkit.objectives.span_qa import SpanQA
from tests.unit.models import tiny, wrapped
from tests.unit.models.test_encoder_config import bert, modern, roberta
from tests.unit.objectives.task_rows import IDS, check_packed, check_r_drop, span_rows, with_head

MODELS = {"bert": bert, "roberta": roberta, "modern": modern}


def objective(**changes: Any) -> SpanQA:
    return SpanQA(**{"label_smoothing": 0.0, "r_drop": 0.0, **changes})


def collate(rows: list[Row]) -> Batch:
    return objective().collate(rows, seq_len=32, ids=IDS)


def model_of(name: str = "bert", **changes: Any) -> Any:
    return with_head(tiny.built(MODELS[name](pooler=False, **changes)).eval(), 2, n_layers=1)  # type: ignore[arg-type]


def logits_alone(model: Any, row: Row) -> Tensor:
    """T2 from the example in a batch of its own."""
    found: Tensor = model.task_head(model.hidden_states(collate([row]))[0])
    return found


def spans_of(rows: list[Row]) -> list[tuple[int, int]]:
    return [row.answer.span for row in rows]  # type: ignore[union-attr, misc]


@pytest.mark.parametrize("name", MODELS)
def test_packed_examples_are_examples_one_by_one(name: str) -> None:
    batch = check_packed(objective(label_smoothing=0.1), model_of(name), span_rows())
    assert batch.counts == {"token": 0, "pair": 0, "example": len(span_rows())}


def test_a_wrapped_model_finds_spans_too() -> None:
    model = with_head(wrapped.built(wrapped.ENCODERS["lost positions"]), 2, width=16)
    check_packed(objective(), model, span_rows())


def test_labels_are_places_in_the_batch() -> None:
    rows = span_rows()
    batch = collate(rows)
    assert batch.examples is not None
    assert batch.segment_ids is not None
    flat, segments = batch.input_ids.flatten(), batch.segment_ids.flatten()
    places = zip(batch.examples.first_N.tolist(), batch.examples.last_N.tolist(), strict=True)
    for row, (first, last), (start, stop) in zip(rows, places, batch.examples.labels.tolist(), strict=True):
        assert row.answer is not None
        assert row.answer.span == (start - first, stop - first)
        assert flat[first : last + 1].tolist() == row.ids.tolist()
        assert int(segments[first : last + 1].sum()) == len(row.ids) - (row.answer.second or 0)


def test_the_loss_is_that_of_transformers() -> None:
    losses = pytest.importorskip("transformers.loss.loss_utils")
    model, rows = model_of(), span_rows()
    expected, n_correct = [], 0
    for row, (start, stop) in zip(rows, spans_of(rows), strict=True):
        starts, stops = logits_alone(model, row).T[:, None]
        expected.append(losses.ForQuestionAnsweringLoss(starts, stops, torch.tensor([start]), torch.tensor([stop])))
        n_correct += int(starts.argmax()) == start and int(stops.argmax()) == stop
    result = objective().loss(model, collate(rows))
    torch.testing.assert_close(result.losses["example"], torch.stack(expected).sum())
    torch.testing.assert_close(result.sums["nll"], torch.stack(expected).sum().detach())
    assert int(result.sums["n_correct"]) == n_correct
    means = objective().metrics({key: float(value) for key, value in result.sums.items()}, {"example": len(rows)})
    assert means == pytest.approx(
        {"loss": float(torch.stack(expected).mean().detach()), "accuracy": n_correct / len(rows)}
    )


def test_a_span_counts_as_right_when_both_of_its_ends_are() -> None:
    model, rows = model_of(), span_rows()
    best = [tuple(logits_alone(model, row).argmax(0).tolist()) for row in rows]
    for wrong in (0, 1, 3):
        spans = [(start, stop) for start, stop in best]
        for n in range(wrong):
            spans[n] = (spans[n][0], (spans[n][1] + 1) % len(rows[n].ids))
        given = [r._replace(answer=r.answer._replace(span=s)) for r, s in zip(rows, spans, strict=True)]  # type: ignore[union-attr]
        assert int(objective().loss(model, collate(given)).sums["n_correct"]) == len(rows) - wrong


def test_smoothing_is_over_the_tokens_of_the_example() -> None:
    model, rows = model_of(), span_rows()
    expected = sum(
        F.cross_entropy(logits_alone(model, row).T, torch.tensor(span), label_smoothing=0.3)
        for row, span in zip(rows, spans_of(rows), strict=True)
    )
    found = objective(label_smoothing=0.3).loss(model, collate(rows)).losses["example"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_r_drop(smoothing: float) -> None:
    model, batch = model_of(dropout=0.3), collate(span_rows())

    def logits_of() -> Tensor:
        return objective().choices(model, batch).logits_NQC

    check_r_drop(lambda weight: objective(r_drop=weight, label_smoothing=smoothing), model, batch, logits_of)


def test_another_example_of_the_row_changes_nothing() -> None:
    model, rows, others = model_of(), span_rows(), span_rows(seed=1)
    mixed = [rows[0], *others[1:]]
    one, two = (objective().choices(model, collate(given)).logits_NQC for given in (rows, mixed))
    assert torch.equal(one[0], two[0])
    assert not torch.equal(one[1], two[1])


def test_examples_without_an_answer_can_be_read() -> None:
    rows = span_rows()
    asked = [row._replace(answer=row.answer._replace(span=None)) for row in rows]  # type: ignore[union-attr]
    batch, model = collate(asked), model_of()
    assert batch.n_examples == 0
    assert torch.equal(
        objective().choices(model, batch).logits_NQC, objective().choices(model, collate(rows)).logits_NQC
    )
    with pytest.raises((RuntimeError, IndexError)):
        objective().loss(model, batch)


def test_the_rest_of_what_objectives_say() -> None:
    task = objective()
    assert (task.trains, task.reads, task.scores_all_text) == (("encoder",), "rows", False)
    assert (task.window(20), task.target_len(20), task.predicted_share) == ((20, 0), 0, 0.0)
    assert [name for name, _ in objective(label_smoothing=-0.1).problems()] == ["label_smoothing"]
    assert task.problems() == []
