"""Stretched rotary positions: frequencies against ``transformers``, lengths by document, and the attention factor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llmkit.interfaces import NO_DOCUMENT
from llmkit.models.layers import rotation
from llmkit.models.rope import attention_factor, document_lengths, scaled_rotation

LINEAR = {"type": "linear", "factor": 3.0}
DYNAMIC = {"type": "dynamic", "factor": 4.0, "original_len": 16}
LLAMA3 = {"type": "llama3", "factor": 8.0, "original_len": 256, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0, "original_len": 32}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": LINEAR,
    "dynamic": DYNAMIC,
    "llama3": LLAMA3,
    "llama3_odd": {**LLAMA3, "factor": 2.5, "low_freq_factor": 1.3, "high_freq_factor": 2.7},
    "yarn": YARN,
    "yarn_untruncated": {**YARN, "truncate": False},
    "yarn_betas": {**YARN, "original_len": 300, "beta_fast": 16, "beta_slow": 2},
    "yarn_factor": {**YARN, "attention_factor": 1.7},
    "yarn_mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
    "yarn_half": {**YARN, "mscale": 0.7},
}


def theirs(scaling: dict[str, Any], width: int, theta: float, length: int) -> tuple[Tensor, float]:
    """Frequencies and factor of ``transformers``."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    keys = {**scaling, "rope_type": scaling["type"], "rope_theta": theta}
    original = keys.pop("original_len", 64)
    del keys["type"]
    dynamic = scaling["type"] == "dynamic"  # there the trained length is that of the model
    config = transformers.LlamaConfig(
        hidden_size=2 * width,
        num_attention_heads=2,
        max_position_embeddings=original if dynamic else 512,
        rope_parameters=keys if dynamic else {**keys, "original_max_position_embeddings": original},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling["type"]](config, seq_len=torch.tensor(length))
    return frequencies, factor


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize(("width", "theta"), [(6, 10000.0), (64, 500000.0), (24, 333.0)])
@pytest.mark.filterwarnings("ignore")
def test_angles_equal_those_of_transformers(scaling: dict[str, Any], width: int, theta: float) -> None:
    for length in (3, 16, 17, 300):
        frequencies, factor = theirs(scaling, width, theta, length)
        angles = torch.arange(length)[:, None].float() * frequencies
        cos, sin = scaled_rotation(torch.arange(length)[None], None, width, theta, scaling)
        exact = {"atol": 4e-7 * length, "rtol": 0} if scaling["type"] == "dynamic" else {"atol": 0, "rtol": 0}
        torch.testing.assert_close(cos[0, :, 0], angles.cos() * factor, **exact)  # dynamic: a power rounds differently
        torch.testing.assert_close(sin[0, :, 0], angles.sin() * factor, **exact)


def test_each_type_stretches_what_it_says() -> None:
    """Without ``transformers``: the shortest wave keeps its angle (not in linear), the longest is divided."""
    positions = torch.arange(64)[None]
    plain = torch.atan2(*reversed(rotation(positions, 64, 10000.0)))[0, 1, 0]
    for scaling in (LINEAR, LLAMA3, {**YARN, "attention_factor": 1.0}):
        turned = torch.atan2(*reversed(scaled_rotation(positions, None, 64, 10000.0, scaling)))[0, 1, 0]
        first = scaling["factor"] if scaling["type"] == "linear" else 1.0
        assert float(plain[0] / turned[0]) == pytest.approx(first, rel=1e-4)
        assert float(plain[-1] / turned[-1]) == pytest.approx(scaling["factor"], rel=1e-3)
        assert bool((turned <= plain + 1e-7).all())


def test_dynamic_stretches_only_documents_beyond_the_trained_length() -> None:
    lengths, documents = [20, 16, 30], torch.arange(3).repeat_interleave(torch.tensor([20, 16, 30]))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = scaled_rotation(positions, documents, 8, 10000.0, DYNAMIC)
    for i, n in enumerate(lengths):
        alone = scaled_rotation(torch.arange(n)[None], None, 8, 10000.0, DYNAMIC)
        assert all(torch.equal(x[:, documents[0] == i], y) for x, y in zip(packed, alone, strict=True))
    plain = rotation(positions, 8, 10000.0)
    assert torch.equal(packed[0][:, 20:36], plain[0][:, 20:36])
    assert not torch.allclose(packed[0][:, :20], plain[0][:, :20])


def test_lengths_are_those_of_documents_and_padding_has_one() -> None:
    documents = torch.tensor([[NO_DOCUMENT, NO_DOCUMENT, 0, 0, 0], [0, 0, 0, 1, 1], [1, 0, 0, 0, 0]])
    positions = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 0, 1], [7, 4, 5, 6, 7]])
    assert document_lengths(positions, documents).tolist() == [[1, 1, 3, 3, 3], [3, 3, 3, 2, 2], [8, 8, 8, 8, 8]]
    assert document_lengths(positions[:2], None).tolist() == [[3] * 5, [3] * 5]
    assert document_lengths(positions[1:2], documents[1:]).tolist() == [[3, 3, 3, 2, 2], [1, 2, 2, 2, 2]]


def test_the_attention_factor_is_the_papers() -> None:
    """Peng et al. 2023, equation 22: sqrt(1 / t) = 0.1 ln(s) + 1."""
    assert attention_factor(YARN) == pytest.approx(0.1 * math.log(4) + 1)
    assert attention_factor({**YARN, "factor": 1.0}) == 1.0
    assert attention_factor({**YARN, "attention_factor": 2}) == 2.0
    ratio = (0.07 * math.log(4) + 1) / (0.04 * math.log(4) + 1)
    assert attention_factor({**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}) == pytest.approx(ratio)
