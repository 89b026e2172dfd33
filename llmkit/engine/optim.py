"""Optimizers: parameter groups, AdamW, Muon with AdamW, and optimizer state as named tensors.

Weight decay acts on matrices alone: norms and biases have fewer than two dimensions. With ``layer_decay`` below 1 there
is a group for every depth of the model, whose rate is smaller the nearer it is to the embeddings. A group remembers its
peak learning rate as ``peak_lr``; the engine sets ``lr = peak_lr * schedule.factor(step)`` before each update.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    NamedParameters = Iterable[tuple[str, nn.Parameter]]
    Rates = list[tuple[float, list[nn.Parameter]]]  # what the learning rate is multiplied with, and whose it is


def decay_groups(parameters: Iterable[Any], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices with weight decay, everything else without."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _rate_problems(lr: float, weight_decay: float, layer_decay: float) -> list[tuple[str, str]]:
    found = []
    if not 0 < layer_decay <= 1:
        found.append(("layer_decay", "must be above 0 and at most 1"))
    if not lr > 0:
        found.append(("lr", "must be above 0"))
    if not weight_decay >= 0:
        found.append(("weight_decay", "must be at least 0"))
    return found


def _beta_problems(betas: list[float], field: str) -> list[tuple[str, str]]:
    good = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    return [] if good else [(field, "must be two numbers in [0, 1)")]


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov and Hutter 2019) as torch implements it, fused into one kernel."""

    lr: float
    betas: list[float]
    eps: float
    weight_decay: float
    layer_decay: float  # the rate of each layer is that of the layer above it times this; 1 is one rate for all

    def build(self, model: nn.Module) -> Optimizer:
        parts = rates(model, model.parameters(), self.layer_decay)
        _check_any(parts)
        return _adamw(parts, self.lr, self.betas, self.eps, self.weight_decay)

    def state_bytes(self, n_hidden: int, n_other: int) -> int:
        """Two fp32 moments a parameter."""
        return 8 * (n_hidden + n_other)

    def problems(self) -> list[tuple[str, str]]:
        return _rate_problems(self.lr, self.weight_decay, self.layer_decay) + _beta_problems(self.betas, "betas")


@dataclass(frozen=True)
class Muon:
    """Muon (Jordan et al. 2024) for the hidden matrices; AdamW for embeddings, the output head, norms and biases.

    The update is scaled to AdamW's root mean square (Liu et al. 2025, "Muon is scalable for LLM training", equation 4),
    so that ``lr`` and ``weight_decay`` mean the same as for AdamW.
    """

    lr: float
    momentum: float
    weight_decay: float
    adamw_lr: float
    adamw_betas: list[float]
    adamw_eps: float
    layer_decay: float  # as in AdamW, for the rates of both parts

    def build(self, model: nn.Module) -> Optimizer:
        from llmkit.engine.muon import MuonOptimizer

        hidden, rest = (rates(model, part, self.layer_decay) for part in split_hidden_matrices(model))
        _check_any([*hidden, *rest])
        optimizers: list[Optimizer] = []
        if hidden:
            groups: list[Any] = [{"params": part, "lr": self.lr * scale} for scale, part in hidden]
            optimizers.append(MuonOptimizer(groups, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay))
        if rest:
            optimizers.append(_adamw(rest, self.adamw_lr, self.adamw_betas, self.adamw_eps, self.weight_decay))
        return combine(*optimizers)

    def state_bytes(self, n_hidden: int, n_other: int) -> int:
        """One fp32 momentum a hidden parameter, two moments for the others."""
        return 4 * n_hidden + 8 * n_other

    def problems(self) -> list[tuple[str, str]]:
        found = _rate_problems(self.lr, self.weight_decay, self.layer_decay)
        found += _beta_problems(self.adamw_betas, "adamw_betas")
        if not 0 <= self.momentum < 1:
            found.append(("momentum", "must lie in [0, 1)"))
        return found


