"""Attention against a closed form in float64, its mask against the rule, flex against SDPA."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llmkit.interfaces import NO_DOCUMENT
from llmkit.models.attention import attend, attention_mask, block_mask, use_flex
from llmkit.models.cache import dense_mask
from llmkit.models.layers import rotate, rotation


def reference(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, seen_BTS: Tensor) -> Tensor:
    """Softmax attention, one row at a time, in float64."""
    out = torch.zeros(q_BHTK.shape, dtype=torch.float64)
    B, H, T, K = q_BHTK.shape
    group = H // k_BGSK.shape[1]
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = seen_BTS[b, t].nonzero().squeeze(1)
                scores = k_BGSK[b, h // group, seen].double() @ q_BHTK[b, h, t].double() / math.sqrt(K)
                out[b, h, t] = scores.softmax(0) @ v_BGSK[b, h // group, seen].double()
    return out


def by_rule(documents: Tensor) -> Tensor:
    """BTS, spelt out: an earlier token, or itself, of the same document."""
    B, T = documents.shape
    return torch.tensor(
        [[[s <= t and documents[b, s] == documents[b, t] for s in range(T)] for t in range(T)] for b in range(B)]
    )


def qkv(B: int, H: int, G: int, T: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(B, H, T, K, generator=generator),
        torch.randn(B, G, T, K, generator=generator),
        torch.randn(B, G, T, K, generator=generator),
    )


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 1, 1, 1, NO_DOCUMENT, NO_DOCUMENT], [NO_DOCUMENT] * 8])


@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (3, 1)])
def test_attention_equals_the_closed_form(H: int, G: int) -> None:
    q, k, v = qkv(3, H, G, 8, 6)
    packed = attend(q, k, v, attention_mask(DOCUMENTS, flex=False))
    torch.testing.assert_close(packed.double(), reference(q, k, v, by_rule(DOCUMENTS)), atol=1e-6, rtol=0)
    one = torch.zeros(3, 8, dtype=torch.int64)
    torch.testing.assert_close(attend(q, k, v, None).double(), reference(q, k, v, by_rule(one)), atol=1e-6, rtol=0)


def test_the_mask_is_the_rule_and_leaves_no_row_empty() -> None:
    mask = dense_mask(DOCUMENTS, DOCUMENTS)
    assert torch.equal(mask[:, 0], by_rule(DOCUMENTS))
    assert bool(mask.any(-1).all())
    assert torch.equal(dense_mask(DOCUMENTS[:, 5:], DOCUMENTS), mask[:, :, 5:])  # the last tokens, after a cache


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("H", "G"), [(2, 2), (4, 2)])
def test_flex_attention_equals_sdpa(H: int, G: int) -> None:
    """The block mask's function, run uncompiled on the CPU."""
    documents = torch.cat([DOCUMENTS.repeat_interleave(20, dim=1), torch.full((3, 7), NO_DOCUMENT)], dim=1)
    q, k, v = qkv(3, H, G, documents.shape[1], 16)
    dense = attend(q, k, v, dense_mask(documents, documents))
    torch.testing.assert_close(attend(q, k, v, block_mask(documents)), dense, atol=1e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_flex_attention_equals_sdpa_with_gradients() -> None:
    documents = DOCUMENTS.repeat_interleave(40, dim=1).cuda()
    inputs = [x.cuda().requires_grad_() for x in qkv(3, 4, 2, documents.shape[1], 32)]
    results = []
    for mask in (dense_mask(documents, documents), block_mask(documents)):
        out = attend(*inputs, mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for dense, flex in zip(*results, strict=True):
        torch.testing.assert_close(flex, dense, atol=2e-3, rtol=2e-3)


def test_flex_is_for_cuda_without_dropout_and_wide_heads() -> None:
    cuda = torch.device("cuda")
    assert use_flex(64, 0.0, cuda)
    assert not use_flex(64, 0.0, torch.device("cpu"))
    assert not use_flex(64, 0.1, cuda)
    assert not use_flex(8, 0.0, cuda)


def test_rotation_depends_on_the_distance_only() -> None:
    """Su et al. 2021, equation 16: the product of a rotated query and key is a function of their distance."""
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 1, 3, 1, 8)

    def products(positions: list[int]) -> Tensor:
        turn = rotation(torch.tensor([positions]), 8, 10000.0)
        return (rotate(q, turn)[0, :, 0] @ rotate(k, turn)[0, :, 0].T).diagonal(-1)

    near, far = products([0, 3, 6]), products([500, 503, 506])
    torch.testing.assert_close(near, far, atol=1e-4, rtol=0)
    assert not torch.allclose(near, products([0, 4, 8]), atol=1e-2)
    assert torch.equal(rotate(q, rotation(torch.zeros(1, 3, dtype=torch.int64), 8, 10000.0)), q)


def test_angles_are_fp32_whatever_the_compute_type() -> None:
    """In bf16 the positions 256 and 257 would be one."""
    positions = torch.tensor([[256, 257, 16384, 16385]])
    exact = [math.cos(position) for position in positions[0].tolist()]
    with torch.autocast("cpu", torch.bfloat16):
        cos, _ = rotation(positions, 2, 10000.0)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos.flatten().tolist(), exact, atol=1e-3, rtol=0)
    assert rotate(torch.ones(1, 4, 1, 2, dtype=torch.bfloat16), (cos, cos)).dtype == torch.bfloat16
