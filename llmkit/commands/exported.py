"""What is exported, as its check and its card see it, and what they tell of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from llmkit.errors import CheckpointError
from llmkit.interfaces import ModelConfig, Tokenizer
from llmkit.models.head_config import HeadConfig
from llmkit.models.heads import head_architecture, head_of
from llmkit.models.hf.task_heads import is_output_layer
from llmkit.tokenizers.chat_template import ChatTemplate

TEXTS = (
    "The cat sat on the mat.",
    "  two spaces, then\na new line\n\n\tand a tab",
    "Naïve café — “quotes” 123,456.78",
    "def f(x):\n    return x ** 2  # code",
    "東京は晴れ。 Привет, мир! שלום 🙂👍🏽",
    "a" * 50,
    "",
)
NO_ARCHITECTURE = "no Hugging Face architecture computes this model"
_NOT_PUBLISHED = "nothing was published; please report it with `llmkit doctor`, the architecture and its config.json"


@dataclass(frozen=True)
class Subject:
    """The model that is exported, without its weights."""

    config: ModelConfig
    tokenizer: Tokenizer
    head: HeadConfig | None
    architecture: str | None  # the class of transformers that computes it; None: llmkit alone does
    n_params: int  # that are written, each once

    @property
    def why_own(self) -> str:
        """Why there is no class of transformers."""
        is_head = self.head is not None and self.config.hf_architecture() is not None
        return "no class of transformers computes this task head" if is_head else NO_ARCHITECTURE

    @classmethod
    def of(cls, model: Any, tokenizer: Tokenizer) -> Subject:
        """Of a model as it is in memory."""
        head, config = head_of(model), model.config
        if head is None:
            return cls(config, tokenizer, None, config.hf_architecture(), config.n_params())
        architecture = head_architecture(model)
        named = {name: parameter.numel() for name, parameter in model.named_parameters()}
        written = [size for name, size in named.items() if architecture is None or not is_output_layer(name)]
        return cls(config, tokenizer, head.config, architecture, sum(written))


@dataclass(frozen=True)
class Exported:
    """What was written, and what there is to compare it with."""

    folder: Path
    file: str | None  # the GGUF file in the folder; None for a Hugging Face folder
    dtype: str
    subject: Subject
    template: ChatTemplate | None
    source: list[Tensor]  # logits of the model before its numbers were rounded, as ``Reading.logits``

    @property
    def model(self) -> Path:
        return self.folder if self.file is None else self.folder / self.file


class Finding(NamedTuple):
    """One comparison, in words."""

    name: str
    result: str


class Reading(NamedTuple):
    """What the target's library makes of the files."""

    library: str
    logits: list[Tensor]  # of the probe; in each the last dimension is what is chosen from
    start_id: int | None  # what the greedy text of an encoder-decoder begins with
    new_ids: list[int]  # greedy; none of an encoder, and of a model with a task head
    findings: list[Finding]  # made on the way


def answers_of(head: HeadConfig) -> str:
    """What a task head answers with, in words."""
    return "spans of a text" if head.kind == "span" else f"{head.n_labels} classes: {', '.join(head.labels)}"


def mismatch(exported: Exported, what: str) -> CheckpointError:
    """The error of a check that fails; whoever catches it publishes nothing."""
    return CheckpointError(f"the export failed its check: {what}", where=exported.model.name, fix=_NOT_PUBLISHED)


def differing(what: str) -> CheckpointError:
    """The error where the files are read alike, and compute something else."""
    return CheckpointError(what, fix=_NOT_PUBLISHED)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
