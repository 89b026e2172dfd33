"""Can pairs of segments be told right from wrong without reading? What a bag of words makes of them.

A logistic regression sees which tokens occur in the first segment and which in the second, but neither their order nor
which go together. Where pairs are made well it can hardly beat a coin when right and wrong ones differ only in whether
the segments fit; a figure well above 0.5 says how much of a model's accuracy needs no reading. Segments in the wrong
order are another matter: some words open a passage ("First", "Introduction") and some take one up ("However", "it").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llmkit.interfaces import IGNORE_INDEX

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmkit.interfaces import SequenceDataset

    Numbers = NDArray[np.float64]

TRAIN_PAIRS, VAL_PAIRS = 10_000, 5_000
_SEED = 0x6175646974
_PENALTIES = (1e-3, 1e-2, 1e-1)
_ITERATIONS = 30


class LabelledPair(NamedTuple):
    """The ids of both segments, and which of the two answers is right."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    label: int


def audit_pairs(
    train: SequenceDataset, val: SequenceDataset, n_train: int = TRAIN_PAIRS, n_val: int = VAL_PAIRS
) -> dict[str, float]:
    """Accuracy on pairs of ``val`` of a bag of words trained on pairs of ``train``, and how many pairs that were.

    Where ``val`` has fewer pairs than asked for, its epochs are gone through again, with other splits and labels.
    """
    accuracy = bag_of_words_accuracy(list(pairs_of(train, n_train, 0)), list(pairs_of(val, n_val, 1)))
    return {"val/bag_of_words_accuracy": accuracy, "val/bag_of_words_n_pairs": n_val}


def pairs_of(dataset: SequenceDataset, n_pairs: int, stream: int) -> Iterator[LabelledPair]:
    """``n_pairs`` labelled pairs from rows spread over the data set, epoch after epoch. Raises ValueError when an epoch
    has none."""
    left, epoch = n_pairs, 0
    while left > 0:
        at_start = left
        for index in np.random.default_rng((_SEED, stream, epoch)).permutation(dataset.n_sequences):
            row = dataset.row(int(index), (_SEED, stream, epoch, int(index)), None)
            for start, second, stop, label in row.pairs:
                if label != IGNORE_INDEX and left > 0:
                    yield LabelledPair(row.ids[start:second], row.ids[second:stop], label)
                    left -= 1
            if left <= 0:
                return
        if left == at_start:
            raise ValueError("the data set has no labelled pair")
        epoch += 1


def bag_of_words_accuracy(train: Sequence[LabelledPair], val: Sequence[LabelledPair]) -> float:
    """Share of ``val`` that a logistic regression on ``train`` gets right.

    Features are two bags, one a segment: 1 for a token that occurs. Of a few L2 penalties the one is taken that does
    best on a fifth of ``train`` left out of the fit. Deterministic; seconds for ten thousand pairs.
    """
    n_columns = 1 + max(int(max(pair.first.max(), pair.second.max())) for pair in (*train, *val))
    fifth = len(train) // 5
    fitting, choosing = _Bags(train[fifth:], n_columns), _Bags(train[:fifth], n_columns)
    penalty = max(_PENALTIES, key=lambda penalty: choosing.accuracy(_fit(fitting, penalty)))
    return _Bags(val, n_columns).accuracy(_fit(_Bags(train, n_columns), penalty))


class _Bags:
    """Bags of many pairs, one after another; column ``id`` is for the first segment, ``n_columns + id`` the second."""

    def __init__(self, pairs: Sequence[LabelledPair], n_columns: int) -> None:
        bags = [np.union1d(first, second + n_columns) for first, second, _ in pairs]
        self.columns, self.n_columns = np.concatenate(bags), n_columns
        self.sizes = np.array([bag.size for bag in bags])
        self.signs = np.array([2.0 * label - 1 for _, _, label in pairs])

    def margins(self, weights: Numbers) -> Numbers:
        """Logits, positive where they are on the side of the label; the last weight is the bias."""
        logits = np.add.reduceat(weights[self.columns], np.cumsum(self.sizes) - self.sizes) + weights[-1]
        margins: Numbers = logits * self.signs
        return margins

    def accuracy(self, weights: Numbers) -> float:
        return float((self.margins(weights) > 0).mean())

    def loss_and_gradient(self, weights: Numbers, penalty: float) -> tuple[float, Numbers]:
        """Mean log loss plus ``penalty / 2`` times the squared weights (the bias goes free)."""
        margins, slopes = self.margins(weights), np.append(penalty * weights[:-1], 0.0)
        errors = -self.signs * np.exp(-np.logaddexp(0, margins)) / margins.size
        gradient = slopes + np.bincount(self.columns, np.repeat(errors, self.sizes), weights.size).astype(np.float64)
        gradient[-1] += errors.sum()
        return float(np.logaddexp(0, -margins).mean() + weights[:-1] @ slopes[:-1] / 2), gradient


def _fit(bags: _Bags, penalty: float) -> Numbers:
    """The weights of the smallest ``loss_and_gradient``, by L-BFGS."""
    import torch

    weights = torch.zeros(2 * bags.n_columns + 1, dtype=torch.float64)
    optimizer = torch.optim.LBFGS([weights], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> float:
        loss, gradient = bags.loss_and_gradient(weights.numpy(), penalty)
        weights.grad = torch.from_numpy(gradient)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    fitted: Numbers = weights.numpy()
    return fitted
