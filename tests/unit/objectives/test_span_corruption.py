"""Nothing of the text is lost, the numbers are those of the paper, and every mask is equally likely."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import ConfigError
from llmkit.interfaces import Row
from llmkit.objectives.span_corruption import SpanCorruption, Spans, place_spans, take_out
from tests.unit.objectives.source_target import (
    BOS,
    EOS,
    FIRST_TEXT,
    PAD,
    SENTINELS,
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


def objective(density: float = 0.15, mean: float = 3.0, *, label_smoothing: float = 0.0) -> SpanCorruption:
    return SpanCorruption(
        noise_density=density, mean_span_length=mean, label_smoothing=label_smoothing, z_loss=0.0, chunk_size=None
    )


def restored(document: Document) -> list[int]:
    """The text, its spans back where their sentinels stand."""
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for id_ in document.labels[:-1]:
        if id_ in SENTINELS:
            current = spans[id_] = []
        else:
            current.append(id_)
    assert [id_ for id_ in document.source if id_ in SENTINELS] == list(SENTINELS[: len(spans)]) == list(spans)
    assert all(spans.values()), "no span is empty"
    assert document.labels == [] or document.labels[-1] == EOS
    assert not {BOS, EOS} & set(document.labels[:-1]), "special tokens are never taken out"
    return [real for id_ in document.source for real in spans.get(id_, [id_])]


def runs_of_sentinels(document: Document) -> int:
    """Sentinels next to each other: spans that should have been one."""
    return sum(a in SENTINELS and b in SENTINELS for a, b in zip(document.source, document.source[1:], strict=False))


def test_one_document_by_hand() -> None:
    a, b, c, d, e, f = range(FIRST_TEXT, FIRST_TEXT + 6)
    row = np.array([a, b, c, d, e, f, EOS])
    sides = take_out(row, np.zeros(7, np.int64), Spans(np.array([1, 4]), np.array([2, 1])), vocabulary())
    assert sides.source.tolist() == [a, SENTINELS[0], d, SENTINELS[1], f, EOS]
    assert sides.target.tolist() == [SENTINELS[0], b, c, SENTINELS[1], e, EOS]


def test_documents_of_a_row_count_their_sentinels_from_zero() -> None:
    text = list(range(FIRST_TEXT, FIRST_TEXT + 9))
    row = np.array([BOS, *text[:4], EOS, BOS, EOS, BOS, *text[4:]])
    documents = np.array([0] * 6 + [1] * 2 + [2] * 6)
    spans = Spans(np.array([3, 9, 12]), np.array([2, 1, 2]))
    sides = take_out(row, documents, spans, vocabulary())
    first, second = SENTINELS[:2]
    assert sides.source.tolist() == [BOS, *text[:2], first, EOS, BOS, EOS, BOS, first, *text[5:7], second]
    assert sides.source_documents.tolist() == [0] * 5 + [1] * 2 + [2] * 5
    assert sides.target.tolist() == [first, *text[2:4], EOS, first, text[4], second, *text[7:], EOS]
    assert sides.target_documents.tolist() == [0] * 4 + [2] * 6


TEXTS = st.lists(st.integers(0, 60), min_size=1, max_size=8)


@settings(derandomize=True, max_examples=80, deadline=None)
@given(
    lengths=st.lists(TEXTS, min_size=1, max_size=3),
    bos=st.booleans(),
    ends=st.booleans(),
    setting=st.sampled_from([(0.15, 3.0), (0.5, 3.0), (0.15, 32.0), (0.5, 1.0), (0.9, 10.0), (0.02, 2.5)]),
    seed=st.integers(0, 99),
)
def test_the_text_comes_back(
    lengths: list[list[int]], bos: bool, ends: bool, setting: tuple[float, float], seed: int
) -> None:
    """Every row, every document: nothing lost, nothing added, no special token taken out."""
    rng, made = np.random.default_rng(seed), []
    for row_lengths in lengths:
        row: list[int] = []
        for n in row_lengths:
            row += [*[BOS] * bos, *rng.integers(FIRST_TEXT, FIRST_TEXT + 99, n).tolist(), EOS]
        made.append(row if ends else row[:-1] or [EOS])
    task, vocab = objective(*setting), vocabulary(BOS if bos else None)
    found = task.collate([row_of(row, seed, n) for n, row in enumerate(made)], seq_len=480, ids=vocab)
    for row, documents in zip(made, documents_of(found), strict=True):
        assert [id_ for document in documents for id_ in restored(document)] == row
        assert sum(map(runs_of_sentinels, documents)) == 0
        assert [document.source.count(EOS) for document in documents[:-1]] == [1] * (len(documents) - 1)


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize(("shortest", "longest"), [(20, 20), (80, 80), (20, 300), (3000, 3000)])
def test_density_and_span_length_over_many_tokens(shortest: int, longest: int, bos: int | None) -> None:
    """0.15 of the tokens within 0.1 points, spans of 3 within 0.05; the published 0.9 tokens of source a token."""
    task, n_tokens = objective(), 1_000_000 if (longest, bos) == (300, BOS) else 150_000
    noise = spans = source = 0
    for batch in batches(task, stream(n_tokens, shortest, longest, bos), 512, vocabulary(bos)):
        assert batch.source is not None
        n_spans = int((batch.labels >= SENTINELS[0]).sum())
        spans, noise = spans + n_spans, noise + int((batch.labels >= FIRST_TEXT).sum()) - n_spans
        kept = batch.source.input_ids.numpy()
        assert kept.shape[1] <= 512
        source += int((kept != PAD).sum())
    n_read = n_tokens // task.window(512)[0] * task.window(512)[0]
    assert noise / n_read == pytest.approx(0.15, abs=0.001)
    assert noise / spans == pytest.approx(3.0, abs=0.05)
    assert source + noise - spans == n_read, "no id was cut off"


def test_small_rows_have_the_density_too() -> None:
    """Rounding 0.15 of 71 tokens always the same way would be half a point off."""
    found = batches(objective(), stream(100_000, 20, 90), 64, vocabulary())
    noise = sum(int(((batch.labels >= FIRST_TEXT) & (batch.labels < SENTINELS[0])).sum()) for batch in found)
    n_read = 100_000 // objective().window(64)[0] * objective().window(64)[0]
    assert noise / n_read == pytest.approx(0.15, abs=0.001)


def test_no_document_and_no_place_in_a_row_is_favoured() -> None:
    """Short and long documents, the beginning and the end of a row: the same density of noise everywhere."""
    task, n_rows = objective(), 1500
    by_place, by_length = np.zeros((2, 9)), np.zeros((2, 300))
    for start, batch in enumerate(batches(task, stream(n_rows * 142, 20, 200, None), 128, vocabulary(None), 1)):
        place = 0
        for document in documents_of(batch)[0]:
            n = len(restored(document))
            length = n if 0 < place < 142 - n else 0  # the first and the last are cut
            n_noise = sum(id_ < SENTINELS[0] for id_ in document.labels[:-1])
            by_length[:, length] += n_noise, n
            by_place[:, (place + n // 2) // 16] += n_noise, n
            place += n
        assert place == 142, start
    assert by_place[0] / by_place[1] == pytest.approx(np.full(9, 0.15), abs=0.012)
    for low, high in ((20, 40), (40, 80), (80, 142)):
        noise, n = by_length[:, low:high].sum(1)
        assert noise / n == pytest.approx(0.15, abs=0.008)


def all_masks(size: int, n_noise: int, n_spans: int) -> set[tuple[int, ...]]:
    """Every mask with so many noise tokens in so many runs, by trying all."""
    masks = (set(places) for places in combinations(range(size), n_noise))
    return {tuple(sorted(mask)) for mask in masks if sum(place - 1 not in mask for place in mask) == n_spans}


def test_every_mask_is_equally_likely() -> None:
    rng, found, n = np.random.default_rng(0), Counter[tuple[int, ...]](), 12_000
    for _ in range(n):
        starts, lengths = place_spans(np.array([7, 2, 4]), np.array([4, 0, 1]), np.array([2, 0, 1]), rng)
        found[tuple(int(s) + i for s, length in zip(starts, lengths, strict=True) for i in range(length))] += 1
    first, last = all_masks(7, 4, 2), all_masks(4, 1, 1)
    possible = {(*a, *(9 + place for place in b)) for a in first for b in last}
    assert len(possible) == 18 * 4
    assert found.keys() == possible
    expected = n / len(possible)
    assert sum((count - expected) ** 2 / expected for count in found.values()) < 113  # 71 degrees, p = 0.001


def simple_span_lengths(n_noise: int, n_spans: int, rng: random.Random) -> list[int]:
    """The segmentation of the authors' program: a random division into parts of one token at least."""
    first_of_span = [True] + [False] * (n_noise - 1)
    flags = [True] * (n_spans - 1) + [False] * (n_noise - n_spans)
    rng.shuffle(flags)
    first_of_span[1:] = flags
    starts = [i for i, first in enumerate(first_of_span) if first]
    return [stop - start for start, stop in zip(starts, [*starts[1:], n_noise], strict=True)]


