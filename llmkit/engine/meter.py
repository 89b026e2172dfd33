"""Running sums between two log points, and the row they make."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmkit.engine.throughput import mfu, peak_memory_gib, tokens_per_second


@dataclass
class Meter:
    """Adds steps up; ``flush`` gives the row and starts over.

    ``flops_per_token`` is the model's training cost; ``peak_flops`` is one device's dense peak in FLOP/s, None when not
    known, and then no MFU is shown.
    """

    flops_per_token: float
    peak_flops: float | None
    n_devices: int
    device_type: str
    sums: dict[str, float] = field(default_factory=dict)
    n_targets: int = 0
    n_tokens: int = 0
    n_steps: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0

    def add(self, sums: dict[str, float], n_targets: int, n_tokens: int, seconds: float, data_seconds: float) -> None:
        """One step: summed losses over all ranks, counts over all ranks, wall time and the part spent on data."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.n_targets += n_targets
        self.n_tokens += n_tokens
        self.n_steps += 1
        self.seconds += seconds
        self.data_seconds += data_seconds

    def flush(self) -> dict[str, float]:
        """``train/...`` per target and ``perf/...`` since the last call."""
        per_target = {name: value / max(self.n_targets, 1) for name, value in self.sums.items()}
        rate = tokens_per_second(self.n_tokens, self.seconds)
        row = {"train/loss": per_target.pop("nll"), "train/objective": per_target.pop("loss")}
        row |= {f"train/{name}": value for name, value in per_target.items()}
        row |= {
            "train/n_targets": self.n_targets,
            "perf/tokens_per_second": rate,
            "perf/step_seconds": self.seconds / max(self.n_steps, 1),
            "perf/data_wait_fraction": self.data_seconds / self.seconds if self.seconds else 0.0,
            "perf/peak_memory_gib": peak_memory_gib(self.device_type),
        }
        if self.peak_flops is not None:
            row["perf/mfu"] = mfu(self.flops_per_token, rate, self.peak_flops, self.n_devices)
        self.sums, self.n_targets, self.n_tokens, self.n_steps = {}, 0, 0, 0
        self.seconds = self.data_seconds = 0.0
        return row
