"""Prefix and rest are the text, cuts are even, and every row is as long as any other."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.interfaces import NO_DOCUMENT, Batch, Row, Tokens
from llmkit.objectives.prefix_lm import PrefixLM
from tests.unit.objectives.source_target import (
    BOS,
    EOS,
    FIRST_TEXT,
    Document,
    batches,
    check_loss,
    documents_of,
    row_of,
    same_batch,
    share_real,
    stream,
    vocabulary,
)


def objective(low: float = 0.0, high: float = 1.0, *, z_loss: float = 0.0) -> PrefixLM:
    return PrefixLM(min_fraction=low, max_fraction=high, label_smoothing=0.0, z_loss=z_loss, chunk_size=None)


def fractions(found: list[Document]) -> list[float]:
    return [len(document.source) / (len(document.source) + len(document.labels)) for document in found]


def n_real(side: Batch | Tokens) -> list[int]:
    """Tokens of each row."""
    documents = torch.zeros_like(side.input_ids) if side.document_ids is None else side.document_ids
    return (documents != NO_DOCUMENT).sum(1).tolist()


def test_a_row_by_hand() -> None:
    """Two windows of eight ids; halves are read when both fractions are one half."""
    a = list(range(FIRST_TEXT, FIRST_TEXT + 12))
    row = [BOS, a[0], a[1], EOS, BOS, a[2], a[3], a[4], a[5], a[6], a[7], EOS, BOS, a[8], a[9], EOS]
    batch = objective(0.5, 0.5).collate([row_of(row)], seq_len=8, ids=vocabulary())
    assert [(document.source, document.labels) for document in documents_of(batch)[0]] == [
        ([BOS, a[0]], [a[1], EOS]),
        ([BOS, a[2]], [a[3], a[4]]),
        ([a[5], a[6]], [a[7], EOS]),
        ([BOS, a[8]], [a[9], EOS]),
    ]
    assert batch.n_targets == 8


@settings(derandomize=True, max_examples=80, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=10), min_size=1, max_size=3),
    bos=st.booleans(),
    ends=st.sampled_from([(0.0, 1.0), (0.1, 0.3), (0.9, 0.9), (0.0, 0.0), (1.0, 1.0)]),
    seed=st.integers(0, 99),
)
def test_the_text_comes_back(rows: list[list[int]], bos: bool, ends: tuple[float, float], seed: int) -> None:
    """All of it, in order, but for pieces of one id; each piece has a source and a target."""
    rng, made = np.random.default_rng(seed), []
    for lengths in rows:
        row: list[int] = []
        for n in lengths:
            row += [*[BOS] * bos, *rng.integers(FIRST_TEXT, FIRST_TEXT + 99, n).tolist(), EOS]
        made.append(row)
    task, vocab = objective(*ends), vocabulary(BOS if bos else None)
    found = documents_of(task.collate([row_of(row, seed) for row in made], seq_len=600, ids=vocab))
    for row, documents in zip(made, found, strict=True):
        pieces = [document.source + document.labels for document in documents if document.source]
        assert all(len(document.source) >= 1 <= len(document.labels) for document in documents if document.source)
        edges = sorted({0, len(row) // 2, len(row), *(place + 1 for place, id_ in enumerate(row) if id_ == EOS)})
        expected = [row[start:stop] for start, stop in pairwise(edges)]
        assert pieces == [piece for piece in expected if len(piece) > 1]


@pytest.mark.parametrize(("shortest", "longest"), [(80, 80), (20, 300), (5000, 5000)])
def test_cuts_are_even(shortest: int, longest: int) -> None:
    """Fractions over many pieces against the uniform distribution, by their deciles."""
    found = batches(objective(), stream(200_000, shortest, longest), 128, vocabulary())
    drawn = [
        share
        for batch in found
        for row in documents_of(batch)
        for share, document in zip(fractions(row), row, strict=True)
        if len(document.source) + len(document.labels) > 30
    ]
    assert len(drawn) > 1000
    assert np.quantile(drawn, np.arange(1, 10) / 10) == pytest.approx(np.arange(1, 10) / 10, abs=0.04)


def test_cuts_keep_within_their_bounds() -> None:
    found = batches(objective(0.2, 0.4), stream(60_000, 80, 120), 256, vocabulary())
    long = [
        share
        for batch in found
        for row in documents_of(batch)
        for share, document in zip(fractions(row), row, strict=True)
        if len(document.labels) > 30
    ]
    assert 0.15 < min(long) < 0.22
    assert 0.38 < max(long) < 0.45


@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.1, 0.3), (0.5, 1.0)])
@pytest.mark.parametrize(("shortest", "longest"), [(2, 6), (80, 80), (20, 300), (5000, 5000)])
def test_rows_are_equally_long(shortest: int, longest: int, ends: tuple[float, float]) -> None:
    """So that nothing is padded, and neither side is ever longer than ``seq_len``."""
    task = objective(*ends)
    found = batches(task, stream(60_000, shortest, longest), 256, vocabulary())
    for batch in found:
        assert batch.source is not None
        assert max(batch.source.input_ids.shape[1], batch.input_ids.shape[1]) <= 256
        for source, target in zip(n_real(batch.source), n_real(batch), strict=True):
            assert longest < 20 or source == round(task.mean_fraction * (source + target))
    assert task.target_len(256) <= 256
    if longest > 20:
        assert share_real(found) >= 0.98


@pytest.mark.parametrize(
    ("ends", "window", "target"), [((0.0, 1.0), 512, 256), ((0.0, 0.5), 340, 255), ((0.5, 1.0), 340, 85)]
)
def test_windows(ends: tuple[float, float], window: int, target: int) -> None:
    assert objective(*ends).window(256) == (window, 0)
    assert objective(*ends).target_len(256) == target


def test_a_row_depends_on_its_seed_alone() -> None:
    ids, task, vocab = stream(5 * 128, 30, 200), objective(), vocabulary()
    rows = [Row(ids[start : start + 128], (7, 0, 0, start), start) for start in range(0, 5 * 128, 128)]
    together = task.collate(rows, seq_len=64, ids=vocab)
    assert same_batch(together, task.collate(rows, seq_len=64, ids=vocab))
    alone = [documents_of(task.collate([row], seq_len=64, ids=vocab))[0] for row in rows]
    assert documents_of(together) == alone
    other_epoch = [row._replace(seed=(7, 1, 0, row.seed[-1])) for row in rows]
    assert documents_of(task.collate(other_epoch, seq_len=64, ids=vocab)) != alone


def test_a_row_without_text_has_no_target() -> None:
    batch = objective().collate([row_of([EOS]), row_of([EOS] * 6)], seq_len=8, ids=vocabulary(None))
    assert batch.n_targets == 0
    assert batch.input_ids.shape == (2, 1)


def test_the_loss_is_the_cross_entropy_of_the_targets() -> None:
    rows = [row_of(stream(128, 30, 90, seed=seed).tolist(), seed) for seed in range(3)]
    check_loss(objective(), objective().collate(rows, seq_len=64, ids=vocabulary()))
    assert objective(z_loss=0.1).sum_names == ("nll", "n_correct", "z_loss")


def test_only_encoder_decoders_are_trained() -> None:
    assert objective().trains == ("encoder_decoder",)
    assert not objective().scores_all_text


@pytest.mark.parametrize(
    ("low", "high", "fields"),
    [(-0.1, 0.5, ["min_fraction"]), (0.5, 0.4, ["max_fraction"]), (0.0, 1.1, ["max_fraction"]), (0.3, 0.3, [])],
)
def test_every_bad_value_is_named(low: float, high: float, fields: list[str]) -> None:
    assert [name for name, _ in objective(low, high).problems()] == fields
    assert [name for name, _ in objective(z_loss=-1.0).problems()] == ["z_loss"]
