"""Running sums between two log points, and the row they make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmkit.engine.evaluate import COUNTED
from llmkit.engine.throughput import mfu, peak_memory_gib, tokens_per_second

_RUNNING = ("sums", "objective", "n_tokens", "n_computed", "n_steps", "seconds", "data_seconds")  # and the counts


class StepSums(Protocol):
    """A step over all micro-batches and ranks (``trainer.StepResult``)."""

    @property
    def sums(self) -> dict[str, float]: ...
    @property
    def counts(self) -> dict[str, int]: ...
    @property
    def objective(self) -> float: ...
    @property
    def n_tokens(self) -> int: ...
    @property
    def n_computed(self) -> int: ...


@dataclass
class Meter:
    """Adds steps up; ``flush`` gives the row and starts over.

    ``metrics`` is the objective's. ``flops_per_token`` is the model's training cost; ``peak_flops`` is one device's
    dense peak in FLOP/s, None when not known, and then no MFU is shown.
    """

    metrics: Callable[[dict[str, float], dict[str, int]], dict[str, float]]
    flops_per_token: float
    peak_flops: float | None
    n_devices: int
    device_type: str
    sums: dict[str, float] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    objective: float = 0.0  # added up over steps
    n_tokens: int = 0
    n_computed: int = 0
    n_steps: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0

    def add(self, step: StepSums, seconds: float, data_seconds: float) -> None:
        """One step's sums and counts over all ranks, its wall time and the part of it spent on data."""
        for name, value in step.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts.update(step.counts)
        self.objective += step.objective
        self.n_tokens += step.n_tokens
        self.n_computed += step.n_computed
        self.n_steps += 1
        self.seconds += seconds
        self.data_seconds += data_seconds

    def state(self) -> dict[str, Any]:
        """What was added up since the last ``flush``, JSON-ready."""
        return {name: getattr(self, name) for name in _RUNNING} | {"counts": dict(self.counts)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on adding to ``state``."""
        for name in _RUNNING:
            setattr(self, name, state[name])
        self.counts = Counter(state["counts"])

    def flush(self) -> dict[str, float]:
        """``train/...`` and ``perf/...`` since the last call."""
        rate = tokens_per_second(self.n_tokens, self.seconds)
        row = {f"train/{name}": value for name, value in self.metrics(self.sums, dict(self.counts)).items()}
        row |= {
            "train/objective": self.objective / max(self.n_steps, 1),
            **{f"train/{COUNTED[name]}": n for name, n in self.counts.items() if n or name == "token"},
            "perf/tokens_per_second": rate,
            "perf/real_token_fraction": self.n_tokens / max(self.n_computed, 1),
            "perf/step_seconds": self.seconds / max(self.n_steps, 1),
            "perf/data_wait_fraction": self.data_seconds / self.seconds if self.seconds else 0.0,
            "perf/peak_memory_gib": peak_memory_gib(self.device_type),
        }
        if self.peak_flops is not None:
            row["perf/mfu"] = mfu(self.flops_per_token, rate, self.peak_flops, self.n_devices)
        self.sums, self.counts, self.objective = {}, Counter(), 0.0
        self.n_tokens = self.n_computed = self.n_steps = 0
        self.seconds = self.data_seconds = 0.0
        return row
