"""Task heads: classes of whole texts, or the start and end of a span, from the hidden states of any model.

A head is the submodule ``task_head`` of its model. The output layers of the language model are then of no use: they
stay where they are, and are neither trained nor written where the file's architecture has no place for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.errors import ConfigError
from llmkit.models.head_config import HeadConfig, HeadShape
from llmkit.models.hf.task_heads import is_output_layer, saved_as, shape_of
from llmkit.models.layers import LayerNorm, Linear, init_normal
from llmkit.models.transformers_config import TransformersConfig

log = logging.getLogger("llmkit.models")

USUAL_DROPOUT = 0.1
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu}


class TaskHead(nn.Module):
    """Parameters are uninitialised until ``attach_head`` or a checkpoint fills them."""

    def __init__(self, width: int, config: HeadConfig, shape: HeadShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        has_dense, has_norm = shape.activation is not None, shape.norm_eps is not None
        self.dense = Linear(width, width, bias=shape.dense_bias) if has_dense else None
        self.norm = LayerNorm(width, shape.norm_eps or 0.0, bias=shape.norm_bias) if has_norm else None
        self.out = Linear(width, config.n_labels, bias=shape.out_bias)
        self.dropout = nn.Dropout(config.dropout or 0.0)

    def take(self, config: HeadConfig) -> None:
        """Labels and dropout of another config that the weights are good for."""
        self.config, self.dropout.p = config, config.dropout or 0.0

    def forward(self, states_ND: Tensor) -> Tensor:
        """Logits NC of classes, or P2 of start and end, in the compute type."""
        if self.dense is not None and self.shape.activation is not None:
            inner_ND = self.dense(self.dropout(states_ND) if self.shape.drop_input else states_ND)
            states_ND = ACTIVATIONS[self.shape.activation](inner_ND)
        if self.norm is not None:
            states_ND = self.norm(states_ND)
        logits_NC: Tensor = self.out(self.dropout(states_ND))
        return logits_NC


def attach_head(model: Any, config: HeadConfig, seed: int) -> TaskHead:
    """Give ``model`` a new head, drawn from ``seed``; one that it has is replaced. The model is changed in place.

    Matrices are normal with the model's ``init_std`` (1 / sqrt(D) where it has none), biases 0, norms 1. A head for
    sentence pairs goes: BERT has one pooler, and it becomes the dense layer of the new head. To use the weights of a
    file, a pooler or a whole head: ``load_model(folder, head=config)``. Raises ``ConfigError`` for spans from a model
    that is not an encoder, and for values out of range.
    """
    _check(model, config)
    _drop_pair_head(model)
    head = put_head(model, config, shape_of(model.config, config.kind))
    weight = next(model.parameters())
    head.to(device=weight.device, dtype=weight.dtype)
    std = getattr(model.config, "init_std", None) or model.config.d_model**-0.5
    init_normal(head, seed, lambda name, parameter: std)
    freeze_outputs(model)
    log.info("a new head for %s: %s", _answers(config), ", ".join(f"task_head.{n}" for n, _ in head.named_parameters()))
    if isinstance(model.config, TransformersConfig):
        log.info("its files stand beside the model's, in the folder task_head: transformers opens the model without it")
    elif saved_as(model.config, config.kind, head.shape)[1] is None:
        log.info("transformers has no class for this model with this head: it is saved in llmkit's own format")
    return head


def put_head(model: Any, config: HeadConfig, shape: HeadShape) -> TaskHead:
    """A head without values, as ``model.task_head``; its dropout is settled."""
    head = TaskHead(model.config.d_model, config.for_model(own_dropout(model)), shape)
    head.train(model.training)
    model.task_head = head
    return head


def head_of(model: Any) -> TaskHead | None:
    """The task head of a model; None where it has none."""
    head: TaskHead | None = getattr(model, "task_head", None)
    return head


def detach_head(model: Any) -> None:
    """Take the task head away, and train the output layers of the language model again. Nothing without a head."""
    if head_of(model) is None:
        return
    log.info("the task head for %s is left aside", _answers(model.task_head.config))
    del model.task_head
    for parameter in _output_layers(model):
        parameter.requires_grad_(True)


def head_architecture(model: Any) -> str | None:
    """The class of ``transformers`` that a model with its head is saved as; None: llmkit's own format."""
    if isinstance(model.config, TransformersConfig):
        return None
    table = saved_as(model.config, model.task_head.config.kind, model.task_head.shape)[1]
    return None if table is None else table.architecture


def freeze_outputs(model: Any) -> None:
    """Take the output layers of the language model out of the training: no task head reads them."""
    for parameter in _output_layers(model):
        parameter.requires_grad_(False)


def own_dropout(model: Any) -> float:
    """The dropout of a model's other layers; of a wrapped model, which has many, the usual one."""
    return float(getattr(model.config, "dropout", USUAL_DROPOUT))


# -- private --------------------------------------------------------------------------------------------------------


def _check(model: Any, config: HeadConfig) -> None:
    if problems := config.problems():
        raise ConfigError("; ".join(f"{name} {what}" for name, what in problems), where="task.labels")
    if config.kind == "span" and model.config.kind != "encoder":
        what = f"spans are read from the states of an encoder, and this is a model of the kind {model.config.kind}"
        raise ConfigError(what, where="model", fix="choose an encoder, or a task that generates")


def _output_layers(model: Any) -> list[Tensor]:
    if not isinstance(model.config, TransformersConfig):
        return [parameter for name, parameter in model.named_parameters() if is_output_layer(name)]
    from llmkit.models.transformers_build import output_matrix

    matrix, table = output_matrix(model.hf), model.hf.get_input_embeddings().weight
    return [parameter for parameter in (matrix.weight, matrix.bias) if parameter is not None and parameter is not table]


def _drop_pair_head(model: Any) -> None:
    if getattr(model, "pooler", None) is None:
        return
    model.pooler, model.pair_head = None, None
    model.config = replace(model.config, pooler=False)
    log.info("the head for sentence pairs is left out: BERT has no place for it beside a task head")


def _answers(config: HeadConfig) -> str:
    return "spans" if config.kind == "span" else f"{config.n_labels} classes"
