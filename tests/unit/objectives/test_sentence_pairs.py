"""Sentence pairs: columns against a spelt-out rule, and packed rows against pairs one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmkit.config.build import build
from llmkit.errors import ConfigError
from llmkit.interfaces import IGNORE_INDEX, NO_DOCUMENT, Batch, Pair, Row
from llmkit.models.encoder import Encoder
from llmkit.objectives.masked_lm import MaskedLM
from llmkit.objectives.sentence_pairs import SentencePairs
from tests.token_ids import token_ids
from tests.unit.models.test_encoder_config import bert
from tests.unit.models.tiny import built

PAD, CLS, SEP, MASK, V = 0, 2, 1, 3, 61
IDS = token_ids(V, bos_id=CLS, eos_id=SEP, pad_id=PAD, mask_id=MASK)
MASKED: dict[str, Any] = {
    "mask_rate": 0.3,
    "mask_rate_start": None,
    "mask_rate_sequences": None,
    "mask_share": 0.8,
    "random_share": 0.1,
    "whole_word": False,
    "span_mean": None,
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "chunk_size": None,
}
RECIPES = Path(__file__).parents[3] / "recipes" / "objective"


def objective(**changes: Any) -> SentencePairs:
    fields = {"predict": "next_sentence", "masked_lm": True, "pair_weight": 1.0}
    return SentencePairs(**{**MASKED, **fields, **changes})


def row_of(shapes: list[tuple[int, int, int]], seed: int = 0) -> Row:
    """A row of pairs, each given as (ids of A, ids of B, label); without ids of B there is one segment."""
    draw = np.random.default_rng(seed)
    ids: list[int] = []
    pairs = []
    for n_first, n_second, label in shapes:
        start = len(ids)
        ids += [CLS, *draw.integers(MASK + 1, V, n_first), SEP]
        second = len(ids)
        if n_second:
            ids += [*draw.integers(MASK + 1, V, n_second), SEP]
        pairs.append(Pair(start, second, len(ids), label if n_second else IGNORE_INDEX))
    return Row(np.array(ids, np.int64), (seed, 0), seed, tuple(pairs))


def collate(rows: list[Row], seq_len: int = 32, **changes: Any) -> Batch:
    return objective(**changes).collate(rows, seq_len=seq_len, ids=IDS)


def one_by_one(row: Row) -> list[Row]:
    """Each pair in a row of its own."""
    return [
        Row(row.ids[p.start : p.stop], row.seed, None, (Pair(0, p.second - p.start, p.stop - p.start, p.label),))
        for p in row.pairs
    ]


SHAPES = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(0, 1)), min_size=1, max_size=3)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.lists(SHAPES, min_size=1, max_size=4))
def test_collation_follows_the_rule(shapes: list[list[tuple[int, int, int]]]) -> None:
    rows = [row_of(shape, seed) for seed, shape in enumerate(shapes)]
    seq_len = 48
    batch = collate(rows, seq_len)
    assert batch.segment_ids is not None
    assert batch.pair_starts is not None
    assert batch.pair_labels is not None
    starts, labels = [], []
    for b, row in enumerate(rows):
        place = 0
        for number, pair in enumerate(row.pairs):
            if pair.label != IGNORE_INDEX:
                starts.append(b * seq_len + pair.start)
                labels.append(pair.label)
            for t in range(pair.start, pair.stop):
                assert batch.position_ids[b, t] == t - pair.start
                assert batch.segment_ids[b, t] == int(t >= pair.second)
                assert batch.document_ids is None or batch.document_ids[b, t] == number
                shown, label = int(batch.input_ids[b, t]), int(batch.labels[b, t])
                assert label in (IGNORE_INDEX, row.ids[t])
                assert label != IGNORE_INDEX or shown == row.ids[t]
                assert label not in (CLS, SEP)
                place = t + 1
        assert (batch.input_ids[b, place:] == PAD).all()
        assert (batch.labels[b, place:] == IGNORE_INDEX).all()
        assert batch.document_ids is not None or place == seq_len
        assert batch.document_ids is None or (batch.document_ids[b, place:] == NO_DOCUMENT).all()
    assert batch.pair_starts.tolist() == starts
    assert batch.pair_labels.tolist() == labels
    assert batch.n_pairs == len(starts)
    assert batch.counts == {"token": int((batch.labels != IGNORE_INDEX).sum()), "pair": len(starts), "example": 0}
    if starts:
        assert (batch.input_ids.flatten()[batch.pair_starts] == CLS).all()


def test_a_row_that_is_one_pair_needs_no_document_ids() -> None:
    row = row_of([(10, 19, 1)])
    assert len(row.ids) == 32
    assert collate([row]).document_ids is None
    assert collate([row, row_of([(10, 18, 1)])]).document_ids is not None


def test_tokens_are_masked_as_without_pairs() -> None:
    """The same choice from the same seed, whatever else is in the batch."""
    rows = [row_of([(9, 8, 0), (4, 3, 1)], seed) for seed in range(4)]
    alone = MaskedLM(**MASKED).collate(rows, seq_len=32, ids=IDS)
    both = collate(rows)
    assert torch.equal(both.input_ids, alone.input_ids)
    assert torch.equal(both.labels, alone.labels)
    assert both.n_targets == alone.n_targets > 0
    assert torch.equal(collate(rows[2:3]).labels[0], both.labels[2])


def built_bert(**changes: Any) -> Encoder:
    model: Any = built(bert(vocab_size=64, max_seq_len=48, **changes))  # type: ignore[arg-type]
    return model.eval()  # type: ignore[no-any-return]


def test_without_masked_lm_the_text_is_shown_as_it_is() -> None:
    rows = [row_of([(9, 8, 0), (4, 3, 1)])]
    batch = collate(rows, masked_lm=False)
    assert batch.input_ids[0, : len(rows[0].ids)].tolist() == rows[0].ids.tolist()
    assert (batch.n_targets, batch.n_pairs) == (0, 2)
    no_mask = token_ids(V, bos_id=CLS, eos_id=SEP, pad_id=PAD)
    assert objective(masked_lm=False).collate(rows, seq_len=32, ids=no_mask).n_targets == 0
    with pytest.raises(ConfigError, match="needs a mask token"):
        objective().collate(rows, seq_len=32, ids=no_mask)
    model, alone = built_bert(), objective(masked_lm=False)
    result = alone.loss(model, batch)
    sum(result.losses.values()).backward()  # type: ignore[union-attr]
    assert float(result.losses["token"].detach()) == 0
    assert all(parameter.grad is not None for parameter in model.parameters())
    sums = {name: float(value) for name, value in result.sums.items()}
    found = alone.metrics(sums, batch.counts)
    assert found.keys() == {"loss", "pair_loss", "pair_accuracy"}
    assert found["loss"] == found["pair_loss"] == pytest.approx(float(result.losses["pair"].detach()) / 2)
    assert alone.logit_rows(4096, 8192) == 0
    assert objective(chunk_size=1000).logit_rows(4096, 8192) == 1000


def pair_reference(model: Encoder, batch: Batch) -> Tensor:
    """Summed cross entropy of the pairs, spelt out with the model's own parameters."""
    hidden = model.hidden_states(batch).flatten(0, 1)[batch.pair_starts]
    assert model.pooler is not None
    assert model.pair_head is not None
    pooled = torch.tanh(hidden @ model.pooler.weight.T + model.pooler.bias)
    scores = (pooled @ model.pair_head.weight.T + model.pair_head.bias).log_softmax(1)
    return -scores[torch.arange(batch.n_pairs), batch.pair_labels].sum()


