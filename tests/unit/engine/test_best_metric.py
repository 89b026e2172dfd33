"""Names of metrics, and which of two values is better."""

from __future__ import annotations

import math

import pytest

from llmkit.engine.best_metric import BestMetric


@pytest.mark.parametrize(
    ("chosen", "usual", "name"),
    [
        (None, "loss", "val/loss"),
        (None, "f1", "val/f1"),
        ("accuracy", "loss", "val/accuracy"),
        ("val/bleu", "loss", "val/bleu"),
        ("val_old/loss", "loss", "val_old/loss"),
    ],
)
def test_a_metric_is_one_of_the_validation_rows_unless_it_says_otherwise(
    chosen: str | None, usual: str, name: str
) -> None:
    assert BestMetric.of(chosen, usual).name == name


@pytest.mark.parametrize("name", ["loss", "val/loss", "val_old/loss", "ppl", "pseudo_ppl", "bpb", "pair_loss"])
def test_losses_are_better_when_lower(name: str) -> None:
    metric = BestMetric.of(name)
    assert metric.is_better(1.0, 2.0)
    assert not metric.is_better(2.0, 1.0)


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "mcc", "bleu", "rougeL", "exact_match", "pass_at_1"])
def test_scores_are_better_when_higher(name: str) -> None:
    metric = BestMetric.of(name)
    assert metric.is_better(2.0, 1.0)
    assert metric.is_better(-0.5, -1.0)
    assert not metric.is_better(1.0, 2.0)


@pytest.mark.parametrize("name", ["loss", "accuracy"])
def test_equal_is_not_better_and_no_number_beats_nothing(name: str) -> None:
    metric = BestMetric.of(name)
    assert not metric.is_better(1.0, 1.0)
    assert metric.is_better(1.0, None)
    assert not any(metric.is_better(value, best) for value in (math.nan, math.inf, -math.inf) for best in (None, 1.0))
