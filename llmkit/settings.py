"""The closed sections of a configuration, as the parts that use them see them.

No field has a default here: defaults live in ``recipes/``. This module imports nothing of llmkit and stays free of
torch. ``Range`` marks a field's allowed values; ``config/check.py`` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Annotated, Literal


@dataclass(frozen=True)
class Range:
    """Allowed values of a field, ends included: ``Annotated[int, Range(1)]``."""

    low: float
    high: float = inf


@dataclass(frozen=True)
class RunConfig:
    """One training execution and its folder ``root/name``."""

    name: str
    root: str
    seed: Annotated[int, Range(0, 2**63 - 1)]
    resume: Literal["auto", "never", "must"]


@dataclass(frozen=True)
class EngineConfig:
    """The training loop. One of ``max_steps``, ``max_tokens``, ``max_epochs`` must be set; the smallest wins."""

    max_steps: Annotated[int | None, Range(1)]
    max_tokens: Annotated[int | None, Range(1)]
    max_epochs: Annotated[float | None, Range(0)]
    max_hours: Annotated[float | None, Range(0)]
    micro_batch_size: Annotated[int, Range(1)]
    grad_accum_steps: Annotated[int, Range(1)]
    max_grad_norm: Annotated[float | None, Range(0)]
    precision: Literal["fp32", "bf16", "fp16"]
    device: str
    n_threads: Annotated[int | None, Range(1)]
    compile: bool
    activation_checkpointing: bool
    log_every: Annotated[int, Range(1)]
    eval_every: Annotated[int | None, Range(1)]
    eval_batch_size: Annotated[int | None, Range(1)]
    save_every: Annotated[int | None, Range(1)]
    keep_last: Annotated[int, Range(2)]
    keep_best: bool
    on_nonfinite: Literal["stop", "skip"]
    max_skipped_steps: Annotated[int, Range(1)]
    timeout_minutes: Annotated[float, Range(0)]


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes token windows (``docs/data.md``)."""

    path: str | list[str]
    weights: list[float] | None
    val_path: str | list[str] | None
    val_fraction: Annotated[float, Range(0, 0.5)]
    old_val_path: str | list[str] | None
    text_field: str
    max_document_bytes: Annotated[int, Range(64)]
    max_line_bytes: Annotated[int, Range(1024)]
    max_bad_fraction: Annotated[float, Range(0, 1)]
    deduplicate: bool
    seq_len: Annotated[int | None, Range(2)]  # None: see ``window``
    n_workers: Annotated[int | None, Range(1)]
    cache_dir: str | None

    def window(self, max_seq_len: int) -> int:
        """Tokens per sequence for a model that takes ``max_seq_len``."""
        return max_seq_len if self.seq_len is None else self.seq_len


@dataclass(frozen=True)
class GenerationConfig:
    """How text is sampled. Temperature 0 is greedy."""

    max_new_tokens: Annotated[int, Range(1)]
    temperature: Annotated[float, Range(0)]
    top_k: Annotated[int | None, Range(1)]
    top_p: Annotated[float | None, Range(0, 1)]
    repetition_penalty: Annotated[float, Range(1e-6)]
    stop: list[str]
    seed: Annotated[int, Range(0, 2**63 - 1)]
    use_cache: bool


@dataclass(frozen=True)
class DeviceConfig:
    """Where a command that does not train runs its model."""

    device: str
    precision: Literal["fp32", "bf16", "fp16"]
    n_threads: Annotated[int | None, Range(1)]
    micro_batch_size: Annotated[int, Range(1)]


@dataclass(frozen=True)
class CardConfig:
    """What a model card says that no run knows. None: what the model started from says, else "not stated"."""

    license: str | None
    data_license: str | None
    language: str | None
