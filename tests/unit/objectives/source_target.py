"""Helpers for tests of objectives with a source and a target: streams, rows, and batches taken apart again."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from llmkit.interfaces import IGNORE_INDEX, NO_DOCUMENT, Batch, Objective, Row, TokenIds
from tests.token_ids import token_ids

PAD, EOS, BOS = 0, 1, 2
FIRST_TEXT, VOCAB = 200, 650
SENTINELS = tuple(range(400, VOCAB))  # text is below


def vocabulary(bos_id: int | None = BOS, n_sentinels: int = 250) -> TokenIds:
    return token_ids(
        VOCAB, bos_id=bos_id, eos_id=EOS, pad_id=PAD, sentinel_ids=SENTINELS[:n_sentinels], infill_ids=(5, 6, 7)
    )


def row_of(ids: list[int], *seed: int) -> Row:
    return Row(np.array(ids, dtype=np.int64), seed or (0,), 0)


def stream(n_tokens: int, shortest: int, longest: int, bos_id: int | None = BOS, seed: int = 0) -> np.ndarray:
    """Documents of random lengths between the two, begin and end tokens included."""
    rng = np.random.default_rng(seed)
    begin = [] if bos_id is None else [bos_id]
    ids: list[int] = []
    while len(ids) < n_tokens:
        n = int(rng.integers(shortest, longest + 1)) - len(begin) - 1
        ids += [*begin, *rng.integers(FIRST_TEXT, SENTINELS[0], n).tolist(), EOS]
    return np.array(ids[:n_tokens], dtype=np.int64)


def batches(objective: Objective, ids: np.ndarray, seq_len: int, vocab: TokenIds, batch_size: int = 8) -> list[Batch]:
    """What training would see of a stream."""
    stride, overlap = objective.window(seq_len)
    rows = [
        Row(ids[start : start + stride + overlap], (0, 0, 0, number), number)
        for number, start in enumerate(range(0, len(ids) - stride - overlap + 1, stride))
    ]
    return [
        objective.collate(rows[start : start + batch_size], seq_len=seq_len, ids=vocab)
        for start in range(0, len(rows), batch_size)
    ]


class Document(NamedTuple):
    """One document of a batch, taken out of both sides."""

    number: int
    source: list[int]
    inputs: list[int]
    labels: list[int]


def documents_of(batch: Batch) -> list[list[Document]]:
    """Of each row, its documents; checks on the way what holds for every batch of two sides."""
    assert batch.source is not None
    sides = (batch, batch.source)
    assert (batch.document_ids is None) == (batch.source.document_ids is None)
    columns = [torch.zeros_like(side.input_ids) if side.document_ids is None else side.document_ids for side in sides]
    for side, documents in zip(sides, columns, strict=True):
        check_columns(side.input_ids, side.position_ids, documents)
    assert torch.equal(batch.labels == IGNORE_INDEX, columns[0] == NO_DOCUMENT)
    assert batch.n_targets == int((batch.labels != IGNORE_INDEX).sum())
    found = []
    for b in range(batch.input_ids.shape[0]):
        target_is, source_is = columns[0][b], columns[1][b]
        found.append(
            [
                Document(
                    number,
                    batch.source.input_ids[b][source_is == number].tolist(),
                    batch.input_ids[b][target_is == number].tolist(),
                    batch.labels[b][target_is == number].tolist(),
                )
                for number in range(int(source_is.max()) + 1)
            ]
        )
    for document in (document for row in found for document in row):
        assert document.inputs == ([PAD, *document.labels[:-1]] if document.labels else [])
    return found


def check_columns(ids: Tensor, positions: Tensor, documents: Tensor) -> None:
    """Documents in rising order without a gap inside one, padding at the end, positions from 0 in each."""
    for row_ids, row_positions, row in zip(ids.tolist(), positions.tolist(), documents.tolist(), strict=True):
        n_real = sum(number != NO_DOCUMENT for number in row)
        assert all(number == NO_DOCUMENT for number in row[n_real:])
        assert row[:n_real] == sorted(row[:n_real])
        assert row_ids[n_real:] == [PAD] * (len(row) - n_real)
        assert row_positions == [row[:t].count(row[t]) for t in range(n_real)] + [0] * (len(row) - n_real)


def share_real(found: list[Batch]) -> float:
    """Of all columns computed on both sides, those that hold a token."""
    real = total = 0
    for batch in found:
        for side in (batch, batch.source):
            if side is not None:
                total += side.input_ids.numel()
                documents = side.document_ids
                real += side.input_ids.numel() if documents is None else int((documents != NO_DOCUMENT).sum())
    return real / total


class TinySeq2Seq(nn.Module):
    """An encoder-decoder in a few lines: the state of a target token is a function of it and its document's source."""

    logit_softcap = None

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(VOCAB, 6, generator=generator))
        self.bias = nn.Parameter(torch.randn(VOCAB, generator=generator))

    @property
    def output_weight_VD(self) -> Tensor:
        return self.table

    @property
    def output_bias_V(self) -> Tensor:
        return self.bias

    def output_states(self, hidden_PD: Tensor) -> Tensor:
        return 2 * hidden_PD

    def hidden_states(self, batch: Batch) -> Tensor:
        assert batch.source is not None
        source, documents = batch.source.input_ids, batch.source.document_ids
        own = torch.zeros_like(source) if documents is None else documents
        of_target = torch.zeros_like(batch.input_ids) if batch.document_ids is None else batch.document_ids
        same = (of_target[:, :, None] == own[:, None, :]).to(self.table.dtype)
        mean = same @ self.table[source] / same.sum(2, keepdim=True).clamp(min=1)
        return torch.tanh(self.table[batch.input_ids] + mean)


def check_loss(objective: Objective, batch: Batch) -> None:
    """Loss, accuracy and gradients against plain torch, over the target tokens only."""
    model = TinySeq2Seq().double()
    result = objective.loss(model, batch)  # type: ignore[arg-type]
    assert tuple(result.sums) == objective.sum_names
    result.losses["token"].backward()
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    logits = 2 * model.hidden_states(batch) @ model.table.t() + model.bias
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    expected.backward()
    torch.testing.assert_close(result.losses["token"].detach(), expected.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(result.sums["nll"].double(), expected.detach(), rtol=1e-9, atol=0)
    for grad, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)
    n_correct = int((logits.argmax(2) == batch.labels).sum())
    means = objective.metrics({name: float(value) for name, value in result.sums.items()}, batch.counts)
    assert means["accuracy"] == n_correct / batch.n_targets
    assert abs(means["loss"] - float(expected.detach()) / batch.n_targets) < 1e-9


def same_batch(a: Batch, b: Batch) -> bool:
    """Equal in every tensor."""
    pairs = [(a.input_ids, b.input_ids), (a.labels, b.labels), (a.position_ids, b.position_ids)]
    documents = [(a.document_ids, b.document_ids)]
    if a.source is not None and b.source is not None:
        pairs += [(a.source.input_ids, b.source.input_ids), (a.source.position_ids, b.source.position_ids)]
        documents += [(a.source.document_ids, b.source.document_ids)]
    same = [(x is None) == (y is None) and (x is None or y is None or torch.equal(x, y)) for x, y in documents]
    return a.n_targets == b.n_targets and all(same) and all(torch.equal(x, y) for x, y in pairs)
