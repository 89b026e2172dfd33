"""Masked language modelling: shares over a million tokens, reproducible masks, and the loss of the hidden tokens."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llmkit.errors import ConfigError
from llmkit.interfaces import IGNORE_INDEX, NO_DOCUMENT, Batch, Row, TokenIds, Tokenizer
from llmkit.objectives.masked_lm import MaskedLM
from tests.unit.tokenizers.strings import documents, spec, trained_byte_level, trained_wordpiece

PAD, UNK, CLS, SEP, MASK, V = 0, 1, 2, 3, 4, 400
I = IGNORE_INDEX
FIELDS: dict[str, Any] = {
    "mask_rate": 0.15,
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


def objective(**changes: Any) -> MaskedLM:
    return MaskedLM(**{**FIELDS, **changes})


def token_ids(mask_id: int | None = MASK) -> TokenIds:
    """Five special ids; of the others two in three begin a word. The last ids are special too."""
    v = np.arange(V)
    special = (v <= MASK) | (v >= V - 3)
    return TokenIds(V, CLS, SEP, PAD, mask_id, (), None, special, (v % 3 != 0) & ~special)


IDS = token_ids()


def stream(n_ids: int, document_len: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Documents ``[CLS] ids [SEP]`` of about ``document_len`` ids, one after another."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(MASK + 1, V - 3, n_ids)
    ends = np.cumsum(rng.integers(1, 2 * document_len, n_ids // document_len + 1) + 2)
    ends = ends[ends < n_ids - 1]
    ids[0], ids[ends], ids[ends + 1] = CLS, SEP, CLS
    return ids


def windows(ids: np.ndarray[Any, np.dtype[np.int64]], seq_len: int, seed: int = 0) -> list[Row]:
    return [Row(ids[i : i + seq_len], (seed, 0, i), i // seq_len) for i in range(0, len(ids), seq_len)]


def collate(rows: list[Row], seq_len: int, ids: TokenIds = IDS, **changes: Any) -> Batch:
    return objective(**changes).collate(rows, seq_len=seq_len, ids=ids)


def chi_square_is_small(counts: np.ndarray[Any, Any]) -> bool:
    """Against equal chances, at 4 standard deviations."""
    expected = counts.sum() / len(counts)
    free = len(counts) - 1
    return bool(abs(((counts - expected) ** 2 / expected).sum() - free) < 4 * (2 * free) ** 0.5)


UNITS: list[dict[str, Any]] = [
    {},
    {"whole_word": True},
    {"span_mean": 3.8},
    {"whole_word": True, "span_mean": 3.8},
]
NAMES = ["tokens", "words", "spans", "spans_of_words"]


TEXTS = [(300, 256), (8, 256), (8, 24)]  # ids of a document, ids of a row
CASES = [(unit, *text) for text in TEXTS for unit in UNITS if text != (8, 24) or "span_mean" not in unit]


@pytest.mark.parametrize(("changes", "document_len", "seq_len"), CASES)
def test_shares_over_a_million_tokens(changes: dict[str, Any], document_len: int, seq_len: int) -> None:
    """15 % of the ordinary tokens, of these 80/10/10, no special token, and random words of even frequency.

    The tokens of a span share one draw, so that as sure a figure takes four times as many tokens.
    """
    n_ordinary = 4_000_000 if "span_mean" in changes else 1_000_000
    original = stream(n_ordinary * (document_len + 2) // document_len + 60_000, document_len)
    rows = windows(original, seq_len)
    inputs, labels = [], []
    for first in range(0, len(rows), 512):
        batch = collate(rows[first : first + 512], seq_len, **changes)
        inputs.append(batch.input_ids.numpy().ravel())
        labels.append(batch.labels.numpy().ravel())
    seen, label = np.concatenate(inputs)[: len(original)], np.concatenate(labels)[: len(original)]
    chosen = label != I
    ordinary = ~IDS.special[original]
    assert ordinary.sum() >= n_ordinary
    assert chosen[ordinary].mean() == pytest.approx(0.15, abs=0.001)
    assert not chosen[~ordinary].any()
    assert (label[chosen] == original[chosen]).all()
    assert (seen[~chosen] == original[~chosen]).all()
    masked, kept = seen[chosen] == MASK, seen[chosen] == original[chosen]
    swapped = ~masked & ~kept
    within = 0.005
    by_chance = 0.1 / (V - 8)  # a random token may be the one that stood there
    assert masked.mean() == pytest.approx(0.8, abs=within)
    assert kept.mean() == pytest.approx(0.1 + by_chance, abs=within)
    assert swapped.mean() == pytest.approx(0.1 - by_chance, abs=within)
    drawn = seen[chosen][swapped]
    assert not IDS.special[drawn].any()
    assert chi_square_is_small(np.bincount(drawn, minlength=V)[~IDS.special])


@pytest.mark.parametrize("whole_word", [False, True])
def test_spans_share_one_fate_and_other_tokens_have_their_own(whole_word: bool) -> None:
    """Masked, random and kept tokens side by side: never in a span of one, often in words and single tokens."""
    rows = windows(stream(40_000, 300), 256)

    def mixed(**changes: Any) -> float:
        """Of neighbouring hidden tokens inside one word, the share of which just one is masked."""
        batch = collate(rows, 256, mask_rate=0.5, random_share=0.2, whole_word=whole_word, **changes)
        label, masked = batch.labels.numpy(), batch.input_ids.numpy() == MASK
        inside = (label[:, 1:] != I) & (label[:, :-1] != I) & ~IDS.word_starts[np.maximum(label[:, 1:], 0)]
        return float((masked[:, 1:] != masked[:, :-1])[inside].mean())

    assert mixed() == pytest.approx(2 * 0.8 * 0.2, abs=0.03)
    if whole_word:
        assert mixed(span_mean=2.0) == 0.0


def sentencepiece() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return spec("bpe", extra_symbols=["<mask>"]).train(documents(), Path(folder))


@pytest.mark.parametrize("tokenizer_of", [sentencepiece, trained_wordpiece, trained_byte_level])
def test_words_of_real_tokenizers_are_never_split(tokenizer_of: Callable[[], Tokenizer]) -> None:
    """Words are told by the spaces in the text so far, which is one decoding a token, not by the tokens' spelling."""
    pytest.importorskip("tokenizers")
    tokenizer = tokenizer_of()
    ids = tokenizer.token_ids()
    words = re.findall("[a-z]+", " ".join(documents()[:40]).lower())[3000:3300]
    text = np.array(tokenizer.encode(" ".join(words)))
    word_of = np.array([tokenizer.decode(text[: t + 1].tolist()).lstrip().count(" ") for t in range(len(text))])
    assert word_of[-1] == len(words) - 1
    assert len(text) > 1.3 * len(words)
    for span_mean in (None, 2.0):
        rows = [Row(text, (seed,)) for seed in range(40)]
        labels = collate(rows, len(text), ids, mask_rate=0.3, whole_word=True, span_mean=span_mean).labels.numpy()
        sizes = np.bincount(word_of)
        for chosen in labels != I:
            hidden = np.bincount(word_of[chosen], minlength=len(words))
            assert ((hidden == 0) | (hidden == sizes)).all()
        assert ((labels != I).sum(0) > 0).all()


