"""The bag of words finds what can be told without reading, and nothing else."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from llmkit.config.choices import recipes_dir
from llmkit.data.pairs import SentencePairDataset
from llmkit.data.prepare import PreparedData, prepare
from llmkit.interfaces import IGNORE_INDEX, Pair, Row
from llmkit.metrics.shortcut_audit import LabelledPair, _Bags, _fit, audit_pairs, bag_of_words_accuracy, pairs_of
from llmkit.settings import DataConfig
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.report import tokenizer_report
from tests.unit.data.pair_corpus import corpus, many
from tests.unit.tokenizers.strings import wordpiece_spec

V = 500


def pairs(n: int, seed: int, kind: str, length: int = 20) -> list[LabelledPair]:
    """Random words; ``leak``: wrong pairs often have word 7 in the second segment; ``match``: right ones share a word
    that says nothing by itself; ``order``: word 3 stands first in right pairs."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        first, second = draw.integers(10, V, (2, length))
        label = int(draw.integers(2))
        if kind == "leak" and draw.random() < (0.8 if label else 0.2):
            second[0] = 7
        if kind == "match":
            first[0] = draw.integers(10)
            second[0] = first[0] if label == 0 else (first[0] + draw.integers(1, 10)) % 10
        if kind == "order":
            (second if label else first)[0] = 3
        made.append(LabelledPair(first, second, label))
    return made


def test_a_word_that_gives_it_away_is_found() -> None:
    """As well as can be: who sees the word is right in 80 % of the cases."""
    assert bag_of_words_accuracy(pairs(3000, 0, "leak"), pairs(3000, 1, "leak")) == pytest.approx(0.8, abs=0.02)
    assert bag_of_words_accuracy(pairs(500, 0, "order"), pairs(500, 1, "order")) > 0.99


@pytest.mark.parametrize("kind", ["nothing", "match"])
def test_what_takes_reading_is_not(kind: str) -> None:
    """Two bags of words cannot tell whether the segments go together."""
    assert bag_of_words_accuracy(pairs(3000, 2, kind), pairs(3000, 3, kind)) == pytest.approx(0.5, abs=0.03)


def test_it_always_says_the_same() -> None:
    train, val = pairs(400, 4, "leak"), pairs(400, 5, "leak")
    assert bag_of_words_accuracy(train, val) == bag_of_words_accuracy(train, val)


def test_the_gradient_is_that_of_the_loss() -> None:
    """Against torch's own gradient of the same loss on one-hot rows."""
    some = pairs(50, 6, "leak", length=5)
    bags = _Bags(some, V)
    rows = torch.zeros(50, 2 * V, dtype=torch.float64)
    for row, (first, second, _) in zip(rows, some, strict=True):
        row[first], row[second + V] = 1.0, 1.0
    weights = torch.from_numpy(np.random.default_rng(0).normal(size=2 * V + 1)).requires_grad_()
    labels = torch.tensor([float(pair.label) for pair in some], dtype=torch.float64)
    logits = rows @ weights[:-1] + weights[-1]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels) + 0.03 / 2 * weights[:-1].square().sum()
    loss.backward()
    value, gradient = bags.loss_and_gradient(weights.detach().numpy(), 0.03)
    assert value == pytest.approx(float(loss.detach()))
    assert weights.grad is not None
    np.testing.assert_allclose(gradient, weights.grad.numpy(), atol=1e-12)
    assert bags.accuracy(weights.detach().numpy()) == float(((logits > 0) == (labels > 0.5)).double().mean())


def test_the_fit_ends_where_the_gradient_does() -> None:
    bags = _Bags(pairs(500, 7, "leak"), V)
    _, gradient = bags.loss_and_gradient(_fit(bags, 0.01), 0.01)
    assert np.abs(gradient).max() < 1e-4


