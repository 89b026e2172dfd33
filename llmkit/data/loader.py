"""Batches for training and evaluation, computed from positions; training reads one step ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from llmkit.errors import DataError

if TYPE_CHECKING:
    from llmkit.data.sampler import SampleOrder
    from llmkit.interfaces import Batch, Row, SequenceDataset

    Collate = Callable[[Sequence[Row]], Batch]


VALIDATION_SEED = 0


@dataclass(frozen=True)
class StepBatches:
    """One rank's micro-batches of a step. ``first_sample_id`` is the step's, over all ranks."""

    batches: list[Batch]
    first_sample_id: int


class TrainBatches:
    """This rank's share of any step.

    Micro-batch ``m`` of rank ``r`` holds the positions ``position + (m * world_size + r) * micro_batch_size`` and the
    ``micro_batch_size - 1`` after it, so the ranks together hold the same rows whatever their number.
    """

    def __init__(
        self,
        datasets: Sequence[SequenceDataset],
        order: SampleOrder,
        collate: Collate,
        micro_batch_size: int,
        grad_accum_steps: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.datasets, self.order, self.collate = datasets, order, collate
        self.micro_batch_size, self.grad_accum_steps = micro_batch_size, grad_accum_steps
        self.rank, self.world_size = rank, world_size
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: tuple[int, Future[StepBatches]] | None = None

    @property
    def global_batch_size(self) -> int:
        """Sequences a step, over all ranks."""
        return self.micro_batch_size * self.grad_accum_steps * self.world_size

    def step(self, position: int) -> StepBatches:
        """The step that starts at ``position``; the one after it is read meanwhile. Errors of reading are raised
        here.
        """
        if self._ahead is not None and self._ahead[0] == position:
            step = self._ahead[1].result()
        else:
            step = self._read(position)
        following = position + self.global_batch_size
        self._ahead = (following, self._reader.submit(self._read, following))
        return step

    def close(self) -> None:
        """End the reading thread."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, position: int) -> StepBatches:
        batches = [self._micro_batch(position, number) for number in range(self.grad_accum_steps)]
        return StepBatches(batches, self.order.sample_id(position))

    def _micro_batch(self, position: int, number: int) -> Batch:
        first = position + (number * self.world_size + self.rank) * self.micro_batch_size
        return self.collate([self._row(first + offset) for offset in range(self.micro_batch_size)])

    def _row(self, position: int) -> Row:
        """The row at a position. What is random about it is new each time its source begins another epoch."""
        source, row, epoch = self.order.locate(position)
        return self.datasets[source].row(row, (self.order.seed, epoch, source, row), position)


def eval_batches(
    dataset: SequenceDataset, collate: Collate, batch_size: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """This rank's batches of one pass: all ranks together see every row exactly once. Ranks may differ by one in
    number. What is random about a row is the same in every pass and every run.
    """
    for start in islice(range(0, dataset.n_sequences, batch_size), rank, None, world_size):
        rows = range(start, min(start + batch_size, dataset.n_sequences))
        yield collate([dataset.row(row, (VALIDATION_SEED, row), None) for row in rows])


def check_enough(n_sequences: int, global_batch_size: int, *, of_task: bool = False) -> None:
    """Raise DataError for data smaller than one step, with both numbers. ``of_task``: one row is one question, so
    that shorter rows are not more rows.
    """
    if n_sequences >= global_batch_size:
        return
    what, more = f"the training text gives {n_sequences} sequence(s)", "give more text, or lower data.seq_len,"
    if of_task:
        what, more = f"the training data gives {n_sequences} row(s)", "give more rows, or lower"
    fix = f"{more} engine.micro_batch_size or engine.grad_accum_steps"
    raise DataError(f"{what}, one step takes {global_batch_size}", where="data.path", fix=fix)


def check_vocabulary(vocab_size: int, n_embedding_rows: int) -> None:
    """Raise DataError for a tokenizer with ids that the embedding does not have."""
    if vocab_size > n_embedding_rows:
        raise DataError(
            f"the tokenizer has {vocab_size} ids, the embedding {n_embedding_rows} rows",
            where="tokenizer",
            fix="use the tokenizer that belongs to the model",
        )
