"""Answers of encoder-decoders: sources of their own, packed rows against single ones, closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmkit.interfaces import IGNORE_INDEX, Answer, Batch, Row
from llmkit.objectives.supervised_seq2seq import SupervisedSeq2Seq
from tests.unit.models import test_lstm_seq2seq, wrapped
from tests.unit.models.tiny_seq2seq import STYLES, built, t5
from tests.unit.objectives import source_target
from tests.unit.objectives.task_rows import EOS, IDS, check_packed, check_r_drop, seq2seq_rows, text


def objective(**changes: Any) -> SupervisedSeq2Seq:
    return SupervisedSeq2Seq(**{"label_smoothing": 0.0, "chunk_size": None, "r_drop": 0.0, **changes})


def collate(rows: list[Row], ids: Any = IDS) -> Batch:
    return objective().collate(rows, seq_len=32, ids=ids)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=8))
def test_every_example_keeps_its_source(sizes: list[tuple[int, int]]) -> None:
    draw = np.random.default_rng(len(sizes))
    rows = [
        Row(np.array([*text(s - 1, draw), EOS]), (0,), answer=Answer(target=np.array([*text(t - 1, draw), EOS])))
        for s, t in sizes
    ]
    batch = collate(rows)
    found = [(document.source, document.labels) for row in source_target.documents_of(batch) for document in row]
    expected = [(row.ids.tolist(), row.answer.target.tolist()) for row in rows]  # type: ignore[union-attr]
    assert sorted(found) == sorted(expected)
    assert batch.source is not None
    widths = [batch.source.input_ids.shape[1], batch.input_ids.shape[1]]
    longest = [max(s for s, _ in sizes), max(t for _, t in sizes)]
    assert max(widths) <= max(longest)
    assert all(width >= least for width, least in zip(widths, longest, strict=True))
    assert batch.counts == {"token": sum(t for _, t in sizes), "pair": 0, "example": 0}


MODELS = {name: lambda config=config: built(config) for name, config in STYLES.items()} | {
    "lstm": lambda: test_lstm_seq2seq.built(test_lstm_seq2seq.STYLES["two_layers"]),
    "transformers": lambda: wrapped.built(wrapped.SEQ2SEQS["sinusoids"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_packed_examples_are_examples_one_by_one(name: str) -> None:
    batch = check_packed(objective(label_smoothing=0.1), MODELS[name]().eval(), seq2seq_rows())
    assert batch.document_ids is not None


def test_loss_and_gradients_are_torch_s() -> None:
    vocab = source_target.vocabulary()
    rows = seq2seq_rows()
    batch = collate(rows, vocab)
    source_target.check_loss(objective(), batch)
    model = built(t5()).eval()
    loss = objective(label_smoothing=0.2).loss(model, batch).losses["token"]
    logits = model.output_states(model.hidden_states(batch)) @ model.output_weight_VD.t()
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(loss, expected)


def test_r_drop() -> None:
    model, batch = built(t5(dropout=0.3)), collate(seq2seq_rows())

    def logits_of() -> Tensor:
        states = model.output_states(model.hidden_states(batch).flatten(0, 1))
        return (states @ model.output_weight_VD.t())[batch.labels.flatten() != IGNORE_INDEX]

    check_r_drop(lambda weight: objective(r_drop=weight), model, batch, logits_of)


def test_the_rest_of_what_objectives_say() -> None:
    task = objective()
    assert (task.trains, task.reads, task.scores_all_text) == (("encoder_decoder",), "rows", False)
    assert (task.window(20), task.target_len(20), task.lacks(IDS, 20)) == ((20, 0), 20, None)
    assert [name for name, _ in objective(r_drop=-1.0).problems()] == ["r_drop"]
    assert task.problems() == []
