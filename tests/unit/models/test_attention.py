"""Attention against a closed form in float64, its mask against the rule, flex against SDPA."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llmkit.interfaces import NO_DOCUMENT
from llmkit.models import attention
from llmkit.models.attention import attend, attention_mask, use_flex, use_written_out
from llmkit.models.cache import dense_mask
from llmkit.models.layers import rotate, rotation


def reference(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, seen_BTS: Tensor, scale: float | None = None, cap: float = math.inf
) -> Tensor:
    """Softmax attention, one row at a time, in float64."""
    out = torch.zeros(q_BHTK.shape, dtype=torch.float64)
    B, H, T, K = q_BHTK.shape
    group = H // k_BGSK.shape[1]
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = seen_BTS[b, t].nonzero().squeeze(1)
                scores = k_BGSK[b, h // group, seen].double() @ q_BHTK[b, h, t].double() * (scale or K**-0.5)
                scores = scores if cap == math.inf else cap * (scores / cap).tanh()
                out[b, h, t] = scores.softmax(0) @ v_BGSK[b, h // group, seen].double()
    return out


def by_rule(documents: Tensor, window: int = 1000) -> Tensor:
    """BTS, spelt out: one of the ``window`` tokens up to and with itself, of the same document."""
    B, T = documents.shape
    return torch.tensor(
        [
            [[t - window < s <= t and documents[b, s] == documents[b, t] for s in range(T)] for t in range(T)]
            for b in range(B)
        ]
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


@pytest.fixture
def written_out() -> Iterator[None]:
    use_written_out(True)
    yield
    use_written_out(False)


@pytest.mark.usefixtures("written_out")
@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (3, 1)])
def test_written_out_attention_equals_the_closed_form(H: int, G: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed, in one document, for one query after a cache; and not where there are too many scores."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)  # not called
        test_attention_equals_the_closed_form(H, G)
        q, k, v = qkv(3, H, G, 8, 6)
        whole, last = attend(q, k, v, None), attend(q[:, :, -1:], k, v, None)
    torch.testing.assert_close(last, whole[:, :, -1:], atol=1e-6, rtol=0)
    monkeypatch.setattr(attention, "WRITTEN_OUT_LIMIT", 63)
    monkeypatch.setattr(attention, "attend_written_out", None)  # not called
    torch.testing.assert_close(attend(q, k, v, None), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (1, 4, 8, 8), (3, 1, 8, 8), (8, 8)])
@pytest.mark.parametrize("G", [4, 2])
def test_written_out_attention_adds_biases_as_sdpa_does(shape: tuple[int, ...], G: int) -> None:
    """Values and gradients, those of the bias too, some of whose scores are hidden."""
    q, k, v = (x.requires_grad_() for x in qkv(3, 4, G, 8, 6))
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(1)).masked_fill(
        torch.ones(8, 8).triu(3) > 0, -math.inf
    )
    found = []
    for written in (False, True):
        use_written_out(written)
        leaf = bias.clone().requires_grad_()
        out = attend(q, k, v, leaf, scale=0.7)
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, leaf))))
    use_written_out(False)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("scale", [None, 0.9])
def test_capped_scores_equal_the_closed_form(H: int, G: int, scale: float | None) -> None:
    """A cap far below the largest score, packed, in one document, and for one query after a cache."""
    q, k, v = qkv(3, H, G, 8, 6)
    one = torch.zeros(3, 8, dtype=torch.int64)
    for mask, documents in ((attention_mask(DOCUMENTS, flex=False), DOCUMENTS), (None, one)):
        expected = reference(q, k, v, by_rule(documents), scale, 1.5)
        ours = attend(q, k, v, mask, scale=scale, cap=1.5)
        torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=0)
        assert float((attend(q, k, v, mask, scale=scale) - ours).abs().max()) > 0.01
    last = attend(q[:, :, -1:], k, v, None, scale=scale, cap=1.5)
    torch.testing.assert_close(last.double(), expected[:, :, -1:], atol=1e-6, rtol=0)


def test_capped_attention_drops_weights_and_keeps_their_sum() -> None:
    q, k, _ = qkv(3, 2, 1, 8, 6)
    torch.manual_seed(0)
    sums = attend(q, k, torch.ones(3, 1, 8, 6), None, 0.5, cap=1.5)
    assert torch.equal(attend(q, k, torch.ones(3, 1, 8, 6), None, cap=1.5).round(decimals=5), torch.ones_like(sums))
    assert float(sums.mean()) == pytest.approx(1.0, abs=0.2)
    assert float(sums.std()) > 0.1


def test_the_mask_is_the_rule_and_leaves_no_row_empty() -> None:
    mask = dense_mask(DOCUMENTS, DOCUMENTS)
    assert torch.equal(mask[:, 0], by_rule(DOCUMENTS))
    assert bool(mask.any(-1).all())
    assert torch.equal(dense_mask(DOCUMENTS[:, 5:], DOCUMENTS), mask[:, :, 5:])  # the last tokens, after a cache


@pytest.mark.parametrize("window", [1, 2, 3, 7, 8, 9])
def test_a_window_is_the_rule_and_leaves_no_row_empty(window: int) -> None:
    mask = attention_mask(DOCUMENTS, flex=False, window=window)
    assert isinstance(mask, Tensor)
    assert torch.equal(mask[:, 0], by_rule(DOCUMENTS, window))
    assert bool(mask.any(-1).all())
    assert torch.equal(dense_mask(DOCUMENTS[:, 5:], DOCUMENTS, window=window), mask[:, :, 5:])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("H", "G"), [(2, 2), (4, 2)])
@pytest.mark.parametrize(("window", "cap"), [(None, None), (30, None), (None, 1.5), (30, 1.5)])
def test_flex_attention_equals_sdpa(H: int, G: int, window: int | None, cap: float | None) -> None:
    """The block mask's function and the cap's, run uncompiled on the CPU."""
    documents = torch.cat([DOCUMENTS.repeat_interleave(20, dim=1), torch.full((3, 7), NO_DOCUMENT)], dim=1)
    q, k, v = qkv(3, H, G, documents.shape[1], 16)
    masks = [attention_mask(documents, flex=flex, window=window) for flex in (False, True)]
    dense, flex = (attend(q, k, v, mask, scale=0.7, cap=cap) for mask in masks)
    torch.testing.assert_close(flex, dense, atol=1e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("window", "cap"), [(None, None), (50, None), (50, 1.5)])
def test_compiled_flex_attention_equals_sdpa_with_gradients(window: int | None, cap: float | None) -> None:
    documents = DOCUMENTS.repeat_interleave(40, dim=1).cuda()
    inputs = [x.cuda().requires_grad_() for x in qkv(3, 4, 2, documents.shape[1], 32)]
    results = []
    for flex in (False, True):
        out = attend(*inputs, attention_mask(documents, flex=flex, window=window), cap=cap)
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


def test_fewer_angles_turn_the_first_dimensions_only() -> None:
    x = torch.randn(1, 3, 2, 10, generator=torch.Generator().manual_seed(0))
    turn = rotation(torch.tensor([[4, 5, 6]]), 6, 10000.0)
    assert torch.equal(rotate(x, turn)[..., :6], rotate(x[..., :6], turn))
    assert torch.equal(rotate(x, turn)[..., 6:], x[..., 6:])


def test_angles_are_fp32_whatever_the_compute_type() -> None:
    """In bf16 the positions 256 and 257 would be one."""
    positions = torch.tensor([[256, 257, 16384, 16385]])
    exact = [math.cos(position) for position in positions[0].tolist()]
    with torch.autocast("cpu", torch.bfloat16):
        cos, _ = rotation(positions, 2, 10000.0)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos.flatten().tolist(), exact, atol=1e-3, rtol=0)
    assert rotate(torch.ones(1, 4, 1, 2, dtype=torch.bfloat16), (cos, cos)).dtype == torch.bfloat16
