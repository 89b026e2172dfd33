"""Rows of sentence pairs: nothing is lost, half of the pairs are wrong, and nothing but reading tells which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.datasets import dataset_for, needs_sentences
from llmkit.data.loader import TrainBatches, eval_batches
from llmkit.data.pair_layout import MIN_SEQ_LEN, lay_out
from llmkit.data.pairs import SentencePairDataset
from llmkit.data.sampler import SampleOrder
from llmkit.data.sentence_files import Sentences
from llmkit.data.token_shards import ShardWriter, TokenShards, Vocabulary, WindowDataset
from llmkit.errors import ConfigError, DataError
from llmkit.interfaces import IGNORE_INDEX, Pair, Row
from llmkit.objectives.causal_lm import CausalLM
from tests.unit.data.pair_corpus import BOS, EOS, Corpus, Document, corpus, many


def epoch_of(dataset: SentencePairDataset, seed: int = 0, epoch: int = 0) -> list[Row]:
    return [dataset.row(index, (seed, epoch, 0, index), index) for index in range(dataset.n_sequences)]


def segments(rows: list[Row]) -> Iterator[tuple[list[int], list[int], int]]:
    """First and second segment of every pair without their special tokens, and its label; checks the special tokens."""
    for row in rows:
        assert [pair.start for pair in row.pairs] == [0, *(pair.stop for pair in row.pairs[:-1])]
        assert row.pairs[-1].stop == len(row.ids)
        for start, second, stop, label in row.pairs:
            first, then = row.ids[start:second].tolist(), row.ids[second:stop].tolist()
            if first[0] == BOS:
                first = first[1:]
            assert first.pop() == EOS
            if then:
                assert then.pop() == EOS
                assert then
            else:
                assert label == IGNORE_INDEX
            assert first
            assert not {BOS, EOS} & {*first, *then}
            yield first, then, label


DOCUMENTS = st.lists(st.integers(1, 40), max_size=12)
CORPORA = st.lists(st.lists(DOCUMENTS, min_size=1, max_size=8), min_size=1, max_size=3)


def open_or_none(made: Corpus, seq_len: int, *, order: bool) -> SentencePairDataset | None:
    try:
        return SentencePairDataset(made.shards, seq_len, order=order)
    except DataError:
        return None


@settings(max_examples=80, derandomize=True, deadline=None)
@given(CORPORA, st.integers(MIN_SEQ_LEN, 70), st.booleans(), st.booleans(), st.integers(0, 99))
def test_every_token_comes_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory, files: list, seq_len: int, order: bool, has_bos: bool, seed: int
) -> None:
    """As itself, or as what another text stands for, in rows that are the same in every epoch but for their ids."""
    made = corpus(tmp_path_factory.mktemp("shards"), files, has_bos=has_bos)
    dataset = open_or_none(made, seq_len, order=order)
    if dataset is None:
        return
    rows, others = epoch_of(dataset, seed, 0), epoch_of(dataset, seed, 1)
    assert all(len(row.ids) <= seq_len for row in rows)
    assert [[(p.start, p.stop) for p in row.pairs] for row in rows] == [
        [(p.start, p.stop) for p in row.pairs] for row in others
    ]
    assert dataset.n_tokens == sum(len(row.ids) for row in rows)
    assert dataset.n_bytes == len(made.text())
    seen: list[int] = []
    for first, second, label in segments(rows):
        if label == 1 and order:
            first, second = second, first
        elif label == 1:
            second = list(range(first[-1] + 1, first[-1] + 1 + len(second)))  # what was replaced
        whole = [*first, *second]
        assert whole == list(range(whole[0], whole[0] + len(whole)))
        assert len({made.document[i] for i in whole}) == 1
        assert not second or made.sentence[second[0]] == 0
        seen += whole
    assert seen == made.text()


@settings(max_examples=60, derandomize=True, deadline=None)
@given(CORPORA, st.integers(MIN_SEQ_LEN, 70), st.booleans(), st.integers(0, 99))
def test_half_of_the_pairs_of_every_epoch_are_wrong(
    tmp_path_factory: pytest.TempPathFactory, files: list, seq_len: int, order: bool, seed: int
) -> None:
    """Exactly; an odd number differs by one."""
    dataset = open_or_none(corpus(tmp_path_factory.mktemp("shards"), files), seq_len, order=order)
    if dataset is None:
        return
    for epoch in range(3):
        labels = Counter(pair.label for row in epoch_of(dataset, seed, epoch) for pair in row.pairs)
        assert labels[0] - labels[1] in (0, 1)
        assert labels[0] + labels[1] == dataset.n_pairs
        counts = dataset.counts()
        assert labels[IGNORE_INDEX] == counts["n_without_split"] + counts["n_without_match"]
        assert counts["n_rows"] == dataset.n_sequences


@pytest.mark.parametrize("has_bos", [True, False])
def test_wrong_text_is_of_another_document_and_otherwise_like_right_text(tmp_path: Path, has_bos: bool) -> None:
    made = corpus(tmp_path, [many(150, 1), many(50, 2)], has_bos=has_bos)
    dataset = SentencePairDataset(made.shards, 64, order=False)
    n_wrong = 0
    for epoch in range(8):
        for first, second, label in segments(epoch_of(dataset, epoch=epoch)):
            if label == 1:
                n_wrong += 1
                assert made.document[second[0]] != made.document[first[0]]
                assert len({made.document[i] for i in second}) == 1
                assert second == list(range(second[0], second[0] + len(second)))
                assert made.sentence[second[0]] == 0  # begins a sentence
                assert made.place[second[0]] > 0  # but no document
    assert n_wrong > 1000


def test_nothing_about_the_second_segment_tells_right_from_wrong(tmp_path: Path) -> None:
    """Its length, whether it ends a document or a sentence, where in its document it begins, and whether its document
    is a short one. Drawing any sentence with enough text behind it fails each of these by far more."""
    made = corpus(tmp_path, [many(400, 3)])
    dataset = SentencePairDataset(made.shards, 64, order=False)
    document_end = {made.document[i]: i for i in made.text()}
    traits: dict[int, list[tuple[float, ...]]] = {0: [], 1: []}
    for epoch in range(30):
        for _, second, label in segments(epoch_of(dataset, epoch=epoch)):
            if label != IGNORE_INDEX:
                ends_document = second[-1] == document_end[made.document[second[0]]]
                size = made.place[document_end[made.document[second[0]]]]
                traits[label].append((len(second), ends_document, second[-1] in made.last, made.place[second[0]], size))
    right, wrong = (np.array(traits[label], float) for label in (0, 1))
    error = np.sqrt((right.var(0) + wrong.var(0)) / len(right))
    assert len(right) > 8_000
    assert (np.abs(right.mean(0) - wrong.mean(0)) < 4 * error).all()


def test_sections_of_a_text_are_one_document(tmp_path: Path) -> None:
    """Documents 1 and 2 go on from 0, and 5 from 4, in another file."""
    documents = [[5] * 8] * 6
    made = corpus(tmp_path, [documents[:5], documents[5:]], goes_on=frozenset({1, 2, 5}))
    text = {0: 0, 1: 0, 2: 0, 3: 3, 4: 4, 5: 4}
    dataset = SentencePairDataset(made.shards, 32, order=False)
    met = set()
    for epoch in range(40):
        for first, second, label in segments(epoch_of(dataset, epoch=epoch)):
            if label == 1:
                met.add((text[made.document[first[0]]], text[made.document[second[0]]]))
    assert met == {(a, b) for a in (0, 3, 4) for b in (0, 3, 4) if a != b}


def test_documents_with_the_same_ids_are_one(tmp_path: Path) -> None:
    """A repeated document (and whatever is a section of a text with it) never serves as another."""
    words = Vocabulary(200, BOS, EOS)
    texts = [range(10, 50), range(60, 100), range(10, 50), range(110, 150), range(60, 99)]
    with ShardWriter(tmp_path / "0.bin", words, sentences=True) as writer:
        for number, ids in enumerate(texts):
            writer.add([list(ids)], 1, [Sentences(range(0, 40, 5)[: len(ids) // 5], number == 3)])
    dataset = SentencePairDataset(TokenShards([tmp_path / "0.bin"], words), 24, order=False)
    family = {i: 0 for i in (*range(10, 50), *range(110, 150))} | {i: 1 for i in range(60, 100)}
    wrong = [pair for epoch in range(30) for pair in segments(epoch_of(dataset, epoch=epoch)) if pair[2] == 1]
    assert len(wrong) > 100
    for first, second, _ in wrong:
        if first[0] < 60 or first[0] >= 100:
            assert family[second[0]] == 1
    assert any(60 <= first[0] < 100 and 60 <= second[0] < 100 for first, second, _ in wrong)  # one id less: another


def test_segments_in_the_wrong_order_are_whole_sentences(tmp_path: Path) -> None:
    """A segment cut at the end of a row would tell its place."""
    made = corpus(tmp_path, [many(150, 4)])
    for first, second, label in segments(epoch_of(SentencePairDataset(made.shards, 48, order=True))):
        if second:
            assert made.sentence[first[0]] == made.sentence[second[0]] == 0
            assert first[-1] in made.last
            assert second[-1] in made.last
            assert (first[0] > second[0]) == (label == 1)


def test_splits_are_new_in_every_epoch_and_spread_evenly(tmp_path: Path) -> None:
    made = corpus(tmp_path, [[[4] * 5] * 400])
    dataset = SentencePairDataset(made.shards, 24, order=True)
    firsts = Counter(
        min(first[0], second[0]) % 20 * 100 + len(first if label == 0 else second)
        for epoch in range(5)
        for first, second, label in segments(epoch_of(dataset, epoch=epoch))
        if label != IGNORE_INDEX
    )
    lengths = Counter(key % 100 for key in firsts.elements())
    assert set(lengths) == {4, 8, 12, 16}
    assert max(lengths.values()) < 1.3 * min(lengths.values())


def test_a_row_depends_on_its_seed_alone(tmp_path: Path) -> None:
    made = corpus(tmp_path, [many(60, 5)])
    one, two = (SentencePairDataset(made.shards, 48, order=False) for _ in range(2))

    def plain(rows: list[Row]) -> list[tuple[list[int], tuple[Pair, ...]]]:
        return [(row.ids.tolist(), row.pairs) for row in rows]

    there, back = epoch_of(one, 7, 2), [two.row(i, (7, 2, 0, i), None) for i in reversed(range(two.n_sequences))]
    assert plain(there) == plain(back[::-1])
    assert plain(there) != plain(epoch_of(one, 7, 3))
    assert plain(there) != plain(epoch_of(one, 8, 2))
    labels = [np.array([p.label for row in epoch_of(one, 7, n) for p in row.pairs]) for n in (2, 3)]
    assert 0.3 < (labels[0] == labels[1])[labels[0] != IGNORE_INDEX].mean() < 0.7
    assert [row.seed for row in there] == [(7, 2, 0, i) for i in range(one.n_sequences)]
    assert [row.position for row in there] == list(range(one.n_sequences))


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_together_see_what_one_sees(tmp_path: Path, world_size: int) -> None:
    """In training, and in validation, which is the same in every pass."""
    dataset = SentencePairDataset(corpus(tmp_path, [many(80, 6)]).shards, 48, order=False)
    order = SampleOrder((dataset.n_sequences,), None, seed=3)

    def step(micro: int, rank: int, world: int) -> list[tuple[int, ...]]:
        batches = TrainBatches([dataset], order, list, micro, 1, rank, world)  # type: ignore[arg-type]
        rows = [row for batch in batches.step(dataset.n_sequences - 4).batches for row in batch]  # into epoch 1
        batches.close()
        return [(*row.ids, *(pair.label for pair in row.pairs)) for row in rows]  # type: ignore[attr-defined]

    together = [row for rank in range(world_size) for row in step(4, rank, world_size)]
    assert together == step(4 * world_size, 0, 1)

    def evaluated(rank: int, world: int) -> list[tuple[int, ...]]:
        batches = eval_batches(dataset, list, 2, rank, world)  # type: ignore[arg-type]
        return [(*row.ids, *(p.label for p in row.pairs)) for batch in batches for row in batch]  # type: ignore[attr-defined]

    alone = evaluated(0, 1)
    assert alone == evaluated(0, 1)
    assert sorted(alone) == sorted(row for rank in range(world_size) for row in evaluated(rank, world_size))


@pytest.mark.parametrize("order", [False, True])
def test_rows_are_full(tmp_path: Path, order: bool) -> None:
    """Of documents of one to fifteen sentences: 98 %; the last row may be short."""
    made = corpus(tmp_path, [many(300, 7, longest=40)])
    for seq_len in (128, 256):
        dataset = SentencePairDataset(made.shards, seq_len, order=order)
        assert dataset.n_tokens > 0.98 * seq_len * (dataset.n_sequences - 1)
        assert dataset.n_tokens > len(made.text())


def test_cut_sentences_are_counted(tmp_path: Path) -> None:
    """Rows of 20 ids hold 17 of a pair and 18 of a single sentence: sentences of 10 are cut, unless they stay whole."""
    made = corpus(tmp_path, [[[10] * 4, [10] * 4]])
    cut = lay_out(made.shards, 20, whole_sentences=False)
    assert (cut.stop_C - cut.start_C).tolist() == [17, 17, 6, 10, 17, 13]
    assert (cut.n_cut, cut.n_rows, cut.n_ids) == (3, 5, 80 + 4 * 3 + 2 * 2)
    whole = lay_out(made.shards, 30, whole_sentences=True)
    assert (whole.stop_C - whole.start_C).tolist() == [20, 20, 20, 20]
    whole = lay_out(made.shards, 34, whole_sentences=True)
    assert (whole.stop_C - whole.start_C).tolist() == [30, 10, 10, 8, 2, 20]
    assert (whole.n_cut, whole.first_R.tolist()) == (1, [0, 1, 4, 6])


def test_what_no_pair_can_be_made_of(tmp_path: Path) -> None:
    cases: list[tuple[list[list[Document]], bool, str]] = [
        ([[[5] * 9]], False, "another document"),
        ([[[5], [6], [7]]], True, "no row holds two sentences"),
        ([[[5], [6], [7]]], False, "another document"),
        ([[[], []]], True, "no row holds two sentences"),
    ]
    for number, (files, order, message) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(DataError, match=message) as caught:
            SentencePairDataset(corpus(folder, files).shards, 32, order=order)
        assert str(folder) in str(caught.value)
    with pytest.raises(DataError, match="another document"):
        SentencePairDataset(TokenShards([], Vocabulary(10, BOS, EOS)), 32, order=False)
    with pytest.raises(ConfigError, match="too short for pairs") as refused:
        SentencePairDataset(corpus(tmp_path, [many(5)]).shards, MIN_SEQ_LEN - 1, order=False)
    assert refused.value.where == "data.seq_len"


def test_rows_have_a_number(tmp_path: Path) -> None:
    dataset = SentencePairDataset(corpus(tmp_path, [many(9)]).shards, 32, order=True)
    for index in (-1, dataset.n_sequences):
        with pytest.raises(IndexError):
            dataset.row(index, (0, index), None)


def test_an_objective_gets_the_rows_it_reads(tmp_path: Path) -> None:
    from tests.unit.objectives.test_sentence_pairs import objective

    shards = corpus(tmp_path, [many(40)]).shards
    for predict, order in (("next_sentence", False), ("sentence_order", True)):
        dataset = dataset_for(objective(predict=predict), shards, 48)  # type: ignore[arg-type]
        assert isinstance(dataset, SentencePairDataset)
        assert dataset.order == order
        assert needs_sentences(objective(predict=predict))  # type: ignore[arg-type]
    causal = CausalLM(label_smoothing=0.0, z_loss=0.0, chunk_size=None)
    assert isinstance(dataset_for(causal, shards, 48), WindowDataset)
    assert not needs_sentences(causal)
