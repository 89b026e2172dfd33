"""Rearranged documents hold the same text, the others are untouched, and validation is next-token prediction."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import ConfigError
from llmkit.interfaces import IGNORE_INDEX, NO_DOCUMENT, Batch, Row
from llmkit.objectives.causal_lm import CausalLM
from llmkit.objectives.fill_in_the_middle import FillInTheMiddle, middle_last
from tests.token_ids import token_ids
from tests.unit.models.tiny import built, llama
from tests.unit.objectives.source_target import (
    BOS,
    EOS,
    FIRST_TEXT,
    batches,
    row_of,
    same_batch,
    share_real,
    stream,
    vocabulary,
)

PRE, SUF, MID = 5, 6, 7


def objective(fim: float = 0.5, spm: float = 0.5) -> FillInTheMiddle:
    return FillInTheMiddle(fim_rate=fim, spm_rate=spm, label_smoothing=0.0, z_loss=0.0, chunk_size=None)


def plain() -> CausalLM:
    return CausalLM(label_smoothing=0.0, z_loss=0.0, chunk_size=None)


def rows_of(batch: Batch) -> list[list[int]]:
    """The ids of each row, its last label included, from inputs and labels."""
    found = []
    for b in range(batch.input_ids.shape[0]):
        documents = torch.zeros_like(batch.labels[b]) if batch.document_ids is None else batch.document_ids[b]
        n_real = int((documents != NO_DOCUMENT).sum())
        last = int(batch.labels[b, n_real - 1]) if n_real else IGNORE_INDEX
        found.append(batch.input_ids[b, :n_real].tolist() + [last] * (last != IGNORE_INDEX))
    return found


def split(row: list[int]) -> list[list[int]]:
    """Documents of a row, each with its end."""
    ends = [0, *(place + 1 for place, id_ in enumerate(row) if id_ == EOS), len(row)]
    return [row[start:stop] for start, stop in pairwise(ends) if stop > start]


def kind(document: list[int]) -> str:
    body = document[int(document[0] == BOS) :]
    if body[0] != PRE:
        return "plain"
    return "suffix first" if body[1] == SUF else "prefix first"


def parts(document: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Prefix, middle and suffix of one rearranged with its prefix first; the middle ends the document."""
    pre, suf, mid = (document.index(symbol) for symbol in (PRE, SUF, MID))
    assert pre < suf < mid
    assert document[-1] == EOS
    return document[pre + 1 : suf], document[mid + 1 : -1], document[suf + 1 : mid]


def test_both_orders_by_hand() -> None:
    a, b, c, d, e = range(FIRST_TEXT, FIRST_TEXT + 5)
    vocab = vocabulary()
    document, cuts = np.array([BOS, a, b, c, d, e, EOS]), (0.7, 0.4)  # places 4 and 2 of 0 .. 5
    assert middle_last(document, cuts, suffix_first=False, ids=vocab).tolist() == [
        BOS,
        PRE,
        a,
        b,
        SUF,
        e,
        MID,
        c,
        d,
        EOS,
    ]
    assert middle_last(document, cuts, suffix_first=True, ids=vocab).tolist() == [
        BOS,
        PRE,
        SUF,
        e,
        MID,
        a,
        b,
        c,
        d,
        EOS,
    ]


def test_a_part_without_its_end_gets_one() -> None:
    """Else nothing would tell the model where a middle stops."""
    piece = np.array([201, 202, 203, 204])
    assert middle_last(piece, (0.3, 0.5), suffix_first=False, ids=vocabulary()).tolist() == [
        PRE,
        201,
        SUF,
        203,
        204,
        MID,
        202,
        EOS,
    ]


