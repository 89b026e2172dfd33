"""Settings of an adapter: small matrices that are trained beside frozen ones. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

ALL_LINEAR = "all_linear"


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters ``W x + s B A x`` (Hu et al. 2021, "LoRA", section 4.1).

    ``s = alpha / r``, or with ``use_rslora`` ``alpha / sqrt(r)`` (Kalajdzievski 2023, "rsLoRA", equation 3), so that a
    larger rank does not make the update smaller. ``use_dora``: length and direction of every row of the matrix are
    trained apart (Liu et al. 2024, "DoRA", equation 5). ``targets``: names of our modules or endings of them (``q``,
    ``attention.q``); ``all_linear`` alone is every matrix but the heads.
    """

    r: int
    alpha: float
    dropout: float
    targets: list[str]
    use_rslora: bool
    use_dora: bool
    train_embeddings: bool
    train_head: bool

    def scale(self, r: int) -> float:
        """What ``B A`` of rank ``r`` is multiplied with."""
        return float(self.alpha / (r**0.5 if self.use_rslora else r))

    def problems(self) -> list[tuple[str, str]]:
        found = []
        if self.r < 1:
            found.append(("r", "must be at least 1"))
        if not self.alpha > 0:
            found.append(("alpha", "must be above 0"))
        if not 0 <= self.dropout < 1:
            found.append(("dropout", "must lie in [0, 1)"))
        if not self.targets or not all(self.targets):
            found.append(("targets", "must name modules, or be [all_linear]"))
        if ALL_LINEAR in self.targets and len(self.targets) > 1:
            found.append(("targets", "must be [all_linear] alone, or names of modules"))
        return found
