"""SQuAD's rules on answers that can be counted by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from llmkit.metrics.squad import best_thresholds, normalize, squad_scores


def scores(said: str, answers: Sequence[str], version: int) -> tuple[float, float]:
    found = squad_scores([said], [answers], version=version)
    return found["exact_match"], found["f1"]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Cat!", "cat"),
        ("  a  b\tan\nthe c ", "b c"),
        ("another theme", "another theme"),
        ("U.S.A.", "usa"),
        ("the-end", "theend"),
        ("’quoted’ – ÄÖÜ", "’quoted’ – äöü"),
        ("the", ""),
        ("", ""),
        ("кот\u00a0The 猫", "кот 猫"),
    ],
)
def test_normalize(text: str, plain: str) -> None:
    assert normalize(text) == plain


@pytest.mark.parametrize("version", [1, 2])
def test_words_in_common(version: int) -> None:
    """Two of the three words said are in the four of the answer."""
    assert scores("the big red dog", ["a red dog of mine"], version) == pytest.approx((0, 100 * 2 * 2 / (3 + 4)))
    assert scores("Red Dog.", ["the red dog"], version) == (100, 100)
    assert scores("cat", ["red dog"], version) == (0, 0)


@pytest.mark.parametrize("version", [1, 2])
def test_of_several_answers_the_best(version: int) -> None:
    assert scores("red dog", ["cat", "red", "a red dog"], version) == (100, 100)
    assert scores("red dog", ["cat", "red"], version)[1] == pytest.approx(100 * 2 / 3)


def test_version_1_without_words() -> None:
    assert scores("", ["the"], 1) == (100, 0)
    assert scores("x", [], 1) == (0, 0)


def test_version_2_without_words() -> None:
    assert scores("", [], 2) == (100, 100)
    assert scores("the", [], 2) == (100, 100)
    assert scores("x", [], 2) == (0, 0)
    assert scores("", ["x"], 2) == (0, 0)
    assert scores("", ["the"], 2) == (100, 100)  # answers without words are none
    assert scores("", ["the", "x"], 2) == (0, 0)


def test_questions_with_and_without_an_answer_apart() -> None:
    found = squad_scores(["red dog", "x", ""], [["red"], [], []], version=2)
    assert found == pytest.approx(
        {
            **{"exact_match": 100 / 3, "f1": (200 / 3 + 0 + 100) / 3},
            **{"has_answer_exact_match": 0, "has_answer_f1": 200 / 3},
            **{"no_answer_exact_match": 50, "no_answer_f1": 50},
        }
    )
    assert set(squad_scores(["x"], [["x"]], version=2)) == {
        *("exact_match", "f1", "has_answer_exact_match", "has_answer_f1")
    }


@pytest.mark.parametrize("version", [1, 2])
def test_no_questions(version: int) -> None:
    assert squad_scores([], [], version=version) == {"exact_match": 0.0, "f1": 0.0}


def test_best_thresholds_part_right_answers_from_wrong_ones() -> None:
    """Answers with the margins -2 (right), 1 (half right), 2 (there is none), 3 (right)."""
    said, golds = ["a dog", "red dog", "cat", "ox"], [["dog"], ["red"], [], ["ox"]]
    found = best_thresholds(said, golds, [-2.0, 1.0, 2.0, 3.0])
    assert found == pytest.approx(
        {
            **{"best_exact_match": 50.0, "best_exact_match_threshold": -2.0},
            **{"best_f1": 100 * (1 + 2 / 3 + 1) / 4, "best_f1_threshold": 1.0},
        }
    )


def test_equal_margins_stand_or_fall_together() -> None:
    found = best_thresholds(["dog", "x", "y"], [["dog"], [], []], [1.0, 1.0, 1.0])
    assert (found["best_f1"], found["best_f1_threshold"]) == pytest.approx((200 / 3, 0.0))  # no answer at all


def test_no_questions_have_no_threshold() -> None:
    assert best_thresholds([], [], [])["best_f1"] == 0.0
