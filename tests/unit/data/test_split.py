"""Repeats and the validation side, from hashes alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data import split
from llmkit.data.split import belongs_to_val, choose_rule, n_shared, repeated, text_keys, wanted_bound
from llmkit.errors import DataError

quick = settings(max_examples=50, derandomize=True, deadline=None)
HASHES = st.lists(st.sampled_from([0, 1, 2**32, 2**63, 2**63 + 1, 2**64 - 1, 12345]), max_size=30)


def array(values: list[int]) -> np.ndarray:
    return np.array(values, np.uint64)


@quick
@given(HASHES, st.integers(1, 8))
def test_repeated_marks_all_but_the_first(values: list[int], block: int) -> None:
    original = split._BLOCK
    split._BLOCK = block  # many ranges and blocks
    try:
        found = repeated(array(values)).tolist()
    finally:
        split._BLOCK = original
    assert found == [value in values[:place] for place, value in enumerate(values)]


@quick
@given(HASHES, HASHES)
def test_shared_documents_are_counted(val: list[int], train: list[int]) -> None:
    assert n_shared(array(val), array(train)) == sum(value in train for value in val)


def test_many_documents_are_split_by_their_hash_alone() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 50_000, np.uint64)
    lengths = np.ones_like(hashes)
    rule = choose_rule(hashes, lengths, 0.02)
    assert rule == wanted_bound(0.02)
    assert belongs_to_val(hashes, rule).mean() == pytest.approx(0.02, rel=0.1)
    grown = choose_rule(np.concatenate([hashes, hashes + np.uint64(1)]), np.concatenate([lengths, lengths]), 0.02)
    assert grown == rule, "a growing corpus must not move documents to the other side"


@quick
@given(st.lists(st.integers(1, 1000), min_size=2, max_size=40), st.floats(0.001, 0.24), st.integers(0, 9))
def test_few_documents_are_split_by_their_size(sizes: list[int], fraction: float, seed: int) -> None:
    """Both sides get text, and no document could have been added to the validation side without passing the target."""
    hashes = np.random.default_rng(seed).integers(0, 2**64, len(sizes), np.uint64)
    is_val = belongs_to_val(hashes, choose_rule(hashes, array(sizes), fraction))
    val, target = [s for s, v in zip(sizes, is_val, strict=True) if v], fraction * sum(sizes)
    train = [s for s, v in zip(sizes, is_val, strict=True) if not v]
    assert val
    assert train
    if sum(val) > target:  # nothing fits: the one nearest to the target
        assert len(val) == 1
        assert abs(val[0] - target) == min(abs(s - target) for s in sizes)
        assert min(sizes) > target
    else:
        assert all(sum(val) + s > target for s in train)


def test_a_large_and_a_small_document() -> None:
    """The large one, half of all hashes below it or not, must not become the validation text."""
    for hashes in ([1, 2**63], [2**63, 1]):
        rule = choose_rule(array(hashes), array([1_048_576, 66_818]), 0.02)
        assert belongs_to_val(array(hashes), rule).tolist() == [False, True]


def test_equal_documents_cannot_be_split() -> None:
    with pytest.raises(DataError, match="cannot be split") as caught:
        choose_rule(array([7, 7]), array([3, 3]), 0.1)
    assert "data.val_path" in caught.value.fix
    assert "data.val_fraction=0" in caught.value.fix
    assert choose_rule(array([7]), array([3]), 0.0) == 0


def test_everything_below_the_bound_leaves_one_document_to_train_on() -> None:
    hashes = array(list(range(1, 41)))
    assert belongs_to_val(hashes, choose_rule(hashes, hashes, 0.5)).sum() == 39


@quick
@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.booleans()), max_size=12), st.none() | st.integers(0, 2**64 - 1)
)
def test_the_first_section_names_a_text(documents: list[tuple[int, bool]], before: int | None) -> None:
    expected, key = [], before
    for value, is_cut in documents:
        expected.append(value if key is None else key)
        key = expected[-1] if is_cut else None
    hashes, cut = array([value for value, _ in documents]), np.array([is_cut for _, is_cut in documents], bool)
    assert text_keys(hashes, cut, None if before is None else np.uint64(before)).tolist() == expected


def test_few_texts_of_many_sections_are_split_by_their_size() -> None:
    keys = np.repeat(array([5, 2**63, 2**64 - 9]), (800, 100, 700))
    rule = choose_rule(keys, np.ones_like(keys), 0.1, n_texts=3)
    assert belongs_to_val(keys, rule).nonzero()[0].tolist() == list(range(800, 900))
