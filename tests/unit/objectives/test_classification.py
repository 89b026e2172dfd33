"""Classes: the token that is read, packed rows against single ones, the loss of transformers, smoothing and R-Drop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.errors import ConfigError
from llmkit.interfaces import IGNORE_INDEX, Answer, Batch, Row
from llmkit.objectives.classification import Classification
from tests.unit.models import test_lstm, tiny, tiny_seq2seq, wrapped
from tests.unit.models.test_encoder_config import bert, modern
from tests.unit.objectives.task_rows import (
    BOS,
    EOS,
    IDS,
    PAD,
    check_packed,
    check_r_drop,
    class_rows,
    outcome,
    text,
    with_head,
)

N_LABELS = 3


def objective(kind: str = "encoder", **changes: Any) -> Classification:
    return Classification(**{"label_smoothing": 0.0, "r_drop": 0.0, "kind": kind, **changes})


def collate(rows: list[Row], kind: str = "encoder") -> Batch:
    return objective(kind).collate(rows, seq_len=32, ids=IDS)


MODELS = {
    "bert": ("encoder", lambda **changes: tiny.built(bert(pooler=False, **changes))),  # type: ignore[arg-type]
    "modern": ("encoder", lambda **changes: tiny.built(modern(**changes))),  # type: ignore[arg-type]
    "llama": ("decoder", lambda **changes: tiny.built(tiny.llama(**changes))),
    "t5": ("encoder_decoder", lambda **changes: tiny_seq2seq.built(tiny_seq2seq.t5(**changes))),
    "bart": ("encoder_decoder", lambda **changes: tiny_seq2seq.built(tiny_seq2seq.bart(**changes))),
    "lstm": ("decoder", lambda **_: test_lstm.built(test_lstm.STYLES["plain"])),
}


@pytest.mark.parametrize("name", MODELS)
def test_packed_examples_are_examples_one_by_one(name: str) -> None:
    kind, make = MODELS[name]
    batch = check_packed(objective(kind, label_smoothing=0.1), with_head(make().eval(), N_LABELS), class_rows())
    assert batch.counts == {"token": 0, "pair": 0, "example": len(class_rows())}


def test_a_wrapped_model_is_classified_too() -> None:
    model = with_head(wrapped.built(wrapped.DECODERS["windows"]), N_LABELS, width=16)
    check_packed(objective("decoder"), model, class_rows())


@pytest.mark.parametrize(("kind", "place"), [("encoder", 0), ("decoder", -1)])
def test_the_first_or_the_last_token_is_read(kind: str, place: int) -> None:
    rows = class_rows()
    batch = collate(rows, kind)
    assert batch.examples is not None
    flat, examples = batch.input_ids.flatten(), batch.examples
    assert flat[examples.first_N].tolist() == [BOS] * len(rows)
    assert flat[examples.last_N].tolist() == [EOS] * len(rows)
    for row, first, last in zip(rows, examples.first_N.tolist(), examples.last_N.tolist(), strict=True):
        assert flat[first : last + 1].tolist() == row.ids.tolist()
    assert examples.labels.tolist() == [row.answer.label for row in rows]  # type: ignore[union-attr]
    make = MODELS["bert" if kind == "encoder" else "llama"][1]
    model: Any = with_head(make().eval(), N_LABELS)
    for row, logits in zip(rows, objective(kind).choices(model, batch).logits_NQC[:, 0], strict=True):
        alone = model.hidden_states(collate([row], kind))[0, place]
        torch.testing.assert_close(logits, model.task_head(alone), rtol=1e-5, atol=1e-5)


def test_an_encoder_decoder_reads_its_start_alone() -> None:
    rows = class_rows()
    rows[0] = rows[0]._replace(answer=rows[0].answer._replace(target=np.array([EOS])))  # type: ignore[union-attr]
    batch = collate(rows, "encoder_decoder")
    assert batch.examples is not None
    assert batch.source is not None
    assert (batch.labels == IGNORE_INDEX).all()
    assert (batch.input_ids == PAD).all()
    assert torch.equal(batch.examples.first_N, batch.examples.last_N)
    assert batch.input_ids.shape[0] < len(rows)
    assert batch.document_ids is not None
    assert batch.source.document_ids is not None
    for row, place in zip(rows, batch.examples.first_N.tolist(), strict=True):
        b, column = divmod(place, batch.input_ids.shape[1])
        own = batch.source.document_ids[b] == batch.document_ids[b, column]
        assert batch.source.input_ids[b][own].tolist() == row.ids.tolist()


@pytest.mark.parametrize("kind", ["encoder", "decoder", "encoder_decoder"])
def test_the_loss_is_that_of_transformers(kind: str) -> None:
    losses = pytest.importorskip("transformers.loss.loss_utils")
    config = pytest.importorskip("transformers").BertConfig(num_labels=N_LABELS)
    make = {"encoder": "bert", "decoder": "llama", "encoder_decoder": "t5"}[kind]
    model, rows = with_head(MODELS[make][1]().eval(), N_LABELS), class_rows()
    result = objective(kind).loss(model, collate(rows, kind))
    logits = torch.cat([objective(kind).choices(model, collate([row], kind)).logits_NQC[:, 0] for row in rows])
    labels = torch.tensor([row.answer.label for row in rows])  # type: ignore[union-attr]
    expected = losses.ForSequenceClassificationLoss(labels, logits, config)
    torch.testing.assert_close(result.losses["example"] / len(rows), expected)
    assert int(result.sums["n_correct"]) == int((logits.argmax(1) == labels).sum())
    means = objective(kind).metrics({key: float(value) for key, value in result.sums.items()}, {"example": len(rows)})
    assert means == pytest.approx(
        {"loss": float(expected.detach()), "accuracy": float((logits.argmax(1) == labels).float().mean())}
    )


def test_smoothing_is_torch_s() -> None:
    model, batch = with_head(MODELS["bert"][1]().eval(), N_LABELS), collate(class_rows())
    logits = objective().choices(model, batch).logits_NQC[:, 0]
    assert batch.examples is not None
    expected = F.cross_entropy(logits, batch.examples.labels, reduction="sum", label_smoothing=0.3)
    result = objective(label_smoothing=0.3).loss(model, batch)
    torch.testing.assert_close(result.losses["example"], expected)
    torch.testing.assert_close(
        result.sums["nll"], F.cross_entropy(logits, batch.examples.labels, reduction="sum").detach()
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["encoder", "decoder", "encoder_decoder"])
def test_r_drop(kind: str, smoothing: float) -> None:
    make = {"encoder": "bert", "decoder": "llama", "encoder_decoder": "t5"}[kind]
    model, batch = with_head(MODELS[make][1](dropout=0.3), N_LABELS), collate(class_rows(), kind)

    def logits_of() -> Tensor:
        return objective(kind).choices(model, batch).logits_NQC

    check_r_drop(lambda w: objective(kind, r_drop=w, label_smoothing=smoothing), model, batch, logits_of)


def test_the_vocabulary_has_no_part_in_it() -> None:
    model = with_head(tiny.built(tiny.llama(tie_embeddings=False)).eval(), N_LABELS)
    _, gradients = outcome(objective("decoder"), model, [collate(class_rows(), "decoder")])
    assert model.head.weight.grad is None
    assert len(gradients) == sum(1 for _ in model.parameters()) - 1
    assert objective().logit_rows(4096, 8192) == 0


def test_two_segments() -> None:
    draw = np.random.default_rng(0)
    rows = [
        Row(np.array([BOS, *text(n - 2, draw), EOS]), (0,), answer=Answer(label=0, second=second))
        for n, second in ((9, 4), (5, None), (4, 2))
    ]
    batch = collate(rows)
    assert batch.segment_ids is not None
    assert batch.examples is not None
    flat, examples = batch.segment_ids.flatten(), batch.examples
    found = [flat[f : s + 1].tolist() for f, s in zip(examples.first_N.tolist(), examples.last_N.tolist(), strict=True)]
    assert found == [[0] * 4 + [1] * 5, [0] * 5, [0] * 2 + [1] * 2]
    assert collate(class_rows()).segment_ids is None


def test_examples_without_a_label_can_be_read() -> None:
    rows = class_rows()
    asked = [rows[0]._replace(answer=None), *rows[1:]]
    batch, model = collate(asked), with_head(MODELS["bert"][1]().eval(), N_LABELS)
    assert batch.n_examples == len(rows) - 1
    expected = objective().choices(model, collate(rows)).logits_NQC
    assert torch.equal(objective().choices(model, batch).logits_NQC, expected)
    with pytest.raises((RuntimeError, IndexError)):
        objective().loss(model, batch)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="no head for this task"):
        objective().loss(MODELS["bert"][1]().eval(), collate(class_rows()))


def test_bf16_is_scored_in_fp32() -> None:
    model, batch = with_head(MODELS["bert"][1]().eval(), N_LABELS), collate(class_rows())
    exact = objective().loss(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective().loss(model, batch)
    assert found.losses["example"].dtype == torch.float32
    torch.testing.assert_close(found.losses["example"], exact.losses["example"], rtol=0.05, atol=0.05)


def test_the_rest_of_what_objectives_say() -> None:
    task = objective()
    assert (task.trains, task.reads, task.scores_all_text) == (("encoder",), "rows", False)
    assert (task.window(20), task.target_len(20), task.lacks(IDS, 20)) == ((20, 0), 0, None)
    assert (task.predicted_share, objective("decoder").predicted_share) == (0.0, 0.0)
    two_sides = objective("encoder_decoder")
    assert (two_sides.trains, two_sides.target_len(20), two_sides.predicted_share) == (("encoder_decoder",), 1, 1.0)
    assert task.metrics({"nll": 0.0, "n_correct": 0.0}, {"example": 0}) == {"loss": 0.0, "accuracy": 0.0}


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"label_smoothing": 1.0}, "label_smoothing"), ({"r_drop": -0.1}, "r_drop"), ({"r_drop": float("nan")}, "r_drop")],
)
def test_every_bad_value_is_named(changes: dict[str, Any], field: str) -> None:
    assert [name for name, _ in objective(**changes).problems()] == [field]
    assert objective().problems() == []
