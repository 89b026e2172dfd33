"""Batches on their way to a device: every tensor goes along, whatever group it stands in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmkit.commands import assemble
from llmkit.interfaces import Batch, Examples, Row, Tokens


def _batch() -> Batch:
    def ids(n: int) -> Tensor:
        return torch.arange(n).reshape(1, n)

    return Batch(
        input_ids=ids(3), labels=ids(3) + 1, position_ids=ids(3), document_ids=None, n_targets=3,
        segment_ids=ids(3) * 0, source=Tokens(ids(5), ids(5), ids(5) * 0),
        examples=Examples(ids(1)[0], ids(1)[0], ids(1)[0]), n_examples=1,
    )  # fmt: skip


def _tensors(group: Any) -> list[Tensor]:
    found = []
    for value in vars(group).values():
        found += [value] if isinstance(value, Tensor) else _tensors(value) if hasattr(value, "__dict__") else []
    return found


def test_all_tensors_move() -> None:
    batch = _batch()
    moved = batch.to("meta")
    assert len(_tensors(moved)) == len(_tensors(batch)) == 10
    assert {tensor.device.type for tensor in _tensors(moved)} == {"meta"}
    assert (moved.n_targets, moved.n_examples, moved.document_ids) == (3, 1, None)


def test_all_tensors_are_pinned_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    batch = _batch()
    copy = assemble.in_pinned_memory(lambda rows: batch)([])
    assert [id(tensor) for tensor in pinned] == [id(tensor) for tensor in _tensors(batch)]
    for one, two in zip(_tensors(copy), _tensors(batch), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_batches_for_a_gpu_are(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(Batch, "pinned", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(assemble, "check_enough", lambda *_, **__: None)
    dataset = SimpleNamespace(row=lambda index, seed, position: Row(index, seed, position))
    work = SimpleNamespace(train=(dataset,), command="pretrain")
    engine = SimpleNamespace(micro_batch_size=1, grad_accum_steps=1)
    accelerator = SimpleNamespace(process_index=0, num_processes=1, device=torch.device(device))
    order = assemble.SampleOrder((4,), None, 0)
    batches = assemble.train_batches(work, order, engine, lambda rows: _batch(), accelerator)  # type: ignore[arg-type]
    batches.step(0)
    batches.close()
    assert bool(calls) == (device == "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches_arrive() -> None:
    batch = _batch().pinned()
    assert all(tensor.is_pinned() for tensor in _tensors(batch))
    for one, two in zip(_tensors(batch.to("cuda", non_blocking=True)), _tensors(_batch()), strict=True):
        torch.testing.assert_close(one.cpu(), two)