@pytest.mark.parametrize("pair_weight", [1.0, 0.25])
def test_the_loss_is_that_of_both_tasks(pair_weight: float) -> None:
    model = built_bert()
    batch = collate([row_of([(9, 8, 0), (4, 3, 1)]), row_of([(6, 0, 0), (5, 5, 1)], 1)])
    both = objective(pair_weight=pair_weight)
    result = both.loss(model, batch)
    masked = MaskedLM(**MASKED).loss(model, batch)
    torch.testing.assert_close(result.losses["token"], masked.losses["token"])
    expected = pair_reference(model, batch)
    torch.testing.assert_close(result.losses["pair"], pair_weight * expected)
    assert tuple(result.sums) == both.sum_names == ("nll", "n_correct", "pair_nll", "pair_correct")
    assert not any(value.requires_grad for value in result.sums.values())
    torch.testing.assert_close(result.sums["pair_nll"], expected.detach())
    logits = model.pair_logits(model.hidden_states(batch).flatten(0, 1)[batch.pair_starts])
    assert int(result.sums["pair_correct"]) == int((logits.argmax(1) == batch.pair_labels).sum())
    sums = {name: float(value) for name, value in result.sums.items()}
    found = both.metrics(sums, batch.counts)
    n_tokens, n_pairs = batch.n_targets, 3
    assert found == pytest.approx(
        {
            "loss": sums["nll"] / n_tokens + pair_weight * sums["pair_nll"] / n_pairs,
            "mlm_loss": sums["nll"] / n_tokens,
            "accuracy": sums["n_correct"] / n_tokens,
            "pair_loss": sums["pair_nll"] / n_pairs,
            "pair_accuracy": sums["pair_correct"] / n_pairs,
        }
    )
    z_loss = objective(z_loss=1e-3)
    assert tuple(z_loss.loss(model, batch).sums) == z_loss.sum_names
    assert "z_loss" in z_loss.metrics(dict.fromkeys(z_loss.sum_names, 1.0), batch.counts)


