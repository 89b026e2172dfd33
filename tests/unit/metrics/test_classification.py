"""Scores of small tables, counted by hand."""

from __future__ import annotations

from math import sqrt

import pytest

from llmkit.metrics.classification import ClassScores, classification_report

GOLD = ["no"] * 4 + ["yes"] * 6
SAID = ["no", "no", "no", "yes", *["no"] * 2, *["yes"] * 4]  # of no: 3 right; of yes: 4


def test_two_labels() -> None:
    report = classification_report(GOLD, SAID, ["no", "yes"])
    assert report.confusion == [[3, 1], [2, 4]]
    assert report.accuracy == 0.7
    assert report.per_class["no"] == pytest.approx((3 / 5, 3 / 4, 6 / 9, 4))
    assert report.per_class["yes"] == pytest.approx((4 / 5, 4 / 6, 8 / 11, 6))
    assert report.macro_f1 == pytest.approx((6 / 9 + 8 / 11) / 2)
    assert report.mcc == pytest.approx((3 * 4 - 1 * 2) / sqrt(5 * 5 * 4 * 6))


def test_the_order_of_the_labels_is_that_of_the_table() -> None:
    report = classification_report(GOLD, SAID, ["yes", "no"])
    assert report.confusion == [[4, 2], [1, 3]]
    assert list(report.per_class) == ["yes", "no"]


def test_all_right_and_all_wrong() -> None:
    right = classification_report(GOLD, GOLD, ["no", "yes"])
    assert (right.accuracy, right.macro_f1, right.mcc) == (1.0, 1.0, 1.0)
    swapped = classification_report(GOLD, ["yes" if label == "no" else "no" for label in GOLD], ["no", "yes"])
    assert (swapped.accuracy, swapped.macro_f1, swapped.mcc) == (0.0, 0.0, -1.0)


def test_a_label_that_is_on_neither_side_is_in_the_table_and_not_in_the_mean() -> None:
    report = classification_report(["a", "b"], ["a", "b"], ["a", "b", "c"])
    assert report.per_class["c"] == ClassScores(0.0, 0.0, 0.0, 0)
    assert (report.macro_f1, report.confusion[2]) == (1.0, [0, 0, 0])


def test_a_label_that_is_only_predicted_counts_in_the_mean() -> None:
    report = classification_report(["a", "a"], ["a", "c"], ["a", "b", "c"])
    assert report.macro_f1 == pytest.approx((2 / 3 + 0) / 2)
    assert report.mcc == 0.0  # one side has a single label


def test_no_answer_lowers_recall_and_makes_no_class() -> None:
    report = classification_report(["a", "a", "b", "b"], ["a", "", "b", "b"], ["a", "b"])
    assert report.per_class["a"] == pytest.approx((1.0, 0.5, 2 / 3, 2))
    assert report.macro_f1 == pytest.approx((2 / 3 + 1) / 2)
    assert report.accuracy == 0.75
    assert list(report.per_class) == ["a", "b", ""]
    assert report.confusion == [[1, 0, 1], [0, 2, 0], [0, 0, 0]]


def test_a_label_that_the_model_does_not_know_is_a_class() -> None:
    """Validation data may have one that training data lacks: its examples are wrong, not left out."""
    report = classification_report(["a", "b", "new"], ["a", "b", "a"], ["a", "b"])
    assert report.per_class["new"] == ClassScores(0.0, 0.0, 0.0, 1)
    assert (report.accuracy, report.macro_f1) == pytest.approx((2 / 3, (2 / 3 + 1 + 0) / 3))


def test_no_examples() -> None:
    report = classification_report([], [], ["a", "b"])
    assert (report.accuracy, report.macro_f1, report.mcc) == (0.0, 0.0, 0.0)
    assert report.confusion == [[0, 0], [0, 0]]
    assert report.per_class["a"].support == 0


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError):
        classification_report(["a"], [], ["a", "b"])
