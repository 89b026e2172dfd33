"""Low-rank adapters on the matrices of any model: attached, merged, counted.

The module of a matrix stays where it is under its name, with its weight and bias; it gains ``lora_A`` (r x inputs) and
``lora_B`` (outputs x r), and its forward pass adds what they say. Attention, blocks, caches and files know nothing of
it. B begins at zero, so that an attached model computes what it did before. Adapters of weights in 16 bits are fp32:
steps of training are smaller than what 16 bits can tell apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.errors import ConfigError
from llmkit.models.adapter_config import ALL_LINEAR, LoraConfig

HEADS = ("head", "transform", "pooler", "pair_head")  # of our models; the names of modules at the top
CONV1D = "transformers.pytorch_utils"  # GPT-2's matrices there: a weight that is inputs x outputs
WHERE = "adapter.targets"


class Adapted(nn.Module):
    """What a linear module becomes: ``y = W x + s B A drop(x) + b``, its class made by ``adapted_class``.

    With a magnitude m (DoRA, Liu et al. 2024, section 4.1) the sum without b is scaled, row by row of the matrix, by
    m / ||W + s B A||, a length that gets no gradient (section 4.3).
    """

    base_class: type[nn.Module]  # what it was before
    weight: Tensor
    bias: Tensor | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None  # one for each output; None without DoRA
    lora_scale: float
    lora_dropout: float

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """What the module computed before, and what the adapter adds."""
        y: Tensor = super().forward(x)
        dropped = F.dropout(x, self.lora_dropout, self.training)
        added = F.linear(F.linear(dropped, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype)) * self.lora_scale
        y = y + added
        if self.lora_magnitude is None:
            return y
        stretch: Tensor = self.lora_magnitude / adapted_matrix(self).norm(dim=1)
        stretched: Tensor = y * stretch.to(y.dtype)
        if self.bias is None:
            return stretched
        return stretched + (self.bias * (1 - stretch)).to(y.dtype)


@cache
def adapted_class(base: Any) -> Any:
    """A class that is both ``Adapted`` and ``base``."""
    return type(f"Adapted{base.__name__}", (Adapted, base), {"base_class": base})


def attach(model: nn.Module, config: LoraConfig, seed: int) -> None:
    """Put adapters on the modules that ``config.targets`` names, and freeze the rest of ``model``, in place.

    A is uniform within 1 / sqrt(inputs), as in the authors' code; B is zero. To be called after weights are loaded and
    before blocks are compiled or an optimizer sees the parameters. Raises ``ConfigError`` for names that fit nothing.
    """
    if adapters(model):
        raise ConfigError("the model has an adapter already", where="adapter", fix="merge it first")
    generator = torch.Generator().manual_seed(seed)
    for module in targeted(model, config.targets).values():
        adapt(module, config.r, config.scale(config.r), config)
        bound = _matrix(module).shape[1] ** -0.5
        drawn = torch.empty(module.lora_A.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            module.lora_A.copy_(drawn)
    choose_trained(model, config)


def adapt(module: Any, rank: int, scale: float, config: LoraConfig) -> None:
    """Give one linear module an adapter of zeros."""
    weight = _matrix(module)
    kind = weight.dtype if weight.dtype.itemsize >= 4 else torch.float32
    module.lora_scale, module.lora_dropout = scale, config.dropout
    module.lora_A = nn.Parameter(weight.new_zeros(rank, weight.shape[1], dtype=kind))
    module.lora_B = nn.Parameter(weight.new_zeros(weight.shape[0], rank, dtype=kind))
    length = weight.detach().to(kind).norm(dim=1) if config.use_dora else None
    module.lora_magnitude = None if length is None else nn.Parameter(length)
    kind_of_module: Any = type(module)
    module.__class__ = adapted_class(kind_of_module)


def choose_trained(model: nn.Module, config: LoraConfig) -> None:
    """Freeze everything but the adapters, and what ``config`` trains whole."""
    model.requires_grad_(False)
    for module in adapters(model).values():
        for parameter in (module.lora_A, module.lora_B, module.lora_magnitude):
            if parameter is not None:
                parameter.requires_grad_(True)
    for parameter in whole_parameters(model, config).values():
        parameter.requires_grad_(True)
    model.adapter_config = config  # type: ignore[assignment]


def whole_parameters(model: Any, config: LoraConfig) -> dict[str, nn.Parameter]:
    """The parameters outside of adapters that are trained: the task head; the token embedding and, where no task head
    makes them useless, an untied output matrix and an encoder's output bias."""
    chosen: set[int] = set()
    head = getattr(model, "task_head", None)
    if config.train_embeddings:
        inner = getattr(model, "hf", None)
        table = model.embedding if inner is None else inner.get_input_embeddings()
        chosen.add(id(table.weight))
        if head is None:
            chosen.add(id(model.output_weight_VD))
            chosen |= {id(bias) for bias in (_output_bias(model),) if bias is not None}
    if config.train_head and head is not None:
        chosen |= {id(parameter) for parameter in head.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}


