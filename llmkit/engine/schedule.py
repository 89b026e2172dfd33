"""Learning-rate schedules: pure functions of the step, so there is no scheduler state to save or to get wrong.

Every schedule first rises linearly over ``warmup_steps`` updates: update ``s`` has the factor ``s / warmup_steps``, so
update ``warmup_steps`` is the first at the peak. The last update, ``max_steps``, has the factor ``min_lr_ratio``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class _Warmup:
    warmup_steps: int

    def factor(self, step: int, max_steps: int) -> float:
        """Multiplier of the peak learning rate for update ``step`` in ``1 .. max_steps``."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        return self._after_warmup(step, max_steps)

    def _after_warmup(self, step: int, max_steps: int) -> float:
        return 1.0

    def problems(self) -> list[tuple[str, str]]:
        return [("warmup_steps", "must be at least 0")] if self.warmup_steps < 0 else []


@dataclass(frozen=True)
class Constant(_Warmup):
    """The peak rate to the end."""


@dataclass(frozen=True)
class InverseSqrt(_Warmup):
    """``sqrt(w / s)`` with ``w = max(warmup_steps, 1)`` (Vaswani et al. 2017, section 5.3)."""

    def _after_warmup(self, step: int, max_steps: int) -> float:
        return math.sqrt(max(self.warmup_steps, 1) / step)


@dataclass(frozen=True)
class _Decay(_Warmup):
    min_lr_ratio: float

    def _progress(self, step: int, first_step: int, max_steps: int) -> float:
        """0 at ``first_step``, 1 at ``max_steps``."""
        return (step - first_step) / max(max_steps - first_step, 1)

    def problems(self) -> list[tuple[str, str]]:
        bad_ratio = not 0 <= self.min_lr_ratio <= 1
        return super().problems() + ([("min_lr_ratio", "must lie in [0, 1]")] if bad_ratio else [])


@dataclass(frozen=True)
class Linear(_Decay):
    """A straight line from the peak down to ``min_lr_ratio``."""

    def _after_warmup(self, step: int, max_steps: int) -> float:
        return 1 - (1 - self.min_lr_ratio) * self._progress(step, self.warmup_steps, max_steps)


@dataclass(frozen=True)
class Cosine(_Decay):
    """Half a cosine from the peak down to ``min_lr_ratio`` (Loshchilov and Hutter 2017, equation 5, one cycle)."""

    def _after_warmup(self, step: int, max_steps: int) -> float:
        cosine = math.cos(math.pi * self._progress(step, self.warmup_steps, max_steps))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + cosine)


@dataclass(frozen=True)
class WSD(_Decay):
    """Warm-up, stable, decay: the peak rate, then a straight line over the last ``decay_fraction`` of the run.

    Source: Hu et al. 2024 (MiniCPM), section 4; the linear shape of the decay from Hägele et al. 2024.
    """

    decay_fraction: float

    def _after_warmup(self, step: int, max_steps: int) -> float:
        decay_from = max(max_steps - round(self.decay_fraction * max_steps), self.warmup_steps)
        if step <= decay_from:
            return 1.0
        return 1 - (1 - self.min_lr_ratio) * self._progress(step, decay_from, max_steps)

    def problems(self) -> list[tuple[str, str]]:
        bad = not 0 < self.decay_fraction <= 1
        return super().problems() + ([("decay_fraction", "must lie in (0, 1]")] if bad else [])
