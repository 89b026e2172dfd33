"""Collation against a spelt-out rule, and the loss of packed windows against documents one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.interfaces import IGNORE_INDEX, NO_DOCUMENT, Batch, Row
from llmkit.objectives.causal_lm import CausalLM
from tests.token_ids import token_ids
from tests.unit.models.tiny import built, gpt2, llama

EOS, PAD = 1, 0
I, N = IGNORE_INDEX, NO_DOCUMENT


def objective(label_smoothing: float = 0.0, z_loss: float = 0.0, chunk_size: int | None = None) -> CausalLM:
    return CausalLM(label_smoothing=label_smoothing, z_loss=z_loss, chunk_size=chunk_size)


def collate(rows: list[list[int]], seq_len: int, pad_id: int = PAD) -> Batch:
    return objective().collate(
        [Row(np.array(row, dtype=np.int64), (0, n)) for n, row in enumerate(rows)],
        seq_len=seq_len,
        ids=token_ids(eos_id=EOS, pad_id=pad_id),
    )


def test_documents_positions_and_labels() -> None:
    batch = collate([[5, 6, EOS, 7, 8, 9, EOS], [EOS, 5, EOS, EOS, 6]], seq_len=6)
    assert batch.input_ids.tolist() == [[5, 6, EOS, 7, 8, 9], [EOS, 5, EOS, EOS, PAD, PAD]]
    assert batch.labels.tolist() == [[6, EOS, I, 8, 9, EOS], [I, EOS, I, I, I, I]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2], [0, 0, 1, 0, 0, 0]]
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 2, N, N]]
    assert batch.n_targets == 6


def test_rows_of_one_document_need_no_document_ids() -> None:
    """An end token in the last column, or only as a label, begins no second document in the row."""
    batch = collate([[5, 6, 7, EOS], [5, 6, EOS, 7]], seq_len=3)
    assert batch.document_ids is None
    assert batch.labels.tolist() == [[6, 7, EOS], [6, EOS, I]]
    assert batch.n_targets == 5
    assert collate([[5, 6, 7]], seq_len=3).document_ids is not None  # padding


def test_padding_is_told_by_length_not_by_id() -> None:
    """The pad id may be the end token, and either may be part of a text."""
    batch = collate([[5, EOS], [5, 5, EOS, 5]], seq_len=3, pad_id=EOS)
    assert batch.labels.tolist() == [[EOS, I, I], [5, EOS, I]]
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0, N, N], [0, 0, 0]]
    assert collate([[PAD, PAD, PAD, PAD]], seq_len=3).n_targets == 3


def test_a_window_without_a_target() -> None:
    for rows in ([[5]], [[]], [[EOS, EOS]]):
        assert collate(rows, seq_len=2).n_targets == 0


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), max_size=9), min_size=1, max_size=4))
def test_collation_follows_the_rule(rows: list[list[int]]) -> None:
    batch = collate(rows, seq_len=8)
    counted = 0
    for b, row in enumerate(rows):
        position = document = 0
        for t in range(8):
            real = t < len(row) - 1
            is_target = real and row[t] != EOS
            counted += is_target
            assert batch.labels[b, t] == (row[t + 1] if is_target else I)
            assert batch.input_ids[b, t] == (row[t] if real else PAD)
            assert batch.position_ids[b, t] == (position if real else 0)
            if batch.document_ids is not None:
                assert batch.document_ids[b, t] == (document if real else N)
            position += 1
            if real and row[t] == EOS:
                position, document = 0, document + 1
            assert batch.document_ids is not None or (document == 0 or t == 7)
    assert batch.n_targets == counted


@pytest.mark.parametrize(
    "config", [llama(), gpt2(), llama(logit_softcap=2.0, attention_windows=(3,))], ids=["llama", "gpt2", "capped"]
)
def test_the_loss_of_a_pack_is_the_sum_over_its_documents(config: object) -> None:
    """Packed equals unpacked, with gradients; the loss is a sum over targets."""
    documents = [[5, 6, 7, EOS], [8, 9, EOS], [10, 11, 12, 13, EOS]]
    model = built(config)  # type: ignore[arg-type]
    losses = []
    for rows in ([[id_ for document in documents for id_ in document]], documents):
        batch = collate(rows, seq_len=11)
        model.zero_grad()
        result = objective().loss(model, batch)
        result.losses["token"].backward()
        losses.append(
            (
                batch.n_targets,
                result.losses["token"].detach(),
                [p.grad.clone() for p in model.parameters() if p.grad is not None],
            )
        )
    (n, loss, grads), (m, alone, grads_alone) = losses
    assert n == m == 9
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)
    for a, b in zip(grads, grads_alone, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


def test_the_loss_is_that_of_the_models_own_logits() -> None:
    """The model caps its logits, so the loss has to."""
    batch = collate([[5, 6, 7, EOS, 9, 10]], seq_len=5)
    for config in (llama(), llama(logit_softcap=0.7)):
        model = built(config)
        logits = model(batch.input_ids, batch.position_ids, batch.document_ids)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
        torch.testing.assert_close(objective().loss(model, batch).losses["token"], expected, rtol=1e-5, atol=0)


def test_the_sums_hold_the_plain_nll() -> None:
    model, batch = built(llama()), collate([[5, 6, 7, EOS, 9, 10]], seq_len=5)
    plain, both = objective().loss(model, batch), objective(label_smoothing=0.2, z_loss=1e-3).loss(model, batch)
    assert plain.sums.keys() == {"nll", "n_correct"}
    assert both.sums.keys() == {"nll", "n_correct", "z_loss"}
    torch.testing.assert_close(plain.sums["nll"], plain.losses["token"].detach())
    torch.testing.assert_close(both.sums["nll"], plain.losses["token"].detach())
    assert float(both.sums["z_loss"]) > 0
    assert not any(value.requires_grad for value in both.sums.values())


def test_even_predictions_lose_log_v_a_target() -> None:
    """A model to which all tokens are equally likely."""
    config = llama()
    model = config.build()
    model.init_weights(0)
    with torch.no_grad():
        model.embedding.weight.zero_()
    batch = collate([[5, 6, EOS, 7], [5]], seq_len=3)
    assert float(objective().loss(model, batch).losses["token"].detach()) == pytest.approx(2 * math.log(61))


def test_the_plan_knows_how_many_rows_of_logits_are_held() -> None:
    assert objective(chunk_size=100).logit_rows(4096, 8192) == 100
    assert objective().logit_rows(4096, 8192) == 4096
    assert objective().logit_rows(10**6, 131072) == 1024


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"label_smoothing": 1.0}, "label_smoothing"), ({"z_loss": -1.0}, "z_loss"), ({"chunk_size": 0}, "chunk_size")],
)
def test_every_bad_value_is_named(changes: dict[str, float], field: str) -> None:
    assert [name for name, _ in objective(**changes).problems()] == [field]  # type: ignore[arg-type]
    assert objective().problems() == []
