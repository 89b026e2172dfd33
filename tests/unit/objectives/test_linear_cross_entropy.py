"""The fused head and loss against ``F.linear`` and ``F.cross_entropy``."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmkit.interfaces import IGNORE_INDEX
from llmkit.objectives import linear_cross_entropy as module
from llmkit.objectives.chunks import LOGIT_BYTES, MIN_CHUNK, auto_chunk_size
from llmkit.objectives.linear_cross_entropy import linear_cross_entropy


def inputs(P: int, D: int, V: int, *, ignored: float = 0.3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(P * 10_000 + D * 100 + V)
    hidden = torch.randn(P, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (P,), generator=generator)
    labels[torch.rand(P, generator=generator) < ignored] = IGNORE_INDEX
    return [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    logits = F.linear(hidden, weight)
    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing, ignore_index=IGNORE_INDEX)
    return loss + z_loss * logits.float().logsumexp(1)[labels != IGNORE_INDEX].square().sum()


def bias(V: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(V), dtype=torch.float64).to(dtype).requires_grad_()


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


@settings(derandomize=True, max_examples=50, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 9),
    st.integers(2, 30),
    st.sampled_from([0.0, 0.1, 0.7]),
    st.sampled_from([0.0, 1e-2]),
    st.sampled_from([None, 1, 3, 7, 20]),
    st.booleans(),
    st.sampled_from([None, 1.5, 30.0]),
)
def test_loss_and_gradients_equal_the_plain_ones(
    P: int, D: int, V: int, smoothing: float, z_loss: float, chunk_size: int | None, biased: bool, cap: float | None
) -> None:
    """In float64, where nothing but the formula can differ; the upstream gradient is not 1."""
    hidden, weight, labels = inputs(P, D, V, dtype=torch.float64)
    shift = bias(V, torch.float64) if biased else None
    leaves = [hidden, weight] if shift is None else [hidden, weight, shift]
    form = {"label_smoothing": smoothing, "z_loss": z_loss, "chunk_size": chunk_size, "softcap": cap}
    parts = linear_cross_entropy(hidden, weight, labels, bias_V=shift, **form)  # type: ignore[arg-type]
    logits = F.linear(hidden, weight, shift)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    kept = labels != IGNORE_INDEX
    expected = F.cross_entropy(logits[kept], labels[kept], reduction="sum", label_smoothing=smoothing)
    expected = expected + z_loss * logits[kept].logsumexp(1).square().sum()
    torch.testing.assert_close(parts.loss, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(parts.nll, F.cross_entropy(logits, labels, reduction="sum"), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(parts.z_loss, z_loss * logits[kept].logsumexp(1).square().sum(), atol=1e-9, rtol=1e-9)
    assert int(parts.n_correct) == int((logits.argmax(1) == labels).sum())
    ours = gradients(parts.loss * 0.37, *leaves)
    for own, other in zip(ours, gradients(expected * 0.37, *leaves), strict=True):
        torch.testing.assert_close(own, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("smoothing", "z_loss", "cap"), [(0.0, 0.0, None), (0.2, 1e-2, None), (0.2, 1e-2, 2.0)])
def test_gradcheck(smoothing: float, z_loss: float, cap: float | None) -> None:
    hidden, weight, labels = inputs(7, 3, 5, dtype=torch.float64)

    def loss(hidden: Tensor, weight: Tensor, bias_V: Tensor) -> Tensor:
        form = {"label_smoothing": smoothing, "z_loss": z_loss, "chunk_size": 2, "softcap": cap}
        return linear_cross_entropy(hidden, weight, labels, bias_V=bias_V, **form).loss  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias(5, torch.float64)))


@pytest.mark.parametrize("chunk_size", [None, 100])
def test_fp32_is_as_exact_as_the_plain_one(chunk_size: int | None) -> None:
    hidden, weight, labels = inputs(700, 48, 311)
    ours = linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size).loss
    expected = plain(hidden, weight, labels)
    torch.testing.assert_close(ours, expected, atol=0, rtol=1e-6)
    pairs = zip(gradients(ours, hidden, weight), gradients(expected, hidden, weight), strict=True)
    for own, other in pairs:
        assert float((own - other).abs().max()) <= 1e-6 * float(other.abs().max())


def test_a_soft_cap_is_applied_in_fp32_under_bf16_autocast() -> None:
    """Large logits that bf16 would round to the cap: their slopes are small, not zero."""
    hidden, weight, labels = inputs(300, 48, 311, ignored=0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, chunk_size=100, softcap=5.0).loss
        logits = F.linear(hidden, weight)
    expected = F.cross_entropy(5.0 * torch.tanh(logits.float() / 5.0), labels, reduction="sum")
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)
    pairs = zip(gradients(loss, hidden, weight), gradients(expected, hidden, weight), strict=True)
    for own, other in pairs:
        assert float((own - other).abs().max()) <= 2e-2 * float(other.abs().max())


def test_a_bias_is_added_in_fp32_under_bf16_autocast() -> None:
    """Products are rounded to bf16, the bias is not: a bias too small for the grid of the logits still counts."""
    hidden, weight, labels = inputs(300, 48, 311, ignored=0)
    shift = (2e-4 * torch.arange(311)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        parts = linear_cross_entropy(hidden, weight, labels, bias_V=shift, chunk_size=100, label_smoothing=0.1)
        logits = F.linear(hidden, weight)
    expected = F.cross_entropy(logits.float() + shift, labels, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(parts.loss, expected, atol=0, rtol=1e-6)
    (own,), (other,) = gradients(parts.loss, shift), gradients(expected, shift)
    assert own.dtype == torch.float32
    assert float((own - other).abs().max()) <= 1e-5 * float(other.abs().max())


def test_the_bias_of_a_bf16_model_gets_its_gradient_summed_in_fp32() -> None:
    hidden, weight = torch.ones(4096, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16)
    shift = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.int64), bias_V=shift, chunk_size=1).loss
    (gradient,) = gradients(loss, shift)
    assert gradient.dtype == torch.bfloat16
    assert gradient.tolist() == [-2048.0, 2048.0]


def test_correct_rows_are_those_whose_label_has_the_largest_logit() -> None:
    """Two right, one wrong, one not labelled; the bias takes part."""
    hidden, weight = torch.eye(4, 3), torch.eye(3, 3)
    labels = torch.tensor([0, 1, 0, IGNORE_INDEX])
    assert int(linear_cross_entropy(hidden, weight, labels).n_correct) == 2
    assert int(linear_cross_entropy(hidden, weight, labels, bias_V=torch.tensor([2.0, 0, 0])).n_correct) == 2
    assert int(linear_cross_entropy(hidden, weight, labels, bias_V=torch.tensor([0.0, 0, 2])).n_correct) == 0


def test_bf16_autocast_keeps_the_loss_in_fp32() -> None:
    """Products in bf16, but a loss off the bf16 grid, and as near to the exact one as rounded logits can be."""
    hidden, weight, labels = inputs(700, 48, 311)
    exact = linear_cross_entropy(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        parts = linear_cross_entropy(hidden, weight, labels, chunk_size=100)
        expected = plain(hidden, weight, labels)
    assert parts.loss.dtype == parts.nll.dtype == torch.float32
    torch.testing.assert_close(parts.loss, expected, atol=0, rtol=1e-6)
    assert float((parts.loss - exact.loss).detach().abs()) < 2**-9 * float(exact.loss.detach())
    assert float(parts.loss.detach().bfloat16()) != float(parts.loss.detach())
    for own, other in zip(gradients(parts.loss, hidden, weight), gradients(exact.loss, hidden, weight), strict=True):
        assert own.dtype == torch.float32
        assert float((own - other).norm()) < 0.01 * float(other.norm())


def test_a_bf16_model_gets_bf16_gradients_summed_in_fp32() -> None:
    """4096 equal rows, a chunk each: summed in bf16 the weight's gradient would stop growing at 256 rows."""
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.int64), chunk_size=1).loss
    (gradient,) = gradients(loss, weight)
    assert gradient.dtype == torch.bfloat16
    assert gradient.flatten().tolist() == [-2048.0, 2048.0]


