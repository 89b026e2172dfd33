"""Batches: the ranks together hold what one process holds, in the same order."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.loader import TrainBatches, check_enough, check_vocabulary, eval_batches
from llmkit.data.sampler import SampleOrder
from llmkit.errors import DataError
from llmkit.interfaces import Batch, Row

quick = settings(max_examples=40, derandomize=True, deadline=None)


class Rows:
    """Row ``i`` is the one id ``base + i``."""

    def __init__(self, n: int, base: int = 0) -> None:
        self.n_sequences, self.base = n, base
        self.n_tokens = self.n_bytes = n

    def row(self, index: int, seed: tuple[int, ...], position: int | None) -> Row:
        if not 0 <= index < self.n_sequences:
            raise IndexError(index)
        return Row(np.array([self.base + index]), seed, position)


def collate(rows: Sequence[Row]) -> Batch:
    ids = torch.from_numpy(np.stack([row.ids for row in rows]))
    return Batch(ids, ids, ids, None, n_targets=int(ids.sum()))


def ids(batches: Sequence[Batch] | Iterator[Batch]) -> list[list[int]]:
    return [batch.input_ids.flatten().tolist() for batch in batches]


def train(rank: int, world: int, micro: int, accum: int, weights: tuple[float, ...] | None = None) -> TrainBatches:
    sizes = (37, 20)
    order = SampleOrder(sizes, weights, seed=3)
    return TrainBatches((Rows(37), Rows(20, base=37)), order, collate, micro, accum, rank, world)


@quick
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 9), st.booleans())
def test_ranks_together_hold_the_step(world: int, micro: int, accum: int, n_step: int, weighted: bool) -> None:
    """Whatever splits a global batch, the step has the positions ``[start, start + G)``."""
    weights = (0.3, 0.7) if weighted else None
    size = world * micro * accum
    order = SampleOrder((37, 20), weights, seed=3)
    wanted = [order.sample_id(p) for p in range(n_step * size, (n_step + 1) * size)]
    ranks = [train(rank, world, micro, accum, weights) for rank in range(world)]
    steps = [rank.step(n_step * size) for rank in ranks]
    in_order = [step.batches[m] for m in range(accum) for step in steps]
    assert [i for row in ids(in_order) for i in row] == wanted
    assert sum(batch.n_targets for step in steps for batch in step.batches) == sum(wanted)
    assert {step.first_sample_id for step in steps} == {wanted[0]}
    for rank in ranks:
        rank.close()


def test_reading_ahead_changes_nothing() -> None:
    """Following steps, a jump, and a step asked twice."""
    batches = train(0, 1, 3, 2)
    for position in (0, 6, 12, 60, 66, 66, 6):
        fresh = train(0, 1, 3, 2)
        assert ids(batches.step(position).batches) == ids(fresh.step(position).batches)
        fresh.close()
    batches.close()


def test_the_next_step_is_read_in_another_thread() -> None:
    readers: list[str] = []

    def note(rows: Sequence[Row]) -> Batch:
        readers.append(threading.current_thread().name)
        return collate(rows)

    batches = TrainBatches((Rows(9),), SampleOrder((9,), None, 0), note, 1, 1, 0, 1)
    batches.step(0)
    batches.step(1)
    batches.close()
    assert readers[0] == "MainThread"
    assert readers[1].startswith("read-ahead")


def test_an_error_of_the_reader_reaches_the_trainer() -> None:
    calls = iter([False, True])

    def fail_second(rows: Sequence[Row]) -> Batch:
        if next(calls):
            raise DataError("a shard broke", where="shard 7")
        return collate(rows)

    batches = TrainBatches((Rows(9),), SampleOrder((9,), None, 0), fail_second, 1, 1, 0, 1)
    batches.step(0)
    with pytest.raises(DataError, match="a shard broke"):
        batches.step(1)
    batches.close()


@quick
@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 4))
def test_evaluation_sees_every_row_once(n: int, batch_size: int, world: int) -> None:
    seen = [ids(eval_batches(Rows(n), collate, batch_size, rank, world)) for rank in range(world)]
    assert sorted(i for rank in seen for batch in rank for i in batch) == list(range(n))
    counts = [len(rank) for rank in seen]
    assert max(counts) - min(counts) <= 1


def test_too_little_text_is_said_with_both_numbers() -> None:
    check_enough(8, 8)
    with pytest.raises(DataError, match=r"7 sequence\(s\), one step takes 8"):
        check_enough(7, 8)
    with pytest.raises(DataError, match=r"7 row\(s\), one step takes 8") as caught:
        check_enough(7, 8, of_task=True)
    assert "seq_len" not in caught.value.fix
    assert "engine.micro_batch_size" in caught.value.fix


def test_a_tokenizer_larger_than_the_embedding_is_refused() -> None:
    check_vocabulary(64, 64)
    with pytest.raises(DataError, match="65 ids, the embedding 64 rows"):
        check_vocabulary(65, 64)
