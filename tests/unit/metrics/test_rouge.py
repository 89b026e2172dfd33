"""ROUGE of texts that can be counted by hand; tests/parity compares it with ``rouge-score``."""

from __future__ import annotations

import time
from itertools import combinations
from random import Random

import pytest

from llmkit.metrics.rouge import NAMES, _common_places, rouge, sentences

ALL = dict.fromkeys(NAMES, 100.0)
NONE = dict.fromkeys(NAMES, 0.0)


def f1(precision: float, recall: float) -> float:
    return 200 * precision * recall / (precision + recall)


def test_words_pairs_and_order() -> None:
    found = rouge(["the cat sat on it"], [["On the mat the cat sat"]])
    assert found["rouge1"] == pytest.approx(f1(4 / 5, 4 / 6))  # the, cat, sat, on
    assert found["rouge2"] == pytest.approx(f1(2 / 4, 2 / 5))  # the cat, cat sat
    assert found["rougeL"] == found["rougeLsum"] == pytest.approx(f1(3 / 5, 3 / 6))  # the cat sat


def test_a_word_counts_no_more_often_than_both_have_it() -> None:
    assert rouge(["a a a a"], [["a b"]])["rouge1"] == pytest.approx(f1(1 / 4, 1 / 2))


def test_equal_but_for_case_and_punctuation() -> None:
    assert rouge(["It’s 3.5 -- (OK)"], [["it s 3 5 ok"]]) == pytest.approx(ALL)


def test_letters_outside_a_to_z_part_words_as_in_the_reference() -> None:
    assert rouge(["für"], [["f r"]])["rouge1"] == 100
    assert rouge(["кошка"], [["кошка"]]) == NONE


@pytest.mark.parametrize(("said", "wanted"), [("", "a"), ("a", ""), ("", ""), ("...", "a"), ("\n\n", "\n")])
def test_empty_texts_score_nothing(said: str, wanted: str) -> None:
    assert rouge([said], [[wanted]]) == NONE


def test_no_predictions_and_no_references() -> None:
    assert rouge([], []) == NONE
    assert rouge(["a"], [[]]) == NONE
    with pytest.raises(ValueError):
        rouge(["a"], [])


def test_of_several_references_the_best_for_each_name() -> None:
    references = ["c b a", "a b d d d d"]
    alone = [rouge(["a b c"], [[text]]) for text in references]
    both = rouge(["a b c"], [references])
    assert both == {name: max(score[name] for score in alone) for name in NAMES}
    assert both["rouge1"] == alone[0]["rouge1"] == 100
    assert both["rouge2"] == alone[1]["rouge2"] > alone[0]["rouge2"]


def test_a_corpus_is_the_mean() -> None:
    assert rouge(["a b", "x"], [["a b"], ["y"]]) == pytest.approx(dict.fromkeys(NAMES, 50.0) | {"rouge2": 50.0})


def test_sentences_in_another_order_keep_lsum() -> None:
    found = rouge(["Two two two. One one one."], [["One one one. Two two two."]])
    assert (found["rougeL"], found["rougeLsum"]) == pytest.approx((50.0, 100.0))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("One\nTwo\n\nThree\r\n", ["One", "Two", "Three"]),
        ('He said "no." She left (today!) at 3.5 km', ['He said "no."', "She left (today!)", "at 3.5 km"]),
        ("“Nein.” Sie ging.", ["“Nein.”", "Sie ging."]),
        ("", []),
        (" \n ", [" ", " "]),
    ],
)
def test_sentences(text: str, parts: list[str]) -> None:
    assert [part.strip() for part in sentences(text)] == [part.strip() for part in parts]


def test_common_places_are_a_longest_common_subsequence() -> None:
    """By trying all subsequences; the reference's own choice among equals is compared in tests/parity."""
    draw = Random(0)
    for _ in range(300):
        a, b = (draw.choices("abc", k=draw.randint(0, 6)) for _ in range(2))
        places = _common_places(a, b)
        assert places == sorted(set(places))
        assert is_within([a[i] for i in places], b)
        n_most = max(n for n in range(len(a) + 1) if any(is_within(part, b) for part in combinations(a, n)))
        assert len(places) == n_most


def is_within(part: object, whole: list[str]) -> bool:
    left = iter(whole)
    return all(word in left for word in part)  # type: ignore[attr-defined]


def test_long_summaries_are_quick() -> None:
    """100 pairs of 200 words, 20 words a line: about 0.2 s; a table of all pairs of words takes ten times as long."""
    draw = Random(1)

    def text() -> str:
        words = draw.choices([f"w{i}" for i in range(300)], k=200)
        return "\n".join(" ".join(words[i : i + 20]) for i in range(0, 200, 20))

    said, wanted = [text() for _ in range(100)], [[text()] for _ in range(100)]
    start = time.process_time()
    assert 0 < rouge(said, wanted)["rougeLsum"] < 100
    assert time.process_time() - start < 1.5
