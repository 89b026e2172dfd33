"""Different n-grams over all n-grams."""

from __future__ import annotations

from random import Random

import pytest

from llmkit.metrics.diversity import distinct_n


def test_over_all_texts() -> None:
    texts = ["a b a b", "a b", "c"]
    assert distinct_n(texts, 1) == pytest.approx(3 / 7)
    assert distinct_n(texts, 2) == pytest.approx(2 / 4)  # a b, b a; none across texts
    assert distinct_n(texts, 4) == 1.0


@pytest.mark.parametrize("texts", [[], [""], ["  \n"], ["one"]])
def test_nothing_to_count(texts: list[str]) -> None:
    assert distinct_n(texts, 2) == 0.0


def test_words_are_what_white_space_parts() -> None:
    assert distinct_n(["Да, да\u00a0Да, 猫\n猫."], 1) == pytest.approx(4 / 5)


def test_random_texts_counted_one_by_one() -> None:
    draw = Random(0)
    for _ in range(200):
        texts = [" ".join(draw.choices("abc", k=draw.randint(0, 9))) for _ in range(draw.randint(0, 5))]
        n, grams = draw.randint(1, 4), []
        for words in map(str.split, texts):
            grams += [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        assert distinct_n(texts, n) == pytest.approx(len(set(grams)) / len(grams) if grams else 0.0)
