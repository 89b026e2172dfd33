"""Which depth every parameter has: for freezing the lowest layers, and for learning rates that shrink towards them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from llmkit.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

NUMBER = re.compile(r"\.\d+\.")


def depths(model: nn.Module) -> tuple[dict[str, int], int]:
    """(depth of every parameter by name, number of layers).

    Embedding tables and what belongs to them have depth 0, layers 1, 2 ... in the order they are computed in, those of
    an encoder before those of its decoder; final norms and heads have the number of layers + 1. Layers are the members
    of the outermost lists of modules; lists side by side (two directions of an LSTM) are one stack. A tied head is an
    embedding.
    """
    starts, n_layers = _stacks(model)
    tables = _tables(model)
    found = {}
    output = getattr(model, "output_weight_VD", None)
    for name, parameter in model.named_parameters():
        place = NUMBER.search(name)
        layers = name[: place.start()] if place else ""
        if place and layers in starts:
            found[name] = starts[layers] + int(place.group().strip(".")) + 1
        else:
            is_table = name.rpartition(".")[0] in tables or ("embed" in name and parameter is not output)
            found[name] = 0 if is_table else n_layers + 1
    return found, n_layers


def freeze(model: nn.Module, n_layers: int, embeddings: bool) -> int:
    """Take the first ``n_layers`` layers, and the embeddings if ``embeddings``, out of training; returns the number of
    parameters that were trained before.

    Adapters on frozen layers are frozen too. Raises ``ConfigError`` for more layers than there are.
    """
    depth_of, there = depths(model)
    if not 0 <= n_layers <= there:
        raise ConfigError(f"the model has {there} layers, {n_layers} cannot be frozen", where="freeze.n_layers")
    stopped = 0
    for name, parameter in model.named_parameters():
        frozen = embeddings if depth_of[name] == 0 else depth_of[name] <= n_layers
        if frozen and parameter.requires_grad:
            parameter.requires_grad_(False)
            stopped += parameter.numel()
    return stopped


def lr_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """What the learning rate of every parameter is multiplied with: ``layer_decay`` once for each layer above it.

    Heads have 1, the last layer ``layer_decay``, embeddings ``layer_decay ** (layers + 1)`` (discriminative
    fine-tuning, Howard and Ruder 2018, section 3.2; the form of Clark et al. 2020, ELECTRA, appendix B).
    """
    depth_of, n_layers = depths(model)
    return {name: float(layer_decay ** (n_layers + 1 - depth)) for name, depth in depth_of.items()}


def _stacks(model: nn.Module) -> tuple[dict[str, int], int]:
    """(name of every outermost list of modules -> layers before its first one, layers in all)."""
    from torch import nn

    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    starts: dict[str, int] = {}
    n_layers, parent, before = 0, None, 0
    for name, length in lists.items():
        if NUMBER.search(f"{name}.") or not length:  # inside of a layer
            continue
        owner = name.rpartition(".")[0]
        before = before if owner == parent else n_layers
        starts[name], parent = before, owner
        n_layers = max(n_layers, before + length)
    return starts, n_layers


def _tables(model: nn.Module) -> set[str]:
    from torch import nn

    return {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