def test_a_batch_by_hand() -> None:
    """Everything hidden: positions and documents are those of the text that the mask covers."""
    rows = [Row(np.array([CLS, 5, 6, SEP, CLS, 7]), (0,)), Row(np.array([8, SEP]), (1,))]
    batch = collate(rows, 6, mask_rate=1.0, mask_share=1.0, random_share=0.0)
    assert batch.input_ids.tolist() == [[CLS, MASK, MASK, SEP, CLS, MASK], [MASK, SEP, PAD, PAD, PAD, PAD]]
    assert batch.labels.tolist() == [[I, 5, 6, I, I, 7], [8, I, I, I, I, I]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 0, 0, 0, 0]]
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, *[NO_DOCUMENT] * 4]]
    assert batch.n_targets == 4
    assert collate([Row(np.array([5, 6, 7]), (0,))], 3).document_ids is None


@settings(derandomize=True, max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=2, max_size=6), st.permutations(range(6)), st.sampled_from(range(len(UNITS)))
)
def test_a_row_has_the_same_mask_in_every_batch(lengths: list[int], order: list[int], kind: int) -> None:
    rng = np.random.default_rng(sum(lengths))
    rows = [Row(rng.integers(0, V, n), (3, 0, i), 50 * i) for i, n in enumerate(lengths)]
    changes = {**UNITS[kind], "mask_rate": 0.4, "mask_rate_start": 0.9, "mask_rate_sequences": 200}
    alone = [collate([row], 32, **changes) for row in rows]
    shuffled = [i for i in order if i < len(rows)]
    together = collate([rows[i] for i in shuffled], 32, **changes)
    for b, i in enumerate(shuffled):
        assert torch.equal(together.input_ids[b], alone[i].input_ids[0])
        assert torch.equal(together.labels[b], alone[i].labels[0])


