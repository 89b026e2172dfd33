"""Metrics equal those of the packages and rules that papers use, on random cases, to 1e-9.

SQuAD's rules and human-eval's estimator are written out here from their published descriptions; for the others the
packages themselves are asked.
"""

from __future__ import annotations

import importlib
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, zip_longest
from math import prod
from random import Random
from typing import Any

import numpy as np
import pytest

from llmkit.metrics.classification import classification_report
from llmkit.metrics.pass_at_k import pass_at_k
from llmkit.metrics.rouge import NAMES, rouge
from llmkit.metrics.squad import best_thresholds, squad_scores
from llmkit.metrics.translation import sacre_bleu

N_CASES = 1_000
LATIN = "the a an A The An cat sat on mat mats It's well-known U.S. 3.5 1,000 <br> x_y naïve Straße İstanbul fi ½"
OTHER = (
    "e\u0301te é кошка сидит 猫が好き 新しい你好世界 ’quoted’ “so” — ¿qué? 🙂 \u00a0 \u2028 \t %s {} $5 & &amp; . , ! ?"
)
WORDS = [*f"{LATIN} {OTHER}".split(" "), ""]

Draw = Random


def some_words(draw: Draw, n_most: int, n_least: int = 0) -> str:
    """Words of a small vocabulary, so that texts share many."""
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(n_least, n_most)))


def like(draw: Draw, text: str) -> str:
    """``text`` with some words changed, lost or moved; sometimes the same or another one."""
    kind, words = draw.random(), text.split(" ")
    if kind < 0.1:
        return text
    if kind < 0.25:
        return some_words(draw, 12)
    changed = [draw.choice(WORDS) if draw.random() < 0.2 else word for word in words if draw.random() < 0.9]
    if kind > 0.8:
        draw.shuffle(changed)
    return " ".join(changed)


# -- translation ----------------------------------------------------------------------------------------------------


def test_bleu_and_chrf_of_corpora() -> None:
    """Corpora of 1 to 6 sentences with 1 to 3 references each, not always as many."""
    sacrebleu = pytest.importorskip("sacrebleu", reason="the package sacrebleu is the reference")
    draw, n_seen = Random(1), Counter[str]()
    for _ in range(N_CASES):
        first = [some_words(draw, 14, 1) for _ in range(draw.randint(1, 6))]
        references = [[text, *(like(draw, text) for _ in range(draw.randint(0, 2)))] for text in first]
        said = [like(draw, text) for text in first]
        streams = list(zip_longest(*references))
        bleu, chrf, signatures = sacre_bleu(said, references)
        assert bleu == pytest.approx(sacrebleu.corpus_bleu(said, streams).score, abs=1e-9, rel=0)
        assert chrf == pytest.approx(sacrebleu.corpus_chrf(said, streams).score, abs=1e-9, rel=0)
        counts = {len(texts) for texts in references}
        nrefs = counts.pop() if len(counts) == 1 else "var"
        assert all(f"nrefs:{nrefs}|" in signature for signature in signatures)
        n_seen.update([f"nrefs {nrefs}", *(["bleu"] if bleu > 0 else []), *(["empty"] if "" in said else [])])
    assert min(n_seen[name] for name in ("nrefs 1", "nrefs 2", "nrefs var", "bleu")) > 40
    assert n_seen["empty"] > 5


# -- summaries ------------------------------------------------------------------------------------------------------


def lines(draw: Draw, n_most: int = 4) -> str:
    """Sentences, a line each; no line has the end of a sentence inside."""
    made = (some_words(draw, 10) for _ in range(draw.randint(0, n_most)))
    return "\n".join(
        text.replace(". ", " ").replace("! ", " ").replace("? ", " ").replace("\u2028", " ") for text in made
    )


def like_lines(draw: Draw, text: str) -> str:
    changed = [like(draw, line) for line in text.split("\n")]
    if draw.random() < 0.3:
        draw.shuffle(changed)
    return "\n".join(changed)


@pytest.fixture(scope="module")
def scorer() -> Any:
    package = pytest.importorskip("rouge_score.rouge_scorer", reason="the package rouge-score is the reference")
    return package.RougeScorer(list(NAMES), use_stemmer=False)


