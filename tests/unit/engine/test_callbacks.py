"""Samples after an evaluation are written, are the same for the same weights, and leave the training alone."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from llmkit.engine.callbacks import SampleText
from llmkit.interfaces import RunInfo
from llmkit.models.decoder import Decoder
from tests.unit.models.tiny import llama


class Letters:
    """One id a byte; 0 begins, 1 ends."""

    vocab_size, bos_id, eos_id, pad_id, fingerprint = 258, 0, 1, 1, "letters"

    def encode(self, text: str) -> list[int]:
        return [byte + 2 for byte in text.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - 2 for i in ids if i >= 2).decode("latin-1")

    def save(self, folder: Path) -> None:
        raise AssertionError("nothing is saved here")


def callback(prompts: list[str], tokenizer: Letters | None) -> SampleText:
    return SampleText(prompts, max_new_tokens=12, temperature=1.0, top_k=None, seed=0, tokenizer=tokenizer)


@pytest.fixture
def model() -> Decoder:
    config = llama(vocab_size=258, max_seq_len=64, d_model=16, n_layers=1, n_heads=2, dropout=0.5)
    decoder = config.build()
    decoder.init_weights(0)
    return decoder


def info(folder: Path) -> RunInfo:
    return RunInfo("mine", folder, "pretrain", {}, 10, {})


def test_samples_are_a_function_of_weights_and_prompts(model: Decoder, tmp_path: Path) -> None:
    sampler = callback(["abc", "xyz"], Letters())
    sampler.on_evaluation(5, model, info(tmp_path))
    torch.manual_seed(99)
    sampler.on_evaluation(10, model, info(tmp_path))
    first, second = ((tmp_path / "samples" / f"step_{step}.txt").read_text() for step in (5, 10))
    assert first == second
    parts = first.split("\n---\n")
    assert len(parts) == 2
    assert parts[0].startswith("abc")
    assert parts[1].startswith("xyz")
    assert len(parts[0]) > len("abc")


@pytest.mark.parametrize("training", [True, False])
def test_mode_random_states_and_gradients_are_as_before(model: Decoder, tmp_path: Path, training: bool) -> None:
    model.train(training)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())  # type: ignore[union-attr]
    callback(["abc"], Letters()).on_evaluation(5, model, info(tmp_path))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # type: ignore[arg-type]
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_control_characters_of_the_model_are_spelt_out(model: Decoder, tmp_path: Path) -> None:
    callback(["a\x1b[2J"], Letters()).on_evaluation(5, model, info(tmp_path))
    text = (tmp_path / "samples" / "step_5.txt").read_text()
    assert text.startswith("a\\x1b[2J")
    assert not any(ord(c) < 32 and c not in "\n\t" for c in text)


def test_a_failure_is_a_warning(model: Decoder, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("llmkit").propagate = True
    (tmp_path / "samples").write_text("in the way")
    with caplog.at_level(logging.WARNING, logger="llmkit"):
        callback(["abc"], Letters()).on_evaluation(5, model, info(tmp_path))
        callback(["abc"], None).on_evaluation(5, model, info(tmp_path))
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert all("no samples at step 5" in record.getMessage() for record in caplog.records)
