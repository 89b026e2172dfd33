"""Parameter groups, Muon with AdamW, and optimizer state as named tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from llmkit.engine import optim
from llmkit.engine.muon import MuonOptimizer, orthogonalise
from llmkit.errors import CheckpointError, ConfigError
from llmkit.models.adapter_config import LoraConfig
from llmkit.models.adapters import attach
from llmkit.models.head_config import HeadConfig
from llmkit.models.heads import attach_head
from tests.unit.models.test_encoder_config import bert
from tests.unit.models.tiny import gpt2


class TinyModel(nn.Module):
    """An embedding, a hidden matrix, a norm and an untied head, under the names a decoder has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)

    @property
    def output_weight_VD(self) -> nn.Parameter:
        return self.head.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.hidden(self.embedding(ids))))


SPECS = [
    optim.AdamW(lr=1e-2, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, layer_decay=1.0),
    optim.Muon(
        lr=1e-2,
        momentum=0.95,
        weight_decay=0.1,
        adamw_lr=1e-3,
        adamw_betas=[0.9, 0.95],
        adamw_eps=1e-8,
        layer_decay=1.0,
    ),
]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        ids = torch.arange(step, step + 5) % 11
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids), (ids + 1) % 11).backward()
        optim.set_lr(optimizer, 1 / (step + 1))
        optimizer.step()


def build(spec: optim.AdamW) -> tuple[TinyModel, torch.optim.Optimizer]:
    model = TinyModel()
    optimizer = spec.build(model)
    optim.remember_peak_lr(optimizer)
    return model, optimizer


def test_decay_touches_matrices_only() -> None:
    model = TinyModel()
    decayed, plain = optim.decay_groups(model.parameters(), 0.1)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in plain["params"]} == {1}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_muon_takes_hidden_matrices_alone() -> None:
    model = TinyModel()
    hidden, rest = optim.split_hidden_matrices(model)
    assert [id(p) for p in hidden] == [id(model.hidden.weight)]
    assert len(rest) == 5