def test_a_small_upstream_gradient_is_not_rounded_to_bf16() -> None:
    hidden, weight, labels = inputs(64, 8, 16, ignored=0)
    scale = 1 / 4099
    with torch.autocast("cpu", torch.bfloat16):
        one, scaled = (linear_cross_entropy(hidden, weight, labels).loss * s for s in (1.0, scale))
    a, b = gradients(one, weight)[0], gradients(scaled, weight)[0]
    torch.testing.assert_close(b, a * scale, atol=0, rtol=1e-6)


@pytest.mark.parametrize("shift", [300.0, -300.0])
def test_large_logits_stay_finite(shift: float) -> None:
    hidden = torch.full((3, 1), 1.0, requires_grad=True)
    weight = torch.tensor([[shift], [-shift], [0.0]], requires_grad=True)
    labels = torch.tensor([0, 1, 2])
    ours, expected = linear_cross_entropy(hidden, weight, labels).loss, plain(hidden, weight, labels)
    torch.testing.assert_close(ours, expected)
    for own, other in zip(gradients(ours, hidden, weight), gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("P", [0, 5])
def test_no_targets_give_zero_and_zero_gradients(P: int) -> None:
    hidden, weight, _ = inputs(P, 4, 6)
    labels = torch.full((P,), IGNORE_INDEX)
    parts = linear_cross_entropy(hidden, weight, labels, label_smoothing=0.1, z_loss=0.1)
    assert [float(part.detach()) for part in parts] == [0.0, 0.0, 0.0, 0.0]
    assert all(not g.any() for g in gradients(parts.loss, hidden, weight))


def test_ignored_rows_are_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in a row without a label reaches neither loss nor gradient, and the products see labelled rows only."""
    hidden, weight, labels = inputs(40, 4, 6)
    with torch.no_grad():
        hidden[labels == IGNORE_INDEX] = float("nan")
    rows: list[int] = []
    mm = torch.mm

    def counted(a: Tensor, b: Tensor, **arguments: Any) -> Tensor:
        rows.append(a.shape[0])
        return mm(a, b, **arguments)

    monkeypatch.setattr(module.torch, "mm", counted)
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size=8).loss
    assert sum(rows) == int((labels != IGNORE_INDEX).sum())
    assert max(rows) == 8
    assert all(bool(g.isfinite().all()) for g in gradients(loss, hidden, weight))


def test_without_gradients_none_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = inputs(9, 4, 6)
    expected = linear_cross_entropy(hidden, weight, labels).loss

    def never(*_: Any) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(module, "_multiply_in", never)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels).loss, expected.detach())
    frozen = linear_cross_entropy(hidden.detach(), weight.detach(), labels).loss
    assert not frozen.requires_grad


def test_a_frozen_side_gets_no_gradient() -> None:
    hidden, weight, labels = inputs(9, 4, 6)
    expected = gradients(plain(hidden, weight, labels), hidden, weight)
    torch.testing.assert_close(
        gradients(linear_cross_entropy(hidden, weight.detach(), labels).loss, hidden)[0], expected[0]
    )
    torch.testing.assert_close(
        gradients(linear_cross_entropy(hidden.detach(), weight, labels).loss, weight)[0], expected[1]
    )
    shift = torch.zeros(6, requires_grad=True)
    loss = linear_cross_entropy(hidden.detach(), weight.detach(), labels, bias_V=shift).loss
    logits = F.linear(hidden, weight).detach() + shift
    expected_shift = gradients(F.cross_entropy(logits, labels, reduction="sum"), shift)[0]
    torch.testing.assert_close(gradients(loss, shift)[0], expected_shift)


def test_a_second_backward_gives_the_same() -> None:
    hidden, weight, labels = inputs(9, 4, 6)
    loss = linear_cross_entropy(hidden, weight, labels).loss * 0.5
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(loss, hidden, weight), strict=True))


def test_chunks_fit_the_budget() -> None:
    assert auto_chunk_size(8192, "cpu") * 8192 * 4 <= LOGIT_BYTES["cpu"]
    assert auto_chunk_size(8192, "cuda") > auto_chunk_size(8192, "cpu")
    assert auto_chunk_size(10**7, "cpu") == MIN_CHUNK


PEAK = """
import resource, sys, torch, torch.nn.functional as F
from llmkit.objectives.linear_cross_entropy import linear_cross_entropy
torch.set_num_threads(1)
hidden, weight = torch.randn(2048, 16, requires_grad=True), torch.randn(50304, 16, requires_grad=True)
labels = torch.randint(0, 50304, (2048,))
linear_cross_entropy(hidden[:8], weight, labels[:8]).loss.backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "own":
    linear_cross_entropy(hidden, weight, labels).loss.backward()
else:
    F.cross_entropy(F.linear(hidden, weight), labels).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_peak_memory_is_a_chunk_not_all_logits() -> None:
    """Logits of 2048 x 50304 in fp32 are 412 MB; the plain way holds three copies."""
    kib = {
        name: int(subprocess.run([sys.executable, "-c", PEAK, name], check=True, capture_output=True).stdout)
        for name in ("own", "plain")
    }
    assert kib["plain"] > 750_000
    assert kib["own"] < 200_000
