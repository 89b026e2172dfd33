"""A grown vocabulary: in every kind of model the old ids keep their numbers and the new ones start at the mean."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmkit.errors import ConfigError
from llmkit.models.hf import load_model, save_model
from llmkit.models.resize import resize_embeddings
from tests.unit.models.lstm_reference import lstm, seq2seq
from tests.unit.models.test_encoder_config import bert, modern
from tests.unit.models.tiny import gpt2, llama
from tests.unit.models.tiny_seq2seq import bart, t5

NEW = 7
MODELS = {
    "tied decoder": llama(),
    "untied decoder": llama(tie_embeddings=False),
    "gpt2": gpt2(),
    "encoder": bert(),
    "untied encoder": modern(tie_embeddings=False),
    "narrow encoder": bert(d_embedding=16),
    "encoder-decoder": bart(),
    "untied encoder-decoder": t5(tie_embeddings=False),
    "lstm": lstm(),
    "untied lstm": lstm(tie_embeddings=False),
    "lstm encoder-decoder": seq2seq(),
}


def built(config: Any, seed: int = 0) -> Any:
    model = config.build()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def tables(model: Any) -> dict[str, Tensor]:
    """Everything with one row an id: found by its shape, not by its name."""
    rows = model.config.vocab_rows
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.shape[0] == rows}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_old_rows_stay_and_new_ones_are_the_mean(config: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    config = config if config.vocab_rows not in (config.d_model, 4 * config.d_model) else config.with_vocab(61)
    model, rows = built(config), config.vocab_rows
    before, others = tables(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    with caplog.at_level(logging.INFO, "llmkit.models"):
        resize_embeddings(model, rows + NEW)
    assert f"{NEW} of {rows + NEW} rows are new" in caplog.text
    after = tables(model)
    assert before.keys() == after.keys()
    for name, table in after.items():
        assert table.shape == (rows + NEW, *before[name].shape[1:])
        assert torch.equal(table[:rows], before[name])
        assert torch.allclose(table[rows:], before[name].mean(0).expand_as(table[rows:]), atol=1e-6)
    assert all(torch.equal(p, others[name]) for name, p in model.named_parameters() if name not in after)
    assert model.config.n_params() == sum(p.numel() for p in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("config", [llama(), llama(tie_embeddings=False), gpt2()], ids=["tied", "untied", "gpt2"])
def test_the_logits_of_old_ids_do_not_change(config: Any) -> None:
    model = built(config).eval()
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids)
        resize_embeddings(model, 80)
        after = model(ids)
        fresh = model(torch.full((1, 3), 79))
    assert torch.allclose(after[..., :61], before, atol=1e-5, rtol=1e-5)
    assert torch.allclose(after[..., 61:], before.mean(-1, keepdim=True).expand(2, 9, 19), atol=1e-4)
    assert fresh.shape == (1, 3, 80)
    assert bool(fresh.isfinite().all())


def test_rows_that_no_text_used_are_as_new() -> None:
    """A vocabulary of 50 ids in 61 rows: the mean is that of the 50."""
    model = built(llama(tie_embeddings=False))
    old = model.head.weight.detach().clone()
    resize_embeddings(model, 64, known=50)
    assert torch.equal(model.head.weight[:50], old[:50])
    assert torch.allclose(model.head.weight[50:], old[:50].mean(0).expand(14, 24), atol=1e-6)
    resize_embeddings(model, 64, known=60)  # no more rows, but some of them in use now
    assert torch.equal(model.head.weight[60], model.head.weight[63])
    assert torch.allclose(model.head.weight[63], model.head.weight[:60].mean(0), atol=1e-6)


def test_a_half_precision_table_has_an_exact_mean() -> None:
    """A sum of many values in bfloat16 would be lost."""
    model = built(llama(vocab_size=5000)).bfloat16()
    with torch.no_grad():
        model.embedding.weight.fill_(1.0)
    resize_embeddings(model, 5001)
    assert model.embedding.weight.dtype == torch.bfloat16
    assert bool((model.embedding.weight[5000] == 1).all())


def test_a_frozen_table_stays_frozen() -> None:
    model = built(llama())
    model.embedding.weight.requires_grad_(False)
    resize_embeddings(model, 70)
    assert not model.embedding.weight.requires_grad


def test_the_same_size_changes_nothing() -> None:
    model = built(llama())
    weight = model.embedding.weight
    resize_embeddings(model, 61)
    assert model.embedding.weight is weight


@pytest.mark.parametrize(("n", "known"), [(60, None), (0, None), (70, 0), (70, 62), (70, -1)])
def test_no_id_is_taken_away(n: int, known: int | None) -> None:
    with pytest.raises(ConfigError, match="embedding rows") as caught:
        resize_embeddings(built(llama()), n, known=known)
    assert caught.value.where == "model.vocab_size"
