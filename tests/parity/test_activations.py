"""The words for activation functions against the functions of ``transformers``: values and derivatives."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from llmkit.models.config import GATED, Activation
from llmkit.models.hf.activations import GATE_NAMES, GATES, PLAIN, PLAIN_NAMES
from llmkit.models.layers import ACTIVATIONS

activations = pytest.importorskip("transformers.activations", reason="needs the extra hf")


def traced(function: object) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-12.0, 12.0, 4001, requires_grad=True)
    y: Tensor = function(x)  # type: ignore[operator]
    y.sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("word", PLAIN)
def test_a_word_means_the_same_function(word: str) -> None:
    for ours in (PLAIN[word], GATES[word]):
        for a, b in zip(traced(ACTIVATIONS[ours]), traced(activations.ACT2FN[word]), strict=True):
            assert float((a - b).abs().max()) <= 5e-6


def test_every_activation_has_a_word_that_is_read_as_it() -> None:
    assert {*PLAIN_NAMES, *GATE_NAMES} == {*GATED, *GATED.values()} == set(get_args(Activation)) == set(ACTIVATIONS)
    assert all(PLAIN[word] == ours for ours, word in PLAIN_NAMES.items())
    assert all(GATES[word] == ours for ours, word in GATE_NAMES.items())
