"""Sums and counts of every kind over batches and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmkit.engine.evaluate import COUNTED, TrainModule, evaluate
from llmkit.interfaces import Batch, LossSum
from llmkit.objectives.for_task import objective_for
from llmkit.settings import LossConfig
from tests.unit.models.tiny import built, llama
from tests.unit.objectives.task_rows import IDS, class_rows, decoder_rows, with_head


class Sums:
    """Losses that are the numbers in the batch."""

    scores_all_text = False
    sum_names = ("nll", "n_correct")

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        return LossSum({"example": model(batch)}, {"n_correct": torch.tensor(batch.n_examples), "nll": model(batch)})

    def metrics(self, sums: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
        return {"loss": sums["nll"] / counts["example"], "accuracy": sums["n_correct"] / counts["example"]}


class Total(nn.Module):
    def forward(self, batch: Batch) -> Tensor:
        return batch.input_ids.sum().double()


def batch_of(numbers: Sequence[int], **counts: int) -> Batch:
    ids = torch.tensor([numbers])
    return Batch(ids, ids, ids, None, **{"n_targets": 0, "n_examples": len(numbers), **counts})  # type: ignore[arg-type]


def run(batches: Sequence[Batch], **options: Any) -> dict[str, float] | None:
    module: Any = TrainModule(Total(), Sums())  # type: ignore[arg-type]
    return evaluate(module, batches, n_bytes=0, device=torch.device("cpu"), **options)


def test_every_count_of_a_batch_has_a_name() -> None:
    assert list(COUNTED) == list(batch_of([1]).counts)


@pytest.mark.parametrize("split", [[4], [1, 3], [2, 2], [1, 1, 1, 1]])
def test_examples_are_counted_whatever_the_batches(split: list[int]) -> None:
    numbers, batches = [3, 5, 8, 2], []
    for n in split:
        batches.append(batch_of(numbers[:n]))
        numbers = numbers[n:]
    assert run(batches) == {"val/loss": 4.5, "val/accuracy": 1.0, "val/n_targets": 0, "val/n_examples": 4}


def test_counts_of_all_kinds_and_processes_are_added() -> None:
    """Another process has the same share: every sum is doubled, and so are the counts."""
    batches = [batch_of([3, 5], n_targets=7, n_pairs=2), batch_of([4])]
    found = run(batches, sum_over_ranks=lambda values: [2.0 * value for value in values])
    assert found is not None
    counts = {"val/n_targets": 14, "val/n_pairs": 4, "val/n_examples": 6}
    assert {name: found[name] for name in counts} == counts
    assert found["val/loss"] == 4.0
    assert found["val/ppl"] == pytest.approx(torch.tensor(24.0 / 14).exp().item())


def test_a_process_without_batches_takes_part() -> None:
    other = [12.0, 3.0, 0, 0, 3, 0]  # sums, then counts of tokens, pairs and examples, and the stop

    def add(values: Sequence[float]) -> list[float]:
        return [a + b for a, b in zip(values, other, strict=True)]

    assert run([], sum_over_ranks=add) == {
        "val/loss": 4.0,
        "val/accuracy": 1.0,
        "val/n_targets": 0,
        "val/n_examples": 3,
    }


def test_a_stop_of_any_process_ends_it() -> None:
    one = replace(batch_of([1]))
    assert run([one], should_stop=lambda: True) is None
    assert run([one], sum_over_ranks=lambda values: [*values[:-1], 1.0]) is None


@pytest.mark.parametrize("answers", ["class", "text"])
def test_metrics_of_tasks_do_not_depend_on_the_batch_size(answers: str) -> None:
    """Nor on dropout, R-Drop and smoothing, which are for training."""
    lengths = [3 + (5 * n) % 11 for n in range(16)]
    rows = class_rows(lengths) if answers == "class" else decoder_rows(lengths)
    objective = objective_for(answers, "decoder", LossConfig(label_smoothing=0.1, r_drop=1.0, chunk_size=None))
    model: Any = with_head(built(llama(dropout=0.5)), 3).train()
    module, found = TrainModule(model, objective), []
    for size in (1, 3, 16):
        parts = [rows[start : start + size] for start in range(0, 16, size)]
        batches = [objective.collate(part, seq_len=16, ids=IDS) for part in parts]
        found.append(evaluate(module, batches, n_bytes=100, device=torch.device("cpu")))
        assert model.training
    count = "val/n_examples" if answers == "class" else "val/n_targets"
    for metrics in found:
        assert metrics is not None
        assert metrics[count] == (16 if answers == "class" else sum(max(2, n // 3) for n in lengths))
        assert {name for name in metrics if "drop" in name or "bpb" in name} == set()
        assert metrics == pytest.approx(found[0], rel=1e-6)