def check_rouge(found: dict[str, float], scores: dict[str, Any], names: Sequence[str] = NAMES) -> None:
    for name in names:
        assert found[name] == pytest.approx(100 * scores[name].fmeasure, abs=1e-9, rel=0), name


def test_rouge_of_one_reference(scorer: Any) -> None:
    """Each case alone, and the mean of all."""
    draw, n_partly = Random(2), 0
    wanted = [lines(draw) for _ in range(N_CASES)]
    said = [like_lines(draw, text) for text in wanted]
    totals = Counter[str]()
    for pair in zip(wanted, said, strict=True):
        found = rouge([pair[1]], [[pair[0]]])
        scores = scorer.score(*map(_one_sentence_a_line, pair))
        check_rouge(found, scores)
        totals.update({name: 100 * scores[name].fmeasure for name in NAMES})
        n_partly += 0 < found["rougeLsum"] < 100
    assert n_partly > N_CASES / 2
    means = {name: totals[name] / N_CASES for name in NAMES}
    assert rouge(said, [[text] for text in wanted]) == pytest.approx(means, abs=1e-9, rel=0)


def test_rouge_of_several_references(scorer: Any) -> None:
    """The best for each name."""
    draw, n_partly = Random(3), 0
    for _ in range(N_CASES):
        first = lines(draw, 3)
        references = [first, *(like_lines(draw, first) for _ in range(draw.randint(1, 2)))]
        said = like_lines(draw, first)
        cut = [_one_sentence_a_line(text) for text in (said, *references)]
        scores = scorer.score_multi(cut[1:], cut[0])
        check_rouge(rouge([said], [references]), scores)
        n_partly += 0 < scores["rouge2"].fmeasure < 1
    assert n_partly > N_CASES / 4


def _one_sentence_a_line(text: str) -> str:
    """As rouge-score needs it. ``like`` may have put the end of a sentence inside a line."""
    for end in ".!?":
        for space in (" ", "\t", "\u00a0", "\u2028"):
            text = text.replace(end + space, end + "\n")
    return text


def test_rouge_of_running_text_is_that_of_its_sentences_on_lines(scorer: Any) -> None:
    """The reference cuts at line ends only, and without them its Lsum is its L."""
    draw, n_apart = Random(5), 0
    plain = ["one", "two", "three", "four", "five", "six", "the", "of"]
    for _ in range(N_CASES):
        texts = [
            [
                " ".join(draw.choices(plain, k=draw.randint(1, 8))) + draw.choice(".!?")
                for _ in range(draw.randint(1, 4))
            ]
            for _ in range(2)
        ]
        (wanted, said) = (" ".join(text) for text in texts)
        found = rouge([said], [[wanted]])
        check_rouge(found, scorer.score(*("\n".join(text) for text in texts)))
        n_apart += abs(found["rougeLsum"] - found["rougeL"]) > 1
    assert n_apart > N_CASES / 4


# -- classes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sklearn() -> Iterator[Any]:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference")
    with importlib.import_module("sklearn").config_context(skip_parameter_validation=True, assume_finite=True):
        yield metrics


