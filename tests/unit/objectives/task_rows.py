"""Helpers for tests of task objectives: examples, heads, and packed batches against padded and single ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.interfaces import IGNORE_INDEX, NO_DOCUMENT, Answer, Batch, Examples, Objective, Row, Tokens
from tests.token_ids import token_ids

PAD, EOS, BOS, V = 0, 1, 2, 61
IDS = token_ids(V, bos_id=BOS, eos_id=EOS, pad_id=PAD)
LENGTHS = (9, 4, 13, 6, 5, 11, 3)


def text(n: int, draw: np.random.Generator) -> np.ndarray:
    return draw.integers(5, V, n)


def decoder_rows(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Row]:
    """A begin, a prompt, an answer of a third of it and its end; the answers are trained."""
    draw, rows = np.random.default_rng(seed), []
    for n in lengths:
        ids = np.array([BOS, *text(n - 2, draw), EOS])
        trained = np.arange(n) >= n - max(2, n // 3)
        rows.append(Row(ids, (0,), answer=Answer(trained=trained)))
    return rows


def seq2seq_rows(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Row]:
    """Sources of these lengths, targets of others; one target is its end alone."""
    draw, rows = np.random.default_rng(seed), []
    for place, n in enumerate(lengths):
        target = np.array([*text((7 * place) % 5, draw), EOS])
        rows.append(Row(np.array([*text(n - 1, draw), EOS]), (0,), answer=Answer(target=target)))
    return rows


def class_rows(lengths: Sequence[int] = LENGTHS, n_labels: int = 3, seed: int = 0) -> list[Row]:
    draw = np.random.default_rng(seed)
    return [
        Row(np.array([BOS, *text(n - 2, draw), EOS]), (0,), answer=Answer(label=int(draw.integers(n_labels))))
        for n in lengths
    ]


def span_rows(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Row]:
    """Question and context; every third has no answer."""
    draw, rows = np.random.default_rng(seed), []
    for place, n in enumerate(lengths):
        start, stop = np.sort(draw.integers(n // 2, n, 2)).tolist() if place % 3 else (0, 0)
        rows.append(
            Row(np.array([BOS, *text(n - 2, draw), EOS]), (0,), answer=Answer(span=(start, stop), second=n // 2))
        )
    return rows


def with_head(model: Any, n_out: int, n_layers: int = 2, width: int | None = None) -> Any:
    """The model with a small random head on its states."""
    width = width or model.config.d_model
    generator = torch.Generator().manual_seed(3)
    layers: list[nn.Module] = [nn.Linear(width, width), nn.Tanh()] if n_layers == 2 else []
    model.task_head = nn.Sequential(*layers, nn.Linear(width, n_out))
    with torch.no_grad():
        for parameter in model.task_head.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def padded(alone: Sequence[Batch]) -> Batch:
    """Batches of one example each as one batch of a row an example, filled up on the right."""
    width = max(batch.input_ids.shape[1] for batch in alone)
    columns = _stacked(alone, width)
    source = None
    if alone[0].source is not None:
        sources: list[Any] = [batch.source for batch in alone]
        source_width = max(side.input_ids.shape[1] for side in sources)
        found = _stacked(sources, source_width)
        source = Tokens(found["input_ids"], found["position_ids"], found["document_ids"])
    examples = None
    if alone[0].examples is not None:
        each: list[Any] = [batch.examples for batch in alone]
        of_places = each[0].labels.dim() == 2  # labels that are places move with their rows
        examples = Examples(
            torch.cat([one.first_N + b * width for b, one in enumerate(each)]),
            torch.cat([one.last_N + b * width for b, one in enumerate(each)]),
            torch.cat([one.labels + (b * width if of_places else 0) for b, one in enumerate(each)]),
        )
    n_targets, n_examples = (sum(getattr(batch, name) for batch in alone) for name in ("n_targets", "n_examples"))
    return Batch(**columns, n_targets=n_targets, source=source, examples=examples, n_examples=n_examples)


def _stacked(sides: Sequence[Any], width: int) -> dict[str, Tensor]:
    """Columns of one side; an example that fills its row has no document ids of its own."""
    fillers = {"input_ids": PAD, "labels": IGNORE_INDEX, "position_ids": 0, "segment_ids": 0}
    found = {}
    for name, filler in fillers.items():
        rows = [getattr(side, name, None) for side in sides]
        if rows[0] is not None:
            found[name] = torch.cat([F.pad(row, (0, width - row.shape[1]), value=filler) for row in rows])
    n_columns = torch.tensor([side.input_ids.shape[1] for side in sides])[:, None]
    return found | {"document_ids": torch.where(torch.arange(width) < n_columns, 0, NO_DOCUMENT)}


Outcome = tuple[dict[str, float], list[Tensor]]


def outcome(objective: Objective, model: Any, batches: Sequence[Batch]) -> Outcome:
    """Losses, sums and counts added up over the batches, and the gradients of their losses."""
    model.zero_grad()
    totals: dict[str, float] = {}
    for batch in batches:
        result = objective.loss(model, batch)
        assert tuple(result.sums) == objective.sum_names
        assert not any(value.requires_grad for value in result.sums.values())
        sum(result.losses.values()).backward()  # type: ignore[union-attr]
        found = {f"loss {name}": value for name, value in result.losses.items()} | result.sums | batch.counts
        for name, value in found.items():
            totals[name] = totals.get(name, 0.0) + (value if isinstance(value, int) else float(value.detach()))
    return totals, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def check_packed(objective: Objective, model: Any, rows: Sequence[Row], seq_len: int = 32) -> Batch:
    """One packed batch gives what the examples give one by one, and in padded rows; to 1e-6, in double precision."""
    model = model.double()
    packed = objective.collate(rows, seq_len=seq_len, ids=IDS)
    alone = [objective.collate([row], seq_len=seq_len, ids=IDS) for row in rows]
    assert packed.input_ids.shape[0] < len(rows)
    totals, gradients = outcome(objective, model, [packed])
    for batches in (alone, [padded(alone)]):
        expected, expected_gradients = outcome(objective, model, batches)
        assert totals.keys() == expected.keys()
        for name, value in expected.items():
            assert abs(totals[name] - value) <= 1e-6 * abs(value), name
        assert len(gradients) == len(expected_gradients)
        largest = max(float(wanted.norm()) for wanted in expected_gradients)
        for found, wanted in zip(gradients, expected_gradients, strict=True):
            size = float(wanted.norm())  # 0 but for rounding where a softmax does not see a shift of all logits
            assert float((found - wanted).norm()) <= 1e-6 * (size if size > 1e-6 * largest else largest)
    return packed


def kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q) in nats, summed over rows, by torch's own function."""
    return F.kl_div(logits_q.log_softmax(-1), logits_p.log_softmax(-1), reduction="sum", log_target=True)