def test_masks_follow_the_seed_and_nothing_else() -> None:
    """A new epoch is a new seed; validation keeps its seed, so its masks; the position matters to the rate only."""
    ids = stream(256, 60)
    first, again, later = (
        collate([Row(ids, seed, at)], 256) for seed, at in (((0, 1), 5), ((0, 1), None), ((0, 2), 5))
    )
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.input_ids, again.input_ids)
    assert not torch.equal(first.labels, later.labels)


def test_the_rate_moves_in_a_straight_line_in_training_only() -> None:
    moving = objective(mask_rate=0.15, mask_rate_start=0.35, mask_rate_sequences=1000)
    assert [moving.rate(at) for at in (0, 500, 1000, 9999, None)] == pytest.approx([0.35, 0.25, 0.15, 0.15, 0.15])
    ids, changes = stream(2002, 5000)[1:2001], {"mask_rate_start": 0.35, "mask_rate_sequences": 1000}
    assert [collate([Row(ids, (0,), at)], 2000, **changes).n_targets for at in (0, 500, None)] == [700, 500, 300]


@pytest.mark.parametrize("changes", UNITS, ids=NAMES)
def test_nothing_to_hide(changes: dict[str, Any]) -> None:
    """Special tokens only and an empty row: no target, a loss of zero with gradients of zero."""
    rows = [Row(np.array([CLS, SEP, CLS]), (0,)), Row(np.array([], dtype=np.int64), (1,))]
    batch = collate(rows, 4, mask_rate=1.0, **changes)
    assert batch.n_targets == 0
    assert batch.input_ids.tolist() == [[CLS, SEP, CLS, PAD], [PAD] * 4]
    model = TinyEncoder()
    result = objective().loss(model, batch)
    result.losses["token"].backward()
    assert float(result.losses["token"].detach()) == float(result.sums["nll"]) == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert objective().metrics({"nll": 0.0, "n_correct": 0.0}, {"token": 0, "pair": 0})["loss"] == 0.0


def test_a_vocabulary_without_a_mask_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        collate([Row(np.array([5]), (0,))], 2, token_ids(None))
    assert error.value.where == "tokenizer"
    assert "extra_symbols" in error.value.fix


