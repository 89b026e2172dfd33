"""pass@k is the share of all choices of k programs among which one passes."""

from __future__ import annotations

from itertools import combinations

import pytest

from llmkit.metrics.pass_at_k import pass_at_k


def test_by_trying_all_choices() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                choices = list(combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_one_program_a_question() -> None:
    assert [pass_at_k(1, c, 1) for c in (0, 1)] == [0.0, 1.0]
    assert pass_at_k(200, 30, 1) == pytest.approx(0.15)


def test_many_programs_stay_exact() -> None:
    assert pass_at_k(10_000, 0, 5_000) == 0.0
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)
    assert pass_at_k(10_000, 5_001, 5_000) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(0, 0, 1), (3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_counts_that_cannot_be(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)
