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
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    device: str
    n_threads: Annotated[int | None, Range(1)]
    compile: Literal["auto", True, False]
    fp32_matmul: Literal["auto", "highest", "high", "medium"]
    attention: Literal["auto", "sdpa", "matmul"]
    memory: Literal["fast", "low"]
    log_every: Annotated[int, Range(1)]
    eval_every: Annotated[int | None, Range(1)]
    eval_batch_size: Annotated[int | None, Range(1)]
    save_every: Annotated[int | None, Range(1)]
    keep_last: Annotated[int, Range(2)]
    keep_best: bool
    best_metric: str | None  # None: ``val/loss``, or what the task says
    patience: Annotated[int | None, Range(1)]
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
class TaskDataConfig:
    """Where the rows of a task come from (``docs/finetune.md``)."""

    path: str | list[str] | None  # None: the demo set of the task
    target_path: str | None  # line-aligned files: line n of path belongs to line n of this one
    val_path: str | list[str] | None
    val_target_path: str | None
    val_fraction: Annotated[float, Range(0, 0.5)]
    columns: dict[str, str]  # role -> column, where the usual spellings are not enough
    seq_len: Annotated[int | None, Range(8)]  # tokens a row; None: the model's max_seq_len
    long_rows: Literal["error", "drop", "truncate"]
    max_bad_fraction: Annotated[float, Range(0, 1)]
    max_rows: Annotated[int | None, Range(1)]
    max_answers: Annotated[int | None, Range(1)]


@dataclass(frozen=True)
class FreezeConfig:
    """Parts of the model that fine-tuning leaves as they are."""

    n_layers: Annotated[int, Range(0)]  # counted from the input
    embeddings: bool


@dataclass(frozen=True)
class LossConfig:
    """What is added to the plain loss of a task."""

    label_smoothing: Annotated[float, Range(0, 0.99)]
    r_drop: Annotated[float, Range(0)]  # weight of the symmetric divergence between two dropout passes; 0 is off
    chunk_size: Annotated[int | None, Range(1)]


@dataclass(frozen=True)
class GenerationConfig:
    """How text is written. Temperature 0 is greedy; ``n_beams`` above 1 searches, and draws nothing by chance."""

    max_new_tokens: Annotated[int, Range(1)]
    temperature: Annotated[float, Range(0)]
    top_k: Annotated[int | None, Range(1)]
    top_p: Annotated[float | None, Range(0, 1)]
    repetition_penalty: Annotated[float, Range(1e-6)]
    no_repeat_ngram_size: Annotated[int | None, Range(1)]
    n_beams: Annotated[int, Range(1)]
    length_penalty: float
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