def check_r_drop(make: Callable[[float], Objective], model: Any, batch: Batch, logits_of: Callable[[], Tensor]) -> None:
    """The loss of two passes in training, from seeds set before each; one pass in evaluation.

    ``logits_of`` gives the logits of one pass, a distribution in the last dimension; entries of minus infinity are no
    choice. With Q distributions an example, the divergence is their mean.
    """
    weight, objective = 0.7, make(0.7)
    name = "token" if batch.n_targets else "example"
    model.train()
    torch.manual_seed(5)
    result = objective.loss(model, batch)
    result.losses[name].backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch.manual_seed(5)
    once, again = (make(0.0).loss(model, batch) for _ in range(2))
    torch.manual_seed(5)
    logits_p, logits_q = logits_of(), logits_of()
    n_questions = logits_p.shape[1] if logits_p.dim() == 3 else 1
    apart = divergence(logits_p, logits_q) / n_questions
    assert float(apart.detach()) > 0.01
    expected = (once.losses[name] + again.losses[name]) / 2 + weight * apart
    torch.testing.assert_close(result.losses[name], expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    for found, parameter in zip(gradients, (p for p in model.parameters() if p.grad is not None), strict=True):
        assert float((found - parameter.grad).norm()) <= 1e-5 * max(1.0, float(parameter.grad.norm()))
    torch.testing.assert_close(result.sums["r_drop"], apart.detach(), rtol=1e-5, atol=1e-6)
    for key in objective.sum_names:
        torch.testing.assert_close(result.sums[key], (once.sums[key] + again.sums[key]) / 2)
    sums = {key: float(value) for key, value in result.sums.items()}
    assert objective.metrics(sums, batch.counts)["r_drop"] == sums["r_drop"] / batch.counts[name]
    model.eval()
    plain, evaluated = make(0.0).loss(model, batch), objective.loss(model, batch)
    assert torch.equal(plain.losses[name], evaluated.losses[name])
    assert tuple(evaluated.sums) == objective.sum_names


def divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """The symmetric one, distribution by distribution, over the entries that are choices."""
    flat_p, flat_q = logits_p.flatten(0, -2), logits_q.flatten(0, -2)
    parts = []
    for p, q in zip(flat_p, flat_q, strict=True):
        real = ~p.isneginf()
        parts.append((kl(p[real], q[real]) + kl(q[real], p[real])) / 2)
    return torch.stack(parts).sum()