@torch.no_grad()
def merge(model: nn.Module) -> int:
    """Add every adapter to its matrix and take it away, in place; returns their number.

    Sums are taken in fp32 at least and rounded to the weight's type once. The model is then as before ``attach``, but
    that it stays frozen.
    """
    found = adapters(model)
    for module in found.values():
        matrix = adapted_matrix(module)
        if module.lora_magnitude is not None:
            matrix *= (module.lora_magnitude / matrix.norm(dim=1))[:, None]
        _matrix(module).copy_(matrix)
        for name in ("lora_A", "lora_B", "lora_magnitude", "lora_scale", "lora_dropout"):
            delattr(module, name)
        module.__class__ = module.base_class  # type: ignore[assignment]
    if hasattr(model, "adapter_config"):
        del model.adapter_config
    return len(found)


def trainable_report(model: nn.Module) -> tuple[int, int]:
    """(parameters that are trained, all parameters), each once wherever it is used; adapters are among both."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def adapters(model: nn.Module) -> dict[str, Adapted]:
    """The adapted modules of a model by name; none before ``attach`` and after ``merge``."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def linear_modules(model: nn.Module) -> dict[str, Any]:
    """Modules that are a matrix applied to their input, but for the output matrix, which the loss reads by itself, and
    for the task head, which is trained whole."""
    output = getattr(model, "output_weight_VD", None)
    found = {name: module for name, module in model.named_modules() if _is_linear(module)}
    return {n: module for n, module in found.items() if module.weight is not output and not n.startswith("task_head.")}


def targeted(model: nn.Module, targets: list[str]) -> dict[str, Any]:
    """The modules that ``targets`` means. Raises ``ConfigError`` naming the target that fits none, and those there are.

    ``all_linear`` is every matrix of the backbone: of our models those outside of ``HEADS``, of a wrapped one those in
    what its library calls the base model.
    """
    known = linear_modules(model)
    if targets == [ALL_LINEAR]:
        return {name: module for name, module in known.items() if _in_backbone(model, name)}
    for target in targets:
        if not any(_ends_with(name, target) for name in known):
            endings = sorted({name.rpartition(".")[2] for name in known})
            raise ConfigError(f"no matrix has the name {target!r}", where=WHERE, fix=f"choose of {', '.join(endings)}")
    return {name: module for name, module in known.items() if any(_ends_with(name, target) for target in targets)}


def adapted_matrix(module: Adapted) -> Tensor:
    """``W + s B A``, outputs x inputs, in fp32 at least whatever autocast says; without gradient."""
    with torch.no_grad(), torch.autocast(module.weight.device.type, enabled=False):
        weight = _matrix(module).to(module.lora_A.dtype)
        return torch.addmm(weight, module.lora_B, module.lora_A, alpha=module.lora_scale)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is inputs x outputs."""
    return not isinstance(module, nn.Linear)


# -- private --------------------------------------------------------------------------------------------------------


def _matrix(module: Any) -> Tensor:
    """The weight as outputs x inputs."""
    weight: Tensor = module.weight.t() if is_transposed(module) else module.weight
    return weight


def _is_linear(module: nn.Module) -> bool:
    """The output layer inside ``nn.MultiheadAttention`` is none: its weight is read past its forward pass."""
    if isinstance(module, nn.Linear):
        return not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    kind = getattr(module, "base_class", type(module))
    return (kind.__module__, kind.__name__) == (CONV1D, "Conv1D")


def _in_backbone(model: nn.Module, name: str) -> bool:
    inner: Any = getattr(model, "hf", None)
    if inner is None:
        return name.partition(".")[0] not in HEADS
    prefix = inner.base_model_prefix
    return not hasattr(inner, prefix) or name.startswith(f"hf.{prefix}.")


def _output_bias(model: Any) -> Tensor | None:
    """The bias of the output layer; BART's is no part of a layer, in files neither, and stays as it is."""
    inner = getattr(model, "hf", None)
    if inner is None:
        return getattr(model, "output_bias", None) if model.config.kind == "encoder" else None
    output = model.output_weight_VD
    found: Iterator[Any] = (m for m in inner.modules() if getattr(m, "weight", None) is output and hasattr(m, "bias"))
    return next((module.bias for module in found), None)


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")