def test_span_lengths_are_distributed_as_in_the_authors_program() -> None:
    """One document of 569 tokens: 85 or 86 noise tokens in 28 or 29 spans, as the formula of the paper rounds them."""
    task, vocab, rng = objective(), vocabulary(), random.Random(0)
    row = [*range(FIRST_TEXT, FIRST_TEXT + 150)] * 4
    ours, theirs, numbers = Counter[int](), Counter[int](), Counter[tuple[int, int]]()
    for seed in range(400):
        batch = task.collate([row_of(row[:569], seed)], seq_len=512, ids=vocab)
        labels = batch.labels[0][batch.labels[0] >= 0].tolist()
        marks = [place for place, id_ in enumerate(labels) if id_ in SENTINELS]
        lengths = [b - a - 1 for a, b in zip(marks, [*marks[1:], len(labels) - 1], strict=True)]
        numbers[sum(lengths), len(lengths)] += 1
        ours.update(lengths)
        theirs.update(simple_span_lengths(sum(lengths), len(lengths), rng))
    assert set(numbers) == {(85, 28), (86, 29)}
    assert numbers[86, 29] / 400 == pytest.approx(0.35, abs=0.08)
    n = sum(ours.values())
    for length in range(1, 12):
        assert ours[length] / n == pytest.approx(theirs[length] / n, abs=0.012)