@pytest.mark.parametrize("n_labels", [2, 3, 7])
def test_classification(n_labels: int, sklearn: Any) -> None:
    """Of the labels some may be on one side only, or on none."""
    draw, n_absent, n_alone = Random(n_labels), 0, 0
    labels = [f"label {i}" for i in range(n_labels)]
    for _ in range(N_CASES // 3 + 1):
        n, skill = draw.randint(1, 30), draw.random()
        possible, sayable = (draw.sample(labels, draw.randint(1, n_labels)) for _ in range(2))
        gold = draw.choices(possible, k=n)
        said = [label if draw.random() < skill else draw.choice(sayable) for label in gold]
        report = classification_report(gold, said, labels)
        sides = [np.array([labels.index(label) for label in side]) for side in (gold, said)]
        table = sklearn.precision_recall_fscore_support(*sides, labels=range(n_labels), zero_division=0)
        assert list(report.per_class) == labels
        for row, column in zip(report.per_class.values(), zip(*table, strict=True), strict=True):
            assert row == pytest.approx(column, abs=1e-9, rel=0)
        occurring = {*gold, *said}
        macro_f1 = sum(f1 for label, f1 in zip(labels, table[2], strict=True) if label in occurring) / len(occurring)
        assert report.confusion == sklearn.confusion_matrix(*sides, labels=range(n_labels)).tolist()
        assert report.accuracy == pytest.approx(sklearn.accuracy_score(*sides), abs=1e-9, rel=0)
        assert report.macro_f1 == pytest.approx(macro_f1, abs=1e-9, rel=0)
        assert report.mcc == pytest.approx(matthews(sklearn, *sides), abs=1e-9, rel=0)
        n_absent, n_alone = n_absent + (len(occurring) < n_labels), n_alone + (len(occurring) == 1)
    assert n_absent > 20
    assert n_alone > 5


def matthews(sklearn: Any, gold: Sequence[Any], said: Sequence[Any]) -> float:
    """0 where there is a single label, about which scikit-learn warns."""
    return float(sklearn.matthews_corrcoef(gold, said)) if len({*gold, *said}) > 1 else 0.0


def test_what_is_no_label_is_counted_as_scikit_learn_counts_it(sklearn: Any) -> None:
    """Questions that were not answered, and labels that the model never learnt."""
    draw, labels = Random(6), ["no", "yes"]
    for _ in range(N_CASES // 3):
        gold = draw.choices([*labels, "maybe"], [5, 5, 1], k=20)
        said = draw.choices([*labels, ""], [5, 5, 1], k=20)
        report = classification_report(gold, said, labels)
        classes = [label for label in ("no", "yes", "maybe") if label in gold or label in said]
        macro = sklearn.f1_score(gold, said, labels=classes, average="macro", zero_division=0)
        assert report.macro_f1 == pytest.approx(macro, abs=1e-9, rel=0)
        assert report.mcc == pytest.approx(matthews(sklearn, gold, said), abs=1e-9, rel=0)
        assert report.accuracy == pytest.approx(sklearn.accuracy_score(gold, said), abs=1e-9, rel=0)
        every = list(report.per_class)
        assert every[:2] == labels
        assert report.confusion == sklearn.confusion_matrix(gold, said, labels=every).tolist()
        assert sum(scores.support for scores in report.per_class.values()) == 20


# -- questions ------------------------------------------------------------------------------------------------------
#
# The rules: answers are compared in lower case, without ASCII punctuation, without the words a, an and the, and with
# single spaces (in this order). Exact match: equal then. F1: of the bags of words. Of several answers the best counts.
# Version 2 adds: answers that are empty then are not asked for; a question without an answer has the empty one; and
# where one of both has no words, F1 is 1 if both have none, else 0.


def plain_words(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    runs = ("".join(run) for _, run in groupby(kept, str.isalnum))
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()


def exact(said: str, wanted: str) -> float:
    return float(plain_words(said) == plain_words(wanted))


def overlap(said: str, wanted: str) -> float:
    a, b = plain_words(said), plain_words(wanted)
    left, common = list(b), 0
    for word in a:
        if word in left:
            left.remove(word)
            common += 1
    if common == 0:
        return 0.0
    return 2 * (common / len(a)) * (common / len(b)) / (common / len(a) + common / len(b))


def overlap_or_nothing(said: str, wanted: str) -> float:
    a, b = plain_words(said), plain_words(wanted)
    return overlap(said, wanted) if a and b else float(not a and not b)


def version_1(said: str, wanted: Sequence[str]) -> tuple[float, float]:
    return max(exact(said, text) for text in wanted), max(overlap(said, text) for text in wanted)


def version_2(said: str, wanted: Sequence[str]) -> tuple[float, float]:
    kept = [text for text in wanted if plain_words(text)] or [""]
    return max(exact(said, text) for text in kept), max(overlap_or_nothing(said, text) for text in kept)


def asked(draw: Draw, version: int) -> tuple[str, list[str]]:
    """(what was said, the answers)."""
    answers = [some_words(draw, 5) for _ in range(draw.randint(2 - version, 3))]
    said = like(draw, draw.choice(answers)) if answers and draw.random() < 0.9 else some_words(draw, 2)
    return draw.choice([said, said.upper(), f"{said}!", f" the {said}", said]), answers


@pytest.mark.parametrize(("version", "rule"), [(1, version_1), (2, version_2)])
def test_squad_questions(version: int, rule: Callable[..., tuple[float, float]]) -> None:
    draw, n_seen = Random(version), Counter[str]()
    for _ in range(2 * N_CASES):
        said, answers = asked(draw, version)
        found = squad_scores([said], [answers], version=version)
        same, f1 = rule(said, answers)
        assert (found["exact_match"], found["f1"]) == pytest.approx((100 * same, 100 * f1), abs=1e-9, rel=0)
        n_seen.update([f"exact {same}", "partly" if 0 < f1 < 1 else f"f1 {f1}", f"{len(answers)} answers"])
        n_seen["nothing"] += not plain_words(said)
    kinds = ["exact 0.0", "exact 1.0", "partly", "f1 0.0", "nothing", "3 answers", *["0 answers"][: version - 1]]
    assert min(n_seen[kind] for kind in kinds) > 50, n_seen


def test_squad_sets_with_and_without_answers() -> None:
    draw = Random(8)
    for _ in range(N_CASES):
        said, golds = zip(*(asked(draw, 2) for _ in range(draw.randint(1, 8))), strict=True)
        scores = [version_2(*pair) for pair in zip(said, golds, strict=True)]
        wanted = {}
        for prefix, which in (("", [0, 1, 2, 3]), ("has_answer_", [1, 2, 3]), ("no_answer_", [0])):
            part = [score for score, gold in zip(scores, golds, strict=True) if len(gold) in which]
            if part:
                wanted[f"{prefix}exact_match"] = 100 * sum(same for same, _ in part) / len(part)
                wanted[f"{prefix}f1"] = 100 * sum(f1 for _, f1 in part) / len(part)
        assert squad_scores(said, golds, version=2) == pytest.approx(wanted, abs=1e-9, rel=0)


def total(threshold: float, margins: Sequence[float], scores: Sequence[float], golds: Sequence[Any]) -> float:
    """The mean where answers are given whose margin is at most the threshold, by the published search: an answer to a
    question that has none is wrong even if it is an article, and no answer is wrong where there is one."""
    rights = [
        float(not gold) if at > threshold else score if gold else 0.0
        for at, score, gold in zip(margins, scores, golds, strict=True)
    ]
    return 100 * sum(rights) / len(rights)


def test_squad_best_thresholds() -> None:
    """No threshold scores more, by trying all; some margins are equal."""
    draw, n_none = Random(9), 0
    for _ in range(N_CASES):
        said, golds = zip(*(asked(draw, 2) for _ in range(draw.randint(1, 8))), strict=True)
        said = tuple(text or "word" for text in said)
        margins = [draw.choice([draw.uniform(-5, 5), 0.5]) for _ in said]
        found = best_thresholds(said, golds, margins)
        for place, name in enumerate(("exact_match", "f1")):
            scores = [version_2(*pair)[place] for pair in zip(said, golds, strict=True)]
            best = max(total(threshold, margins, scores, golds) for threshold in (*margins, -100.0))
            threshold = found[f"best_{name}_threshold"]
            assert found[f"best_{name}"] == pytest.approx(best, abs=1e-9, rel=0)
            assert total(threshold, margins, scores, golds) == pytest.approx(best, abs=1e-9, rel=0)
            n_none += threshold < min(margins)
    assert n_none > 50


# -- programs -------------------------------------------------------------------------------------------------------


def test_pass_at_k() -> None:
    """1 - prod(1 - k / i) over i = n - c + 1 .. n; 1 where fewer than k are wrong."""
    draw, n_between = Random(10), 0
    for _ in range(5 * N_CASES):
        n = draw.randint(1, draw.choice([5, 20, 300]))
        c, k = draw.randint(0, n), draw.randint(1, n)
        wanted = 1.0 if n - c < k else 1.0 - prod(1.0 - k / i for i in range(n - c + 1, n + 1))
        assert pass_at_k(n, c, k) == pytest.approx(wanted, abs=1e-9, rel=0), (n, c, k)
        n_between += 0 < wanted < 1
    assert n_between > N_CASES