@dataclass
class Rows:
    """Two labelled pairs and one without a label in every row; the label is the parity of the epoch and the pair."""

    n_sequences: int
    n_tokens: int = 0
    n_bytes: int = 0
    labelled: bool = True

    def row(self, index: int, seed: tuple[int, ...], position: int | None) -> Row:
        labels = [(seed[2] + number) % 2 if self.labelled else IGNORE_INDEX for number in range(2)]
        spans = [Pair(0, 2, 4, labels[0]), Pair(4, 8, 8, IGNORE_INDEX), Pair(8, 10, 12, labels[1])]
        return Row(np.arange(12) + 100 * index, seed, position, tuple(spans))


def test_labelled_pairs_are_taken_from_all_over() -> None:
    found = list(pairs_of(Rows(10), 20, 0))
    assert sorted(int(first[0]) for first, _, _ in found) == sorted(
        n for i in range(10) for n in (100 * i, 100 * i + 8)
    )
    assert all(second.tolist() == [first[0] + 2, first[0] + 3] for first, second, _ in found)
    few = [int(first[0]) for first, _, _ in pairs_of(Rows(10), 5, 0)]
    assert len(few) == 5
    assert few != sorted(few)
    assert few != [int(first[0]) for first, _, _ in pairs_of(Rows(10), 5, 1)]


def test_a_small_set_is_gone_through_again() -> None:
    found = list(pairs_of(Rows(2), 11, 0))
    assert len(found) == 11
    assert {label for first, _, label in found if first[0] == 0} == {0, 1}
    with pytest.raises(ValueError, match="no labelled pair"):
        next(pairs_of(Rows(2, labelled=False), 1, 0))


def test_the_audit_of_data_sets(tmp_path: Path) -> None:
    """Pairs as they are made pass; so does the time it takes."""
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    train = SentencePairDataset(corpus(tmp_path / "train", [many(400, 1)]).shards, 64, order=False)
    val = SentencePairDataset(corpus(tmp_path / "val", [many(200, 2)]).shards, 64, order=False)
    began = time.process_time()
    found = audit_pairs(train, val, 4000, 2000)
    assert found.keys() == {"val/bag_of_words_accuracy", "val/bag_of_words_n_pairs"}
    assert found["val/bag_of_words_accuracy"] == pytest.approx(0.5, abs=0.035)
    assert found["val/bag_of_words_n_pairs"] == 2000
    assert time.process_time() - began < 20


def prepared(cache: Path, **changes: Any) -> PreparedData:
    settings = yaml.safe_load((recipes_dir() / "data" / "python_docs.yaml").read_text())
    data = DataConfig(**{**settings, "cache_dir": str(cache), "n_workers": 1, **changes})
    spec = wordpiece_spec(vocab_size=4096, max_train_bytes=1 << 21)
    return prepare(
        data, spec, tokenizer=None, load=load_tokenizer, report=tokenizer_report, progress=False, sentences=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("corpus_name", ["python_docs", "sotu"])
def test_real_text_holds_no_shortcut(corpus_name: str, tmp_path: Path, data_dir: Path) -> None:
    """Within three points of a coin for the next sentence, on rows that hold 98 % text and special tokens.

    The order of segments can be told where they open a document: docstrings do not begin like they go on.
    """
    folder = data_dir / "lm"
    changes = {"path": str(folder / "sotu.train.jsonl"), "val_path": str(folder / "sotu.valid.jsonl")}
    text = prepared(tmp_path, **(changes if corpus_name == "sotu" else {}))
    assert text.val is not None
    for seq_len, order in ((128, False), (256, False), (128, True)):
        train, val = (SentencePairDataset(shards, seq_len, order=order) for shards in (text.train[0], text.val))
        fill = train.n_tokens / (train.n_sequences * seq_len)
        accuracy = audit_pairs(train, val)["val/bag_of_words_accuracy"]
        print(f"{corpus_name} {seq_len} {'order' if order else 'next'}: {accuracy:.3f}, rows {fill:.4f} full")
        assert fill > 0.98
        expected = 0.7 if order and corpus_name == "python_docs" else 0.5
        assert accuracy == pytest.approx(expected, abs=0.05 if order else 0.03)
