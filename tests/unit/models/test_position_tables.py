"""Distance buckets and sinusoids against those of ``transformers``, and against their definitions."""

from __future__ import annotations

import pytest
import torch

from llmkit.models.position_tables import distance_buckets, sinusoids

CPU = torch.device("cpu")


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize("n_buckets", [4, 5, 7, 16, 31, 32, 128])
def test_buckets_equal_those_of_transformers(n_buckets: int, both_ways: bool) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    from transformers.models.t5.modeling_t5 import T5Attention

    for furthest in (n_buckets // 2 + 1, n_buckets, 100, 128, 1000):
        if furthest > n_buckets // 2:
            positions = torch.arange(2 * furthest + 3)[None]
            ours = distance_buckets(positions, positions, n_buckets=n_buckets, furthest=furthest, both_ways=both_ways)
            distance = positions[0][None, :] - positions[0][:, None]
            theirs = T5Attention._relative_position_bucket(distance, both_ways, n_buckets, furthest)
            assert torch.equal(ours[0], theirs), furthest


def test_buckets_follow_positions_not_columns() -> None:
    """Two documents in a row: the second counts from 0 again. 8 buckets: 4 a direction, 0 and 1 exact."""
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    buckets = distance_buckets(positions, positions, n_buckets=8, furthest=8, both_ways=True)[0]
    assert buckets[0].tolist() == [0, 5, 6, 0, 5]
    assert buckets[4].tolist() == [1, 0, 5, 1, 0]
    assert distance_buckets(positions, positions, n_buckets=8, furthest=8, both_ways=False)[0, 0].tolist() == [0] * 5


@pytest.mark.parametrize("width", [2, 7, 24])
def test_sinusoids_equal_those_of_transformers(width: int) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

    theirs = MarianSinusoidalPositionalEmbedding(50, width).create_weight()
    torch.testing.assert_close(sinusoids(50, width, CPU), theirs, atol=1e-6, rtol=0)


def test_tables_made_while_evaluating_serve_training() -> None:
    with torch.inference_mode():
        table = sinusoids(11, 6, CPU)
    assert not table.is_inference()
    (table * torch.ones(6, requires_grad=True)).sum().backward()