def spare_compiler_import() -> None:
    """Keep torch from importing its compiler, over a second, when an optimizer is made.

    torch does so to leave three methods of optimizers out of compiled graphs; llmkit compiles blocks of the model
    only. The attribute is where torch caches the outcome (``torch._compile``); were it renamed, the import would just
    come back.
    """
    import torch

    for name in ("add_param_group", "state_dict", "load_state_dict"):
        method = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if method is not None:
            method.__dict__.setdefault("__dynamo_disable", method)


def rates(model: nn.Module, parameters: Iterable[nn.Parameter], layer_decay: float) -> Rates:
    """The trained ones of ``parameters`` by what their learning rate is multiplied with, the largest first."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if layer_decay == 1:
        return [(1.0, trained)] if trained else []
    from llmkit.models.freezing import lr_scales

    named = dict(model.named_parameters())
    scale_of = {id(named[name]): scale for name, scale in lr_scales(model, layer_decay).items()}
    scales = sorted({scale_of[id(parameter)] for parameter in trained}, reverse=True)
    return [(scale, [p for p in trained if scale_of[id(p)] == scale]) for scale in scales]


def _check_any(parts: Rates) -> None:
    if not parts:
        raise ConfigError("no weight is left to train", where="freeze", fix="freeze fewer layers")


def _adamw(parts: Rates, lr: float, betas: list[float], eps: float, weight_decay: float) -> Optimizer:
    import torch

    groups = [group | {"lr": lr * scale} for scale, part in parts for group in decay_groups(part, weight_decay)]
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)


def split_hidden_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices inside the blocks, all other parameters). Embeddings and the heads are lookups, not hidden matrices."""
    from torch import nn

    lookups = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    lookups |= {id(getattr(model, "output_weight_VD", None))}
    lookups |= {id(p) for name, p in model.named_parameters() if name.startswith("task_head.")}
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_hidden = parameter.dim() == 2 and id(parameter) not in lookups
            (hidden if is_hidden else rest).append(parameter)
    return hidden, rest


def combine(*parts: Optimizer) -> Optimizer:
    """One optimizer that steps several, each with its own parameters."""
    import torch

    class Combined(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([group for part in parts for group in part.param_groups], defaults={})
            self.parts = parts
            self._share_groups()

        def _share_groups(self) -> None:
            self.param_groups = [group for part in parts for group in part.param_groups]

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for part in parts:
                part.step()

        def state_dict(self) -> dict[str, Any]:
            return {"parts": [part.state_dict() for part in parts]}

        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            for part, state in zip(parts, state_dict["parts"], strict=True):
                part.load_state_dict(state)
            self._share_groups()

    return Combined()


def remember_peak_lr(optimizer: Optimizer) -> None:
    """Note each group's configured rate, of which the schedule takes a share."""
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]


def set_lr(optimizer: Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def state_tensors(optimizer: Optimizer, named_parameters: NamedParameters) -> dict[str, Tensor]:
    """Optimizer state as ``{"<parameter>/<entry>": tensor}``. Every entry of torch's own optimizers is a tensor."""
    import torch

    names = {id(parameter): name for name, parameter in named_parameters}
    tensors = {}
    for part in _parts(optimizer):
        for parameter, entries in part.state.items():
            for entry, value in entries.items():
                tensors[f"{names[id(parameter)]}/{entry}"] = torch.as_tensor(value)
    return tensors


def load_state_tensors(optimizer: Optimizer, named_parameters: NamedParameters, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of ``state_tensors``; a parameter without state, or state without a parameter, is an error."""
    names = {id(parameter): name for name, parameter in named_parameters}
    entries_of: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, entry = key.rsplit("/", 1)
        entries_of.setdefault(name, {})[entry] = tensor
    if not entries_of:
        return
    for part in _parts(optimizer):
        for parameter in (p for group in part.param_groups for p in group["params"]):
            name = names[id(parameter)]
            if name not in entries_of:
                raise CheckpointError(f"the checkpoint has no optimizer state for {name}")
            part.state[parameter] = {k: v.to(parameter.device) for k, v in entries_of.pop(name).items()}
    if entries_of:
        raise CheckpointError(f"optimizer state for unknown parameters: {', '.join(sorted(entries_of)[:3])}")


def _parts(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    return getattr(optimizer, "parts", (optimizer,))
