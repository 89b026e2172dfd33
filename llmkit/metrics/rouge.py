"""ROUGE (Lin 2004) as the package ``rouge-score`` counts it, without stemming."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_WORDS = re.compile(r"[a-z0-9]+")
_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)\]]))\s+|\n+")

Tokens = Sequence[str]


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """F1 of ``NAMES``, 0 .. 100, the mean over predictions; of several references the best for each name, 0 of none.

    Words are runs of a-z and 0-9 of the lower-cased text; other letters part words and are not compared. ``rougeLsum``
    compares sentence by sentence: a text is cut at line ends and behind ``.``, ``!`` and ``?``, with a quotation mark
    or bracket after them or not, where white space follows.
    """
    totals = dict.fromkeys(NAMES, 0.0)
    for prediction, texts in zip(predictions, references, strict=True):
        scores = [_scores(prediction, text) for text in texts]
        for name in NAMES:
            totals[name] += max((score[name] for score in scores), default=0.0)
    return {name: 100 * total / max(len(predictions), 1) for name, total in totals.items()}


def sentences(text: str) -> list[str]:
    """The parts of a text that ``rougeLsum`` compares."""
    return [part for part in _SENTENCE_END.split(text) if part]


def _scores(prediction: str, reference: str) -> dict[str, float]:
    said, wanted = _words(prediction), _words(reference)
    return {
        "rouge1": _ngrams(said, wanted, 1),
        "rouge2": _ngrams(said, wanted, 2),
        "rougeL": _f1(len(_common_places(wanted, said)), len(said), len(wanted)),
        "rougeLsum": _by_sentence(
            [_words(part) for part in sentences(prediction)], [_words(part) for part in sentences(reference)]
        ),
    }


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


def _ngrams(said: Tokens, wanted: Tokens, n: int) -> float:
    """Overlap of n-grams, each counted as often as both sides have it."""
    a, b = (Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (said, wanted))
    return _f1((a & b).total(), a.total(), b.total())


def _f1(common: int, n_said: int, n_wanted: int) -> float:
    if not common:
        return 0.0
    precision, recall = common / n_said, common / n_wanted
    return 2 * precision * recall / (precision + recall)


def _by_sentence(said: Sequence[Tokens], wanted: Sequence[Tokens]) -> float:
    """For each reference sentence the words that some longest common subsequence with a predicted one has; a word
    counts no more often than both texts have it.
    """
    left_said = Counter(word for sentence in said for word in sentence)
    left_wanted = Counter(word for sentence in wanted for word in sentence)
    n_said, n_wanted = left_said.total(), left_wanted.total()
    hits = 0
    for sentence in wanted:
        places = sorted({place for other in said for place in _common_places(sentence, other)})
        for word in (sentence[place] for place in places):
            if left_said[word] > 0 and left_wanted[word] > 0:
                left_said[word] -= 1
                left_wanted[word] -= 1
                hits += 1
    return _f1(hits, n_said, n_wanted)


def _common_places(a: Tokens, b: Tokens) -> list[int]:
    """Places in ``a`` of a longest common subsequence with ``b``; of several the one that ``rouge-score`` takes.

    One step a word of ``b``, all of ``a`` at once (Hyyro 2004): bit i of ``flat`` is 0 where the longest subsequence
    with ``a[: i + 1]`` is longer than that with ``a[:i]``, for the words of ``b`` so far.
    """
    where: dict[str, int] = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    all_of_a = (1 << len(a)) - 1
    flat, steps = all_of_a, []
    for word in b:
        same = flat & where.get(word, 0)
        flat = (flat + same | flat - same) & all_of_a
        steps.append(flat)
    i, j, places = len(a), len(b), []
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            places.append(i)
        elif steps[j - 1] >> i - 1 & 1:
            i -= 1
        else:
            j -= 1
    return places[::-1]