@settings(derandomize=True, max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    bos=st.booleans(),
    spm=st.sampled_from([0.0, 1.0]),
    cut=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_the_text_comes_back(lengths: list[int], bos: bool, spm: float, cut: int, seed: int) -> None:
    rng, row = np.random.default_rng(seed), []
    for n in lengths:
        row += [*[BOS] * bos, *rng.integers(FIRST_TEXT, FIRST_TEXT + 99, n).tolist(), EOS]
    row = row[: len(row) - cut] or row
    arranged = objective(1.0, spm).rearrange(row_of(row, seed), vocabulary(BOS if bos else None)).tolist()
    before, after = split(row), split(arranged)
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        text = [id_ for id_ in old if id_ not in (BOS, EOS)]
        if len(text) < 2:
            assert new == old
            continue
        assert new[:1] == old[:1] if old[0] == BOS else new[0] == PRE
        assert len(new) == len(old) + 3 + (old[-1] != EOS)
        if spm:  # prefix and middle stand together
            head = [*old[: int(old[0] == BOS)], PRE, SUF]
            assert new[: len(head)] == head
            mid = new.index(MID)
            assert new[mid + 1 : -1] + new[len(head) : mid] == text
        else:
            prefix, middle, suffix = parts(new)
            assert prefix + middle + suffix == text


def test_rates() -> None:
    """Shares of the documents that are rearranged, and of those the ones with the suffix first."""
    found = batches(objective(0.3, 0.8), stream(400_000, 40, 80), 256, vocabulary())
    kinds = Counter(kind(document) for batch in found for row in rows_of(batch) for document in split(row)[1:-1])
    n = sum(kinds.values())
    assert n > 4000
    assert 1 - kinds["plain"] / n == pytest.approx(0.3, abs=0.02)
    assert kinds["suffix first"] / (n - kinds["plain"]) == pytest.approx(0.8, abs=0.03)


def test_cuts_are_even() -> None:
    """Two even cuts make prefix, middle and suffix a third each on average, and any of them can be empty."""
    found = batches(objective(1.0, 0.0), stream(200_000, 42, 42), 256, vocabulary())
    lengths = np.array(
        [
            [len(part) for part in parts(document)]
            for batch in found
            for row in rows_of(batch)
            for document in split(row)[1:-1]
        ]
    )
    assert set(lengths.sum(1).tolist()) == {40}
    smaller = 40 * 81 / (6 * 41)  # the mean of the smaller of two even draws from 0 .. 40
    assert lengths.mean(0) == pytest.approx([smaller, 40 - 2 * smaller, smaller], abs=0.4)
    assert lengths.min(0).tolist() == [0, 0, 0]
    prefixes = np.bincount(lengths[:, 0], minlength=41) / len(lengths)
    expected = [(2 * (41 - place) - 1) / 41**2 for place in range(41)]
    assert np.abs(prefixes - expected).max() < 0.01


@pytest.mark.parametrize(("shortest", "longest"), [(5, 40), (300, 3000)])
def test_no_document_is_longer_than_seq_len(shortest: int, longest: int) -> None:
    task = objective(1.0)
    assert task.window(64) == (60, 1)
    found = batches(task, stream(60_000, shortest, longest), 64, vocabulary())
    assert max(int(batch.position_ids.max()) for batch in found) <= 63
    if longest > 64:
        assert max(int(batch.position_ids.max()) for batch in found) == 63, "the room is used"


def test_nothing_is_cut_and_little_is_padded() -> None:
    task, ids = objective(1.0), stream(60_000, 80, 80)
    found = batches(task, ids, 512, vocabulary())
    text = sum(int((batch.input_ids >= FIRST_TEXT).sum()) for batch in found)
    stride, _ = task.window(512)
    assert text >= (ids[: len(ids) // stride * stride] >= FIRST_TEXT).sum()
    assert share_real(batches(objective(), ids, 512, vocabulary())) >= 0.98
    assert share_real(batches(objective(), stream(60_000, 3000, 3000), 512, vocabulary())) >= 0.98


def test_labels_follow_the_rule_of_next_token_prediction() -> None:
    """The rearranged row is an ordinary row: the added symbols are labels, documents begin after an end."""
    ids, vocab = stream(61, 10, 20), vocabulary()
    row = Row(ids, (1, 0, 0, 0), 0)
    batch = objective(1.0).collate([row], seq_len=64, ids=vocab)
    arranged = objective(1.0).rearrange(row, vocab)
    expected = plain().collate([row._replace(ids=arranged)], seq_len=batch.input_ids.shape[1], ids=vocab)
    assert same_batch(batch, expected)
    n_documents = len(split(arranged.tolist()))
    assert batch.n_targets == len(arranged) - n_documents
    labels = batch.labels[batch.labels != IGNORE_INDEX].tolist()
    assert min(labels.count(symbol) for symbol in (PRE, SUF, MID)) >= n_documents - 2


@pytest.mark.parametrize("position", [0, None])
def test_rows_left_alone_give_the_batch_of_causal_lm(position: int | None) -> None:
    ids, vocab = stream(500, 10, 60), vocabulary()
    rows = [Row(ids[start : start + 61], (0, start), position) for start in range(0, 180, 60)]
    task = objective(1.0 if position is None else 0.0)
    assert same_batch(task.collate(rows, seq_len=64, ids=vocab), plain().collate(rows, seq_len=60, ids=vocab))
    assert task.scores_all_text


def test_a_row_depends_on_its_seed_alone() -> None:
    ids, task, vocab = stream(800, 10, 60), objective(), vocabulary()
    rows = [Row(ids[start : start + 61], (3, 0, 0, start), start) for start in range(0, 480, 60)]
    together = task.collate(rows, seq_len=64, ids=vocab)
    assert same_batch(together, task.collate(rows, seq_len=64, ids=vocab))
    assert rows_of(together) == [rows_of(task.collate([row], seq_len=64, ids=vocab))[0] for row in rows]
    other_epoch = [row._replace(seed=(3, 1, 0, row.seed[-1])) for row in rows]
    assert rows_of(task.collate(other_epoch, seq_len=64, ids=vocab)) != rows_of(together)


def test_the_loss_is_the_cross_entropy_of_all_labels() -> None:
    vocab = token_ids(61, bos_id=BOS, eos_id=EOS, infill_ids=(PRE, SUF, MID))
    rng, row = np.random.default_rng(0), []
    for n in (4, 6, 5):
        row += [BOS, *rng.integers(10, 61, n).tolist(), EOS]
    model, task = built(llama()), objective(1.0)
    batch = task.collate([row_of(row)], seq_len=32, ids=vocab)
    logits = torch.nn.functional.linear(model.hidden_states(batch), model.output_weight_VD)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    result = task.loss(model, batch)
    torch.testing.assert_close(result.losses["token"], expected)
    means = task.metrics({name: float(value.detach()) for name, value in result.sums.items()}, batch.counts)
    assert means["loss"] == pytest.approx(float(expected.detach()) / batch.n_targets)


def test_a_vocabulary_without_the_symbols_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        objective().collate([row_of([200, 201, 202, EOS])], seq_len=64, ids=token_ids(400))
    assert error.value.where == "tokenizer.extra_symbols"
    assert "<fim_middle>" in error.value.fix


def test_every_bad_value_is_named() -> None:
    assert [name for name, _ in objective(1.1, -0.1).problems()] == ["fim_rate", "spm_rate"]
    assert objective(0.0, 1.0).problems() == []
    bad = FillInTheMiddle(fim_rate=0.5, spm_rate=0.5, label_smoothing=1.0, z_loss=0.0, chunk_size=None)
    assert [name for name, _ in bad.problems()] == ["label_smoothing"]
