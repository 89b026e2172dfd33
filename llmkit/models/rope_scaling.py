"""How rotary positions are stretched beyond the length a model was trained for: the settings and their checks.

``type`` is ``linear`` (Chen et al. 2023: positions divided by the factor), ``dynamic`` (a base that grows with the
sequence), ``llama3`` (Dubey et al. 2024: long waves only) or ``yarn`` (Peng et al. 2023). Free of torch; the formulas
are in ``rope.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_len"),
    "llama3": ("factor", "original_len", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_len"),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "linear": ("original_len",),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}
LEAST = {"factor": 1.0, "original_len": 1.0}  # the others must be above 0
YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # turns over the trained length; Peng et al. 2023, section 3.2


def scaling_faults(scaling: Mapping[str, Any], width: int) -> list[str]:
    """What is wrong with the settings, for heads of which ``width`` dimensions are rotated."""
    kind = scaling.get("type")
    if kind not in REQUIRED:
        return [f"needs a type: one of {', '.join(REQUIRED)}"]
    known = (*REQUIRED[kind], *OPTIONAL.get(kind, ()))
    faults = [f"of type {kind} needs {name}" for name in REQUIRED[kind] if name not in scaling]
    faults += [f"of type {kind} has no {name}" for name in scaling if name not in ("type", *known)]
    faults += [f"has a wrong {name}: {what}" for name in known if name in scaling and (what := _fault(name, scaling))]
    return faults or _contradictions(scaling, width)


def _fault(name: str, scaling: Mapping[str, Any]) -> str:
    value = scaling[name]
    if name == "truncate":
        return "" if isinstance(value, bool) else "it must be true or false"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "it must be a number"
    if name == "original_len" and not isinstance(value, int):
        return "it must be a whole number"
    least = LEAST.get(name)
    if least is not None:
        return "" if value >= least else f"it must be at least {least:g}"
    return "" if value > 0 else "it must be above 0"


def _contradictions(scaling: Mapping[str, Any], width: int) -> list[str]:
    settings = {**YARN_BETAS, **scaling}
    if scaling["type"] == "llama3" and not settings["low_freq_factor"] < settings["high_freq_factor"]:
        return ["needs a low_freq_factor below its high_freq_factor"]
    if scaling["type"] == "yarn" and not settings["beta_slow"] < settings["beta_fast"]:
        return ["needs a beta_slow below its beta_fast"]
    if scaling["type"] == "dynamic" and width < 4:
        return ["of type dynamic needs at least 4 rotated dimensions a head"]
    return []
