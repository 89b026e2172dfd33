"""Exact match and F1 of answers by the rules of SQuAD 1.1 (Rajpurkar et al. 2016) and 2.0 (Rajpurkar et al. 2018)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_scores(predictions: Sequence[str], golds: Sequence[Sequence[str]], *, version: int) -> dict[str, float]:
    """``exact_match`` and ``f1``, 0 .. 100, the best over the answers of each question, the mean over questions.

    Version 2: a question without answers is right where the prediction is empty, and the scores of questions with and
    without an answer are added as ``has_answer_...`` and ``no_answer_...`` where there are any.
    """
    scores = [_best(said, gold, version) for said, gold in zip(predictions, golds, strict=True)]
    found = _means(scores, "")
    if version == 2:
        answered = [bool(gold) for gold in golds]
        for name, wanted in (("has_answer_", True), ("no_answer_", False)):
            if part := [score for score, has in zip(scores, answered, strict=True) if has is wanted]:
                found |= _means(part, name)
    return found


def best_thresholds(
    predictions: Sequence[str], golds: Sequence[Sequence[str]], margins: Sequence[float]
) -> dict[str, float]:
    """The thresholds that would have scored best by the rules of version 2, and what they score, 0 .. 100.

    ``predictions`` are the best answers, given where the ``margin`` of "no answer" over the answer is at most the
    threshold; else there is no answer, which is wrong where there is one. Equal margins stand or fall together. Where
    no answer at all scores best, the threshold is 1 below all margins.
    """
    n, found = max(len(predictions), 1), dict[str, float]()
    scores = [_best(said, gold, 2) for said, gold in zip(predictions, golds, strict=True)]
    for place, name in enumerate(("exact_match", "f1")):
        gains: dict[float, float] = {}
        for margin, said, gold, score in zip(margins, predictions, golds, scores, strict=True):
            gain = score[place] if gold else -float(bool(said))
            gains[margin] = gains.get(margin, 0.0) + gain
        total = best = float(sum(not gold for gold in golds))
        threshold = min(margins, default=1.0) - 1
        for margin in sorted(gains):
            total += gains[margin]
            if total > best:
                best, threshold = total, margin
        found |= {f"best_{name}": 100 * best / n, f"best_{name}_threshold": threshold}
    return found


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _best(said: str, gold: Sequence[str], version: int) -> tuple[float, float]:
    answers = [text for text in gold if normalize(text)] or [""] if version == 2 else gold
    pairs = [(float(normalize(said) == normalize(text)), _f1(said, text, version)) for text in answers]
    return max((exact for exact, _ in pairs), default=0.0), max((f1 for _, f1 in pairs), default=0.0)


def _f1(said: str, gold: str, version: int) -> float:
    a, b = normalize(said).split(), normalize(gold).split()
    if version == 2 and not (a and b):
        return float(a == b)
    common = (Counter(a) & Counter(b)).total()
    if not common:
        return 0.0
    precision, recall = common / len(a), common / len(b)
    return 2 * precision * recall / (precision + recall)


def _means(scores: Sequence[tuple[float, float]], prefix: str) -> dict[str, float]:
    totals = zip(("exact_match", "f1"), map(sum, zip(*scores, strict=True)) if scores else (0.0, 0.0), strict=True)
    return {prefix + name: 100 * total / max(len(scores), 1) for name, total in totals}