@pytest.mark.parametrize("shape", [(6, 6), (8, 3), (3, 8)])
def test_muon_equals_torch_in_bf16(shape: tuple[int, int]) -> None:
    """Several steps with decay; torch's own Muon always iterates in bf16."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    optimizers = [
        MuonOptimizer([ours], lr=1e-2, momentum=0.95, weight_decay=0.1, dtype=torch.bfloat16),
        torch.optim.Muon([theirs], lr=1e-2, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_orthogonalise_in_fp32_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(12, 20)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalise(matrix, torch.float32)
    values = torch.linalg.svdvals(result)
    assert 0.6 < values.min() <= values.max() < 1.25
    aligned = u.T @ result @ v.T  # diagonal when the singular vectors are kept
    assert (aligned - torch.diag(aligned.diagonal())).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(12, 12), (12, 20), (12, 24), (64, 256), (40, 8), (1, 5), (7, 1)])
@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-4])
def test_orthogonalise_is_the_polynomial_of_the_singular_values(shape: tuple[int, int], smallest: float) -> None:
    """Against the five steps taken on each singular value in float64, whichever way the products are arranged."""
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    singular = torch.logspace(0, math.log10(smallest), min(shape), dtype=torch.float64)
    matrix = (u * singular) @ vt
    values = singular / singular.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    result = orthogonalise(matrix.float(), torch.float32)
    by_gram = max(shape) >= 2 * min(shape)  # fp32 rounding of the squares of small values grows from step to step
    torch.testing.assert_close(result.double(), (u * values) @ vt, atol=5e-4 if by_gram else 1e-5, rtol=0)


def test_muon_node_gives_the_other_parameters_to_adamw() -> None:
    model, optimizer = build(SPECS[1])
    twin = TinyModel()
    hidden, rest = optim.split_hidden_matrices(twin)
    muon = MuonOptimizer(hidden, lr=1e-2, momentum=0.95, weight_decay=0.1)
    adamw = torch.optim.AdamW(optim.decay_groups(rest, 0.1), lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    for part in (muon, adamw):
        optim.remember_peak_lr(part)
    train(model, optimizer, range(4))
    for step in range(4):
        ids = torch.arange(step, step + 5) % 11
        muon.zero_grad()
        adamw.zero_grad()
        nn.functional.cross_entropy(twin(ids), (ids + 1) % 11).backward()
        for part in (muon, adamw):
            optim.set_lr(part, 1 / (step + 1))
            part.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: type(s).__name__)
def test_state_round_trip_is_bitwise(spec: optim.AdamW) -> None:
    model, optimizer = build(spec)
    train(model, optimizer, range(3))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    tensors = {k: v.clone() for k, v in optim.state_tensors(optimizer, model.named_parameters()).items()}
    train(model, optimizer, range(3, 6))

    other, fresh = build(spec)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(weights[name])
    optim.load_state_tensors(fresh, other.named_parameters(), tensors)
    train(other, fresh, range(3, 6))
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_missing_and_unknown_state_are_named() -> None:
    model, optimizer = build(SPECS[0])
    train(model, optimizer, range(1))
    tensors = optim.state_tensors(optimizer, model.named_parameters())
    without = {k: v for k, v in tensors.items() if not k.startswith("norm.bias/")}
    with pytest.raises(CheckpointError, match=r"norm\.bias"):
        optim.load_state_tensors(optimizer, model.named_parameters(), without)
    with pytest.raises(CheckpointError, match="ghost"):
        optim.load_state_tensors(optimizer, model.named_parameters(), tensors | {"ghost/exp_avg": torch.zeros(1)})


def test_problems_name_the_field() -> None:
    bad = optim.AdamW(lr=0.0, betas=[0.9, 1.0], eps=1e-8, weight_decay=-1.0, layer_decay=0.0)
    assert [field for field, _ in bad.problems()] == ["layer_decay", "lr", "weight_decay", "betas"]
    for wrong in (1.5, -0.1, float("nan")):
        muon = replace(SPECS[1], layer_decay=wrong)
        assert [field for field, _ in muon.problems()] == ["layer_decay"]


# -- discriminative learning rates, frozen weights ------------------------------------------------------------------


def rate_of(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: type(s).__name__)
def test_each_layer_has_its_share_of_the_rate(spec: Any) -> None:
    """Layer by layer against the closed form; decay stays on matrices, and the schedule multiplies all."""
    model = gpt2(tie_embeddings=False).build()
    optimizer = replace(spec, layer_decay=0.5).build(model)
    optim.remember_peak_lr(optimizer)
    optim.set_lr(optimizer, 0.1)
    rates, named = rate_of(optimizer), dict(model.named_parameters())
    hidden = getattr(spec, "adamw_lr", spec.lr)
    for name, layers_above in (("head.weight", 0), ("norm.bias", 0), ("blocks.1.mlp_norm.weight", 1)):
        assert rates[id(named[name])] == pytest.approx(0.1 * hidden * 0.5**layers_above)
    for layer, layers_above in ((1, 1), (0, 2)):
        assert rates[id(named[f"blocks.{layer}.mlp.up.weight"])] == pytest.approx(0.1 * spec.lr * 0.5**layers_above)
    assert rates[id(named["embedding.weight"])] == pytest.approx(0.1 * hidden * 0.5**3)
    assert rates.keys() == {id(p) for p in named.values()}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decays[id(p)] == (0.1 if p.dim() >= 2 else 0.0) for p in named.values())


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: type(s).__name__)
def test_a_decay_of_one_changes_nothing(spec: Any) -> None:
    groups = replace(spec, layer_decay=1.0).build(TinyModel()).param_groups
    assert len(groups) == (3 if isinstance(spec, optim.Muon) else 2)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: type(s).__name__)
def test_only_what_is_trained_has_a_state(spec: Any) -> None:
    """Adapters alone: Muon is then by itself. With nothing to train the user is told."""
    model = gpt2().build()
    model.init_weights(0)
    attach(model, LoraConfig(2, 4, 0.0, ["q"], False, False, False, False), seed=0)
    optimizer = spec.build(model)
    model(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    optimizer.step()
    state = optim.state_tensors(optimizer, model.named_parameters())
    assert {name.rpartition("/")[0] for name in state} == {n for n, _ in model.named_parameters() if ".lora_" in n}
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no weight is left"):
        spec.build(model)


def test_a_task_head_is_no_hidden_matrix() -> None:
    model = bert().build()
    attach_head(model, HeadConfig("class", ("a", "b")), seed=0)
    hidden, rest = optim.split_hidden_matrices(model)
    head = {id(p) for p in model.task_head.parameters()}
    assert not head & {id(p) for p in hidden}
    assert head <= {id(p) for p in rest}
