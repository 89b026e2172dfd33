"""Answers of decoders: what is trained, packed rows against single ones, smoothing and R-Drop against closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmkit.interfaces import IGNORE_INDEX, NO_DOCUMENT, Answer, Batch, Row
from llmkit.models.layers import soft_cap
from llmkit.objectives.places import predicted_states
from llmkit.objectives.supervised_lm import SupervisedLM
from tests.unit.models import test_lstm, wrapped
from tests.unit.models.tiny import built, gpt2, llama
from tests.unit.objectives.task_rows import BOS, EOS, IDS, PAD, V, check_packed, check_r_drop, decoder_rows, text


def objective(**changes: Any) -> SupervisedLM:
    return SupervisedLM(**{"label_smoothing": 0.0, "chunk_size": None, "r_drop": 0.0, **changes})


def collate(rows: list[Row]) -> Batch:
    return objective().collate(rows, seq_len=32, ids=IDS)


EXAMPLES = st.lists(st.lists(st.booleans(), min_size=2, max_size=12), min_size=1, max_size=8)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(EXAMPLES)
def test_every_trained_id_is_predicted_from_the_one_before_it(flags: list[list[bool]]) -> None:
    """Documents taken out of the batch again are the examples, in any order."""
    draw = np.random.default_rng(len(flags))
    rows = [Row(np.array([BOS, *text(len(t) - 1, draw)]), (0,), answer=Answer(trained=np.array(t))) for t in flags]
    batch = collate(rows)
    documents = torch.zeros_like(batch.input_ids) if batch.document_ids is None else batch.document_ids
    found = []
    for b in range(batch.input_ids.shape[0]):
        for number in range(int(documents[b].max()) + 1):
            own = documents[b] == number
            columns = (batch.input_ids, batch.labels, batch.position_ids)
            ids, labels, positions = (column[b][own].tolist() for column in columns)
            assert positions == list(range(len(ids)))
            found.append((ids, labels))
    expected = []
    for row, trained in zip(rows, flags, strict=True):
        ids = row.ids.tolist()
        labels = [i if t else IGNORE_INDEX for i, t in zip(ids[1:], trained[1:], strict=True)]
        expected.append((ids[:-1], labels))
    assert sorted(found) == sorted(expected)
    assert batch.n_targets == sum(sum(t[1:]) for t in flags) == int((batch.labels != IGNORE_INDEX).sum())
    assert batch.input_ids.shape[1] == max(len(t) for t in flags) - 1
    padding = documents == NO_DOCUMENT
    assert (batch.input_ids[padding] == PAD).all()
    assert (batch.labels[padding] == IGNORE_INDEX).all()
    assert batch.counts == {"token": batch.n_targets, "pair": 0, "example": 0}


def test_an_end_token_in_the_text_begins_no_document() -> None:
    """Chats hold one after every turn; the example stays one document."""
    ids = np.array([BOS, 7, EOS, 8, 9, EOS])
    batch = collate([Row(ids, (0,), answer=Answer(trained=np.array([0, 0, 1, 0, 1, 1], bool)))])
    assert batch.document_ids is None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]]
    assert batch.labels.tolist() == [[IGNORE_INDEX, EOS, IGNORE_INDEX, 9, EOS]]


MODELS = {
    "llama": lambda: built(llama()),
    "gpt2": lambda: built(gpt2()),
    "window": lambda: built(llama(attention_windows=[4, None], logit_softcap=5.0)),
    "lstm": lambda: test_lstm.built(test_lstm.STYLES["attention"]),
    "transformers": lambda: wrapped.built(wrapped.DECODERS["capped logits"]),
    "mamba": lambda: wrapped.built(wrapped.DECODERS["no attention"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_packed_examples_are_examples_one_by_one(name: str) -> None:
    batch = check_packed(objective(label_smoothing=0.1), MODELS[name]().eval(), decoder_rows())
    assert batch.document_ids is not None


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_torch_s(smoothing: float) -> None:
    model, batch = built(llama()).eval(), collate(decoder_rows())
    result = objective(label_smoothing=smoothing).loss(model, batch)
    logits = model(batch.input_ids, batch.position_ids, batch.document_ids).flatten(0, 1)
    labels = batch.labels.flatten()
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(result.losses["token"], expected)
    torch.testing.assert_close(result.sums["nll"], F.cross_entropy(logits, labels, reduction="sum").detach())
    right = int((logits.argmax(1) == labels).sum())
    means = objective().metrics({name: float(value) for name, value in result.sums.items()}, batch.counts)
    assert means == pytest.approx(
        {"loss": float(result.sums["nll"]) / batch.n_targets, "accuracy": right / batch.n_targets}
    )


def test_what_is_not_trained_costs_no_product_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = built(llama()).eval(), collate(decoder_rows())
    seen = []
    real = type(model).output_states
    monkeypatch.setattr(type(model), "output_states", lambda self, x: seen.append(x.shape[0]) or real(self, x))
    objective().loss(model, batch)
    assert 2 * batch.n_targets < batch.n_computed
    assert seen == [batch.n_targets]


@pytest.mark.parametrize("changes", [{}, {"label_smoothing": 0.1}, {"chunk_size": 3}])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_r_drop(changes: dict[str, Any], softcap: float | None) -> None:
    model, batch = built(llama(dropout=0.3, logit_softcap=softcap)), collate(decoder_rows())

    def logits_of() -> Tensor:
        states_PD, labels_P = predicted_states(model, batch)  # the same draws of dropout as in the loss
        assert labels_P.shape[0] == batch.n_targets
        return soft_cap(states_PD @ model.output_weight_VD.T, softcap)

    check_r_drop(lambda weight: objective(r_drop=weight, **changes), model, batch, logits_of)


def test_a_batch_without_targets_trains_nothing() -> None:
    row = Row(np.array([BOS, 7, 8]), (0,), answer=Answer(trained=np.zeros(3, bool)))
    batch, model = collate([row]), built(llama(dropout=0.3)).train()
    for weight in (0.0, 1.0):
        result = objective(r_drop=weight).loss(model, batch)
        result.losses["token"].backward()
        assert float(result.losses["token"].detach()) == 0
        assert all(bool((p.grad == 0).all()) for p in model.parameters() if p.grad is not None)


def test_the_rest_of_what_objectives_say() -> None:
    task = objective(chunk_size=100)
    assert (task.trains, task.reads, task.scores_all_text) == (("decoder",), "rows", False)
    assert (task.window(20), task.target_len(20), task.lacks(IDS, 20)) == ((20, 0), 0, None)
    assert (task.predicted_share, task.logit_rows(4096, V)) == (1.0, 100)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"label_smoothing": 1.0}, "label_smoothing"), ({"r_drop": -0.1}, "r_drop"), ({"chunk_size": 0}, "chunk_size"),
     ({"r_drop": float("nan")}, "r_drop")],
)  # fmt: skip
def test_every_bad_value_is_named(changes: dict[str, Any], field: str) -> None:
    assert [name for name, _ in objective(**changes).problems()] == [field]
    assert objective().problems() == []
