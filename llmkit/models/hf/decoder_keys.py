"""What decoders of several families say alike in ``config.json``: rotary positions, windows, and what most leave alone.

Rotary settings stand in ``rope_parameters`` (transformers 5), or in ``rope_theta`` and ``rope_scaling`` (before). Both
are written, for other tools still read the old ones; where both are read, the old object wins, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.models.config import DecoderConfig
from llmkit.models.hf.family import Keys
from llmkit.models.rope_scaling import OPTIONAL, REQUIRED

PLAIN: dict[str, Any] = {
    "norm_position": "pre",
    "parallel_residual": False,
    "rotary_fraction": 1.0,
    "local_rope_theta": None,
    "rope_scaling": None,
    "attention_windows": None,
    "qk_norm": None,
    "scale_attention_by_layer": False,
    "attention_softcap": None,
    "logit_softcap": None,
    "scale_embedding": False,
}


def is_plain(config: DecoderConfig, *but: str, **other: Any) -> bool:
    """Whether the options are at their usual values: but for some that may have any, and others with their own."""
    wanted = {name: value for name, value in PLAIN.items() if name not in but} | other
    scaled = "attention_scale_dim" in but or config.attention_scale_dim in (None, config.head_width)
    return scaled and all(getattr(config, name) == value for name, value in wanted.items())


# -- rotary positions -----------------------------------------------------------------------------------------------

LENGTH = "max_position_embeddings"
THEIRS = {"original_len": "original_max_position_embeddings"}  # the other settings have our names
GENERAL = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
TYPES = {"default": None, **{name: name for name in REQUIRED}}


def read_rotary(keys: Keys, default_len: int, *, fraction: float | None = None) -> dict[str, Any]:
    """The fields that rotary positions decide. ``fraction`` is for families that may rotate a part of each head: the
    share where the file names none."""
    inner = rotary_object(keys)
    theta = inner.number("rope_theta", keys.number("rope_theta", 10000.0))
    scaling, max_seq_len = read_scaling(inner, keys.integer(LENGTH, default_len))
    return {
        "position": "rotary",
        "rope_theta": theta,
        "rotary_fraction": _fraction(keys, inner, fraction),
        "rope_scaling": scaling,
        "max_seq_len": max_seq_len,
    }


def rotary_object(keys: Keys) -> Keys:
    name = "rope_scaling" if keys.raw.get("rope_scaling") else "rope_parameters"
    return keys.inner(name)


def read_scaling(rope: Keys, length: int) -> tuple[dict[str, Any] | None, int]:
    """The scaling in a rotary object and the longest sequence, for a file whose ``max_position_embeddings`` is this.

    With ``dynamic`` that key is the trained length, and some files with ``yarn`` have the trained length there too:
    the factor says how much longer a sequence may be.
    """
    raw = {name: value for name, value in rope.raw.items() if value is not None}
    kind = rope.choice("rope_type" if "rope_type" in raw else "type", "default", TYPES)
    if kind is None:
        return None, length
    names = {THEIRS.get(name, name): name for name in (*REQUIRED[kind], *OPTIONAL.get(kind, ()))}
    for name in sorted(raw.keys() - names.keys() - set(GENERAL)):
        raise rope.error(name, f"is unknown to the rotary type {kind}")
    if kind != "linear":
        raw.setdefault(THEIRS["original_len"], length)
    settings = Keys(raw, rope.where)
    scaling = {ours: _setting(settings, theirs) for theirs, ours in names.items() if theirs in raw}
    original_len = scaling.get("original_len", length)
    if kind == "dynamic" and original_len != length:
        raise rope.error(THEIRS["original_len"], f"is {original_len}, but {LENGTH} is {length}")
    grows = kind in ("dynamic", "yarn") and length <= original_len
    return {"type": kind, **scaling}, int(original_len * scaling.get("factor", 1)) if grows else length


def _setting(settings: Keys, name: str) -> Any:
    if name == "truncate":
        return settings.flag(name, True)
    return settings.integer(name) if name in THEIRS.values() else settings.number(name)


def _fraction(keys: Keys, inner: Keys, default: float | None) -> float:
    places = (inner, keys)
    name = "partial_rotary_factor"
    if default is None:
        for place in places:
            place.expect(name, 1, None)
        return 1.0
    return next((place.number(name) for place in places if place.raw.get(name) is not None), default)


def write_rotary(config: DecoderConfig) -> dict[str, Any]:
    """``rope_scaling`` and the share of each head are there only where they say something."""
    rope = write_scaling(config)
    share = {} if config.rotary_fraction == 1 else {"partial_rotary_factor": config.rotary_fraction}
    theta = {"rope_theta": config.rope_theta}
    old = {} if config.rope_scaling is None else {"rope_scaling": rope}
    return {LENGTH: written_len(config), **theta, **share, "rope_parameters": {**rope, **theta, **share}, **old}


def write_scaling(config: DecoderConfig) -> dict[str, Any]:
    """A rotary object without its theta. The trained length of ``dynamic`` is ``max_position_embeddings``; ``linear``
    has none."""
    scaling: Mapping[str, Any] = config.rope_scaling or {"type": "default"}
    hidden = ("type", "original_len") if scaling["type"] in ("linear", "dynamic") else ("type",)
    settings = {THEIRS.get(name, name): value for name, value in scaling.items() if name not in hidden}
    return {"rope_type": scaling["type"], **settings}


def written_len(config: DecoderConfig) -> int:
    scaling = config.rope_scaling or {}
    length: int = scaling["original_len"] if scaling.get("type") == "dynamic" else config.max_seq_len
    return length


# -- windows --------------------------------------------------------------------------------------------------------

WINDOW, FULL = "sliding_attention", "full_attention"


def window_size(config: DecoderConfig) -> int | None:
    """The window of the layers that have one; None when no layer has."""
    return next((window for window in config.layer_windows if window is not None), None)


def has_one_window(config: DecoderConfig) -> bool:
    """Files know one size for all layers that have a window."""
    return set(config.layer_windows) <= {None, window_size(config)}


def is_uniform(config: DecoderConfig) -> bool:
    """Whether all layers see equally much."""
    return len(set(config.layer_windows)) == 1


def layer_types(config: DecoderConfig) -> list[str]:
    return [FULL if window is None else WINDOW for window in config.layer_windows]


def read_windows(keys: Keys, default_types: Sequence[str]) -> tuple[int | None, ...] | None:
    """``attention_windows`` from ``layer_types`` and ``sliding_window``: the shortest list that repeats."""
    types = keys.raw.get("layer_types") or default_types
    if not isinstance(types, Sequence) or len(types) != len(default_types):
        raise keys.error("layer_types", f"must name the type of each of {len(default_types)} layers")
    for name in types:
        if name not in (WINDOW, FULL):
            raise keys.error("layer_types", f"has {name!r}; llmkit has {WINDOW} and {FULL}")
    if WINDOW not in types:
        return None
    size = keys.integer("sliding_window")
    n = next(n for n in range(1, len(types) + 1) if all(name == types[i % n] for i, name in enumerate(types)))
    return tuple(size if name == WINDOW else None for name in types[:n])


def read_uniform_window(keys: Keys) -> tuple[int | None, ...] | None:
    """Of families in which all layers have the window of ``sliding_window``, or none has."""
    return None if keys.raw.get("sliding_window") is None else (keys.integer("sliding_window"),)