def test_windows_have_the_published_size() -> None:
    """T5 reads 568 tokens for 512 and 114; here the end token is one of the 569."""
    assert objective().window(512) == (569, 0)
    assert objective().target_len(512) == 86 + 29 + 1
    assert objective().n_sentinels(512) == 29


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    density=st.floats(0.01, 0.9),
    mean=st.floats(1.0, 40.0),
    seq_len=st.integers(1, 700),
)
def test_a_window_is_the_longest_that_fits(density: float, mean: float, seq_len: int) -> None:
    task = objective(density, mean)
    if task.problems():
        return
    n_ids, overlap = task.window(seq_len)
    assert overlap == 0
    assert n_ids >= seq_len

    def longest_source(n: int) -> int:
        low, high = int(np.floor(density * n)), int(np.ceil(density * n))
        return max(n - noise + (max(round(noise / mean), 1) if noise else 0) for noise in (low, high))

    assert longest_source(n_ids) <= seq_len < longest_source(n_ids + 1)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(longest=st.integers(3, 30), seed=st.integers(0, 99), seq_len=st.sampled_from([16, 60, 128]))
def test_nothing_is_lost_and_no_document_is_longer_than_seq_len(longest: int, seed: int, seq_len: int) -> None:
    """Not even where documents are too short to be corrupted; then the row is wider instead."""
    task, vocab = objective(), vocabulary()
    ids = stream(4 * task.window(seq_len)[0], 2, longest, seed=seed)
    rows = [ids[start : start + task.window(seq_len)[0]].tolist() for start in range(0, len(ids), len(ids) // 4)]
    batch = task.collate([row_of(row, n) for n, row in enumerate(rows)], seq_len=seq_len, ids=vocab)
    for row, documents in zip(rows, documents_of(batch), strict=True):
        assert [id_ for document in documents for id_ in restored(document)] == row
        assert all(len(document.source) <= seq_len for document in documents)


def test_texts_too_short_stay_whole_and_are_no_target() -> None:
    row = [BOS, 201, 202, 203, EOS] * 20
    batch = objective().collate([row_of(row)], seq_len=128, ids=vocabulary())
    assert batch.n_targets == 0
    assert batch.input_ids.shape == (1, 1)
    assert [document.source for document in documents_of(batch)[0]] == [row[:5]] * 20


@pytest.mark.parametrize(("shortest", "longest"), [(80, 80), (30, 200), (3000, 3000)])
def test_little_is_padded(shortest: int, longest: int) -> None:
    assert share_real(batches(objective(), stream(60_000, shortest, longest), 512, vocabulary())) >= 0.98


def test_widths_are_those_of_the_longest_row() -> None:
    batch = objective(0.5, 5.0).collate(
        [row_of(list(range(200, 270))), row_of([200, 201])], seq_len=100, ids=vocabulary()
    )
    assert batch.source is not None
    assert batch.source.input_ids.shape == (2, 70 - 35 + 7)
    assert batch.input_ids.shape == (2, 35 + 7 + 1)


def test_rows_of_one_document_without_padding_need_no_document_ids() -> None:
    rows = [row_of(list(range(200, 318)), n) for n in range(2)]
    batch = objective(0.5, 5.0).collate(rows, seq_len=71, ids=vocabulary())
    assert batch.document_ids is None
    documents_of(batch)
    batch = objective(0.5, 5.0).collate([*rows, row_of(list(range(200, 316)), 2)], seq_len=71, ids=vocabulary())
    assert batch.document_ids is not None
    assert batch.source is not None
    assert batch.source.document_ids is not None, "one row is shorter"


def test_a_row_depends_on_its_seed_alone() -> None:
    ids = stream(5 * 142, 30, 200)
    rows = [Row(ids[start : start + 142], (7, 0, 0, start), start) for start in range(0, 5 * 142, 142)]
    task, vocab = objective(), vocabulary()
    together = task.collate(rows, seq_len=128, ids=vocab)
    assert same_batch(together, task.collate(rows, seq_len=128, ids=vocab))
    alone = [documents_of(task.collate([row], seq_len=128, ids=vocab))[0] for row in rows]
    assert documents_of(together) == alone
    moved = [row._replace(position=None) for row in reversed(rows)]
    assert documents_of(task.collate(moved, seq_len=128, ids=vocab)) == alone[::-1]


def test_each_epoch_has_masks_of_its_own() -> None:
    ids, task = stream(142, 142, 142), objective()
    found = [
        documents_of(task.collate([Row(ids, (7, epoch, 0, 0), epoch)], seq_len=128, ids=vocabulary()))[0][0].source
        for epoch in range(5)
    ]
    assert len({tuple(source) for source in found}) == 5


def test_too_few_sentinels_are_told_at_the_first_batch() -> None:
    """Whatever the text in it: 29 are needed for a document of 569 tokens."""
    with pytest.raises(ConfigError) as error:
        objective().collate([row_of([200, 201, EOS])], seq_len=512, ids=vocabulary(n_sentinels=28))
    assert "needs 29 sentinels" in error.value.what
    assert error.value.where == "tokenizer.n_sentinels"
    assert "n_sentinels=29" in error.value.fix
    assert objective().collate([row_of([200, 201, EOS])], seq_len=512, ids=vocabulary(n_sentinels=29)).n_targets == 0


def test_the_loss_is_the_cross_entropy_of_the_targets() -> None:
    rows = [row_of(stream(142, 30, 90, seed=seed).tolist(), seed) for seed in range(3)]
    check_loss(objective(), objective().collate(rows, seq_len=128, ids=vocabulary()))
    smooth = SpanCorruption(noise_density=0.15, mean_span_length=3.0, label_smoothing=0.1, z_loss=1e-3, chunk_size=7)
    assert smooth.sum_names == ("nll", "n_correct", "z_loss")
    assert smooth.metrics({"nll": 6.0, "n_correct": 1.0, "z_loss": 2.0}, {"token": 4}) == {
        "loss": 1.5,
        "accuracy": 0.25,
        "z_loss": 0.5,
    }
    assert smooth.logit_rows(100, 5000) == 7
    assert objective().logit_rows(10**6, 131072) == 1024


@pytest.mark.parametrize(
    ("density", "mean", "smoothing", "fields"),
    [
        (0.0, 3.0, 0.0, ["noise_density"]),
        (1.0, 3.0, 0.0, ["noise_density"]),
        (0.8, 3.0, 0.0, ["noise_density"]),
        (0.75, 3.0, 0.0, []),
        (0.15, 0.5, 1.0, ["mean_span_length", "label_smoothing"]),
    ],
)
def test_every_bad_value_is_named(density: float, mean: float, smoothing: float, fields: list[str]) -> None:
    assert [name for name, _ in objective(density, mean, label_smoothing=smoothing).problems()] == fields