class TinyEncoder(nn.Module):
    """A model as objectives see it, with a transform and an output bias; it counts the rows of the transform."""

    logit_softcap = None

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mixer, self.transform = nn.Embedding(V, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.bias = nn.Parameter(torch.empty(V))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        self.rows: list[int] = []

    @property
    def output_weight_VD(self) -> Tensor:
        return self.embedding.weight

    @property
    def output_bias_V(self) -> Tensor:
        return self.bias

    def hidden_states(self, batch: Batch) -> Tensor:
        x = self.embedding(batch.input_ids)
        return x + torch.tanh(self.mixer(x)).cumsum(1) / 10

    def output_states(self, hidden_PD: Tensor) -> Tensor:
        self.rows.append(len(hidden_PD))
        return F.gelu(self.transform(hidden_PD))

    def pair_logits(self, hidden_ND: Tensor) -> Tensor:
        raise AssertionError("no pairs here")


def loss_and_gradients(model: TinyEncoder, loss: Tensor) -> tuple[Tensor, list[Tensor]]:
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def assert_close(ours: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-6, atol=0)
    for own, other in zip(ours[1], expected[1], strict=True):
        assert float((own - other).abs().max()) <= 1e-6 * float(other.abs().max())


@pytest.mark.parametrize("mask_rate", [0.15, 0.8])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_are_those_of_all_positions_with_the_others_ignored(
    mask_rate: float, smoothing: float
) -> None:
    model, batch = TinyEncoder(), collate(windows(stream(512, 30), 64), 64, mask_rate=mask_rate)
    result = objective(label_smoothing=smoothing, chunk_size=17).loss(model, batch)
    if mask_rate < 0.5:
        assert model.rows == [batch.n_targets]
    logits = F.linear(model.output_states(model.hidden_states(batch)), model.output_weight_VD, model.bias).flatten(0, 1)
    labels = batch.labels.flatten()
    expected = F.cross_entropy(logits, labels, reduction="sum", ignore_index=I, label_smoothing=smoothing)
    assert_close(loss_and_gradients(model, result.losses["token"]), loss_and_gradients(model, expected))
    torch.testing.assert_close(result.sums["nll"], F.cross_entropy(logits, labels, reduction="sum").detach())
    assert int(result.sums["n_correct"]) == int((logits.argmax(1) == labels).sum())
    assert not any(value.requires_grad for value in result.sums.values())


def test_micro_batches_add_up() -> None:
    model, rows = TinyEncoder(), windows(stream(512, 30), 64)
    whole = collate(rows, 64)
    parts = [collate(rows[i : i + 3], 64) for i in range(0, 8, 3)]
    assert sum(part.n_targets for part in parts) == whole.n_targets
    losses = [objective().loss(model, part).losses["token"] for part in parts]
    once = objective().loss(model, whole).losses["token"]
    assert_close(loss_and_gradients(model, torch.stack(losses).sum()), loss_and_gradients(model, once))


def test_what_is_summed_and_reported() -> None:
    model, batch = TinyEncoder(), collate(windows(stream(128, 30), 64), 64)
    for changes, extra in (({}, ()), ({"z_loss": 1e-3}, ("z_loss",))):
        part = objective(**changes)
        sums = part.loss(model, batch).sums
        assert tuple(sums) == part.sum_names == ("nll", "n_correct", *extra)
        metrics = part.metrics({name: float(value) for name, value in sums.items()}, batch.counts)
        assert metrics["loss"] == pytest.approx(float(sums["nll"]) / batch.n_targets)
        assert metrics["accuracy"] == pytest.approx(float(sums["n_correct"]) / batch.n_targets)
        assert set(metrics) == {"loss", "accuracy", *extra}


def test_rows_are_windows_without_overlap() -> None:
    part = objective()
    assert (part.trains, part.reads, part.scores_all_text) == (("encoder",), "windows", False)
    assert (part.window(256), part.target_len(256)) == ((256, 0), 0)


def test_the_plan_counts_hidden_rows_only() -> None:
    assert objective().logit_rows(4096, 8192) == 615
    assert objective(mask_rate_start=0.5, mask_rate_sequences=9).logit_rows(4096, 8192) == 2048
    assert objective(chunk_size=100).logit_rows(4096, 8192) == 100
    assert objective().logit_rows(10**6, 131072) == 1024


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"mask_rate": 0.0}, "mask_rate"),
        ({"mask_rate": 1.5}, "mask_rate"),
        ({"mask_rate_start": 0.0, "mask_rate_sequences": 5}, "mask_rate_start"),
        ({"mask_rate_start": 0.5, "mask_rate_sequences": 0}, "mask_rate_sequences"),
        ({"mask_rate_start": 0.5}, "mask_rate_sequences"),
        ({"mask_rate_sequences": 5}, "mask_rate_sequences"),
        ({"mask_share": 1.1}, "mask_share"),
        ({"random_share": 0.3}, "random_share"),
        ({"random_share": -0.1}, "random_share"),
        ({"span_mean": 0.5}, "span_mean"),
        ({"span_mean": 6.0}, "span_mean"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"z_loss": -1.0}, "z_loss"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_every_bad_value_is_named(changes: dict[str, Any], field: str) -> None:
    assert [name for name, _ in objective(**changes).problems()] == [field]
    for good in ({}, *UNITS, {"mask_share": 0.7, "random_share": 0.3}, {"mask_rate": 1.0}):
        assert objective(**good).problems() == []
