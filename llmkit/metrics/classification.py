"""Accuracy, F1, Matthews' correlation and the confusion matrix of one label an example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple


class ClassScores(NamedTuple):
    """One label's scores, 0 .. 1; ``support`` is how many examples have it."""

    precision: float
    recall: float
    f1: float
    support: int


class ClassReport(NamedTuple):
    """``confusion[i][j]``: examples of label i that were given label j, in the order of ``per_class``."""

    accuracy: float
    macro_f1: float
    mcc: float
    per_class: dict[str, ClassScores]
    confusion: list[list[int]]


def classification_report(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> ClassReport:
    """The scores of ``predicted`` beside ``gold``; labels on either side that ``labels`` lacks come behind those.

    ``macro_f1`` is the mean of F1, 0 where a label is never right, over the labels that occur; what was predicted and
    is no label (a question that was not answered) makes no class of its own there. ``mcc`` is the correlation of
    Gorodkin 2004 (for two labels that of Matthews 1975), 0 where one side has a single label. Without examples all
    scores are 0.
    """
    pairs = Counter(zip(gold, predicted, strict=True))
    every = list(dict.fromkeys([*labels, *sorted({*gold, *predicted})]))
    confusion = [[pairs[right, said] for said in every] for right in every]
    per_class = {label: _scores(number, confusion) for number, label in enumerate(every)}
    classes, said = {*labels, *gold}, set(predicted)
    f1 = [scores.f1 for label, scores in per_class.items() if label in classes and (scores.support or label in said)]
    n_right = sum(confusion[i][i] for i in range(len(every)))
    accuracy, macro_f1 = n_right / max(len(gold), 1), sum(f1) / max(len(f1), 1)
    return ClassReport(accuracy, macro_f1, _mcc(confusion), per_class, confusion)


def _scores(number: int, confusion: Sequence[Sequence[int]]) -> ClassScores:
    right = confusion[number][number]
    support, said = sum(confusion[number]), sum(row[number] for row in confusion)
    f1 = 2 * right / (support + said) if support + said else 0.0
    return ClassScores(right / said if said else 0.0, right / support if support else 0.0, f1, support)


def _mcc(confusion: Sequence[Sequence[int]]) -> float:
    """(c s - p.t) / sqrt((s^2 - p.p)(s^2 - t.t)): s examples, c right ones, p and t predicted and true counts."""
    true = [sum(row) for row in confusion]
    said = [sum(column) for column in zip(*confusion, strict=True)]
    s, c = sum(true), sum(confusion[i][i] for i in range(len(confusion)))
    spread = (s * s - sum(p * p for p in said)) * (s * s - sum(t * t for t in true))
    agreement = c * s - sum(p * t for p, t in zip(said, true, strict=True))
    return agreement / sqrt(spread) if spread else 0.0
