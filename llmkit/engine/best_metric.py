"""Which metric of an evaluation picks the best checkpoint, and in which direction it is better."""

from __future__ import annotations

import math
from dataclasses import dataclass

LOWER_IS_BETTER = ("loss", "ppl", "pseudo_ppl", "bpb", "pair_loss")


@dataclass(frozen=True)
class BestMetric:
    """``name`` as it stands in ``metrics.jsonl``, such as ``val/loss`` or ``val/accuracy``."""

    name: str

    @classmethod
    def of(cls, chosen: str | None, usual: str = "loss") -> BestMetric:
        """The metric that ``engine.best_metric`` names, with or without ``val/``; null takes the usual one."""
        name = chosen or usual
        return cls(name if "/" in name else f"val/{name}")

    @property
    def lower_is_better(self) -> bool:
        return self.name.rpartition("/")[2] in LOWER_IS_BETTER

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether ``value`` beats ``best``. What is not a number beats nothing, and anything beats none."""
        if not math.isfinite(value):
            return False
        return best is None or (value < best if self.lower_is_better else value > best)
