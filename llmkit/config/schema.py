"""One root dataclass per command: which sections its configuration has.

Closed sections are the dataclasses of ``llmkit.settings``. Open parts (model, objective, tokenizer, optim, schedule,
trackers, callbacks) are ``_target_`` nodes; their fields live in the class that the node names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from llmkit.settings import (
    CardConfig,
    DataConfig,
    DeviceConfig,
    EngineConfig,
    FreezeConfig,
    GenerationConfig,
    LossConfig,
    Range,
    RunConfig,
    TaskDataConfig,
)

Node = Mapping[str, Any]  # a ``_target_`` node, checked against the class it names


@dataclass(frozen=True)
class PretrainConfig:
    """``llmkit pretrain``"""

    run: RunConfig
    init: str | None
    add_tokens: list[str]
    model: Node
    objective: Node
    tokenizer: Node
    data: DataConfig
    optim: Node
    schedule: Node
    engine: EngineConfig
    callbacks: Mapping[str, Node]
    tracking: Mapping[str, Node]


@dataclass(frozen=True)
class FinetuneConfig:
    """``llmkit finetune``"""

    run: RunConfig
    init: str | None
    add_tokens: list[str]
    task: Node
    data: TaskDataConfig
    model: Node | None  # None: where init is null too, a small one of the kind the task is usually done with
    tokenizer: Node | None  # None: as model
    adapter: Node | None
    freeze: FreezeConfig
    loss: LossConfig
    generation: GenerationConfig
    optim: Node
    schedule: Node
    engine: EngineConfig
    callbacks: Mapping[str, Node]
    tracking: Mapping[str, Node]


@dataclass(frozen=True)
class EvaluateTaskConfig:
    """``llmkit evaluate task=...``"""

    init: str
    task: Node
    data: TaskDataConfig
    generation: GenerationConfig
    n_examples: Annotated[int, Range(0)]
    engine: DeviceConfig


@dataclass(frozen=True)
class PredictConfig:
    """``llmkit predict``"""

    init: str
    task: Node | None  # None: the one the model was fine-tuned for
    data: TaskDataConfig
    generation: GenerationConfig
    engine: DeviceConfig


@dataclass(frozen=True)
class ChatConfig:
    """``llmkit chat``"""

    init: str
    system: str | None
    generation: GenerationConfig
    engine: DeviceConfig


@dataclass(frozen=True)
class ShowConfig:
    """``llmkit data show``"""

    init: str | None
    model: Node | None
    tokenizer: Node | None
    task: Node
    data: TaskDataConfig
    n_rows: Annotated[int, Range(1)]


@dataclass(frozen=True)
class PrepareConfig:
    """``llmkit prepare``"""

    init: str | None
    add_tokens: list[str]
    objective: Node
    tokenizer: Node
    data: DataConfig


@dataclass(frozen=True)
class EvaluateConfig:
    """``llmkit evaluate``"""

    init: str
    data: DataConfig
    objective: Node | None  # None: what the run was trained with, else the usual one of the model's kind
    pseudo_ppl_tokens: Annotated[int, Range(0)]
    engine: DeviceConfig


@dataclass(frozen=True)
class GenerateConfig:
    """``llmkit generate``"""

    init: str
    candidates: Annotated[int, Range(1)]
    generation: GenerationConfig
    engine: DeviceConfig


@dataclass(frozen=True)
class ExportConfig:
    """``llmkit export``"""

    init: str
    format: Literal["hf", "gguf"]
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"]
    out: str
    card: CardConfig


ROOTS: dict[str, type] = {
    "pretrain": PretrainConfig,
    "prepare": PrepareConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "export": ExportConfig,
    "finetune": FinetuneConfig,
    "evaluate_task": EvaluateTaskConfig,
    "predict": PredictConfig,
    "chat": ChatConfig,
    "data_show": ShowConfig,
}

# The sections a command's configuration is checked against. ``prepare`` takes whatever the ``pretrain`` command that it
# prepares takes, and reads its part.
CHECKED_AS = ROOTS | {"prepare": PretrainConfig}