@pytest.mark.parametrize("style", [{}, {"n_segments": 0, "share_layers": True}], ids=["bert", "albert"])
def test_packed_pairs_are_pairs_one_by_one(style: dict[str, Any]) -> None:
    """Losses and gradients of rows of several pairs and of the same pairs in padded rows of their own."""
    model = built_bert(**style)
    packed = [row_of([(9, 8, 0), (4, 3, 1), (6, 0, 0)], 3), row_of([(5, 5, 1), (12, 3, 0)], 4)]
    results = []
    for rows in (packed, [alone for row in packed for alone in one_by_one(row)]):
        plain = collate(rows, 40, masked_lm=False)
        labels = torch.where(plain.input_ids % 3 == 0, plain.input_ids, IGNORE_INDEX)  # masks depend on the row
        labels[plain.input_ids <= MASK] = IGNORE_INDEX
        batch = Batch(**{**vars(plain), "labels": labels, "n_targets": int((labels != IGNORE_INDEX).sum())})
        model.zero_grad()
        losses = objective().loss(model, batch).losses
        (losses["token"] + losses["pair"]).backward()
        results.append((batch.counts, losses, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (n, losses, grads), (m, losses_alone, grads_alone) = results
    assert n == m
    assert n["pair"] == 4
    for name, loss in losses.items():
        torch.testing.assert_close(loss, losses_alone[name], rtol=1e-6, atol=0)
    for a, b in zip(grads, grads_alone, strict=True):
        assert float((a - b).abs().max()) <= 1e-6 * max(1.0, float(b.abs().max()))


def test_pairs_of_a_row_do_not_see_each_other() -> None:
    """Another text in the first pair changes the answer about the second by exactly nothing."""
    model = built_bert()
    one, two = row_of([(9, 8, 0), (4, 3, 1)], 1), row_of([(9, 8, 1), (4, 3, 1)], 2)
    mixed = Row(np.concatenate([two.ids[: two.pairs[0].stop], one.ids[one.pairs[1].start :]]), (0, 0), None, one.pairs)
    answers = []
    for row in (one, mixed):
        batch = collate([row], masked_lm=False)
        answers.append(model.pair_logits(model.hidden_states(batch).flatten(0, 1)[batch.pair_starts]))
    assert torch.equal(answers[0][1], answers[1][1])
    assert not torch.equal(answers[0][0], answers[1][0])


def test_a_batch_without_labelled_pairs() -> None:
    model = built_bert()
    batch = collate([row_of([(9, 0, 0), (4, 0, 1)])])
    result = objective().loss(model, batch)
    assert batch.n_pairs == 0
    assert float(result.losses["pair"].detach()) == 0
    (result.losses["token"] + result.losses["pair"]).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
    assert objective().metrics({name: 0.0 for name in objective().sum_names}, batch.counts)["pair_accuracy"] == 0


def test_it_learns_to_tell_pairs_apart() -> None:
    """Pairs that are wrong when their first tokens differ."""
    torch.manual_seed(0)
    model = bert(vocab_size=64, max_seq_len=48).build()
    model.init_weights(0)
    draw = np.random.default_rng(0)
    rows = []
    for seed in range(64):
        row = row_of([(3, 3, 0), (3, 3, 0)], seed)
        pairs = [pair._replace(label=int(draw.integers(2))) for pair in row.pairs]
        for pair in pairs:
            row.ids[pair.start + 1], row.ids[pair.second] = 10, 10 + pair.label
        rows.append(row._replace(pairs=tuple(pairs)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    task, batch = objective(masked_lm=False), collate(rows, masked_lm=False)
    for _ in range(30):
        optimizer.zero_grad()
        result = task.loss(model, batch)
        (result.losses["pair"] / batch.n_pairs).backward()
        optimizer.step()
    assert int(result.sums["pair_correct"]) == batch.n_pairs == 128


@pytest.mark.parametrize("name", ["next_sentence", "sentence_order"])
def test_the_recipes_are_what_their_names_say(name: str) -> None:
    task = build(yaml.safe_load((RECIPES / f"{name}.yaml").read_text()))
    masked = yaml.safe_load((RECIPES / "masked_lm.yaml").read_text())
    assert isinstance(task, SentencePairs)
    assert task.predict == name
    assert task.problems() == []
    assert {field: getattr(task, field) for field in masked if field != "_target_"} == {
        field: value for field, value in masked.items() if field != "_target_"
    }
    assert task.trains == ("encoder",)
    assert task.reads == {"next_sentence": "pairs", "sentence_order": "ordered_pairs"}[name]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"pair_weight": 0.0}, "pair_weight"),
        ({"pair_weight": float("nan")}, "pair_weight"),
        ({"mask_rate": 0.0}, "mask_rate"),
    ],
)
def test_every_bad_value_is_named(changes: dict[str, Any], field: str) -> None:
    assert [name for name, _ in objective(**changes).problems()] == [field]
    assert objective().problems() == []


def test_cross_entropy_of_nothing_is_nothing() -> None:
    """On which a batch without pairs relies."""
    logits = torch.zeros(0, 2, requires_grad=True)
    assert float(F.cross_entropy(logits, torch.zeros(0, dtype=torch.int64), reduction="sum").detach()) == 0
