"""Which of our modules stand behind the module names of an adapter file. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmkit.interfaces import ModelConfig
from llmkit.models.hf.families import FAMILIES, family_named, family_of
from llmkit.models.hf.family import Family
from llmkit.models.hf.rows import Row
from llmkit.models.hf.task_heads import MODULE, table_of
from llmkit.models.hf.weight_files import read_json
from llmkit.models.transformers_config import TransformersConfig

WEIGHT = ".weight"
WRAPPED = "hf."  # where a model of transformers stands in ours
LORA = (".lora_A", ".lora_B", ".lora_magnitude")  # endings of our own parameters
NUMBER = re.compile(r".*\.\d+\.")


def rows_of(model: Any, family: Family | None) -> list[Row]:
    """A row for every tensor that a checkpoint of ``model`` has without its adapters; None is a wrapped model."""
    names = [name for name, _ in model.named_parameters() if not name.endswith(LORA)]
    if family is None:
        return [Row(name.removeprefix(WRAPPED), (name,)) for name in names]
    head = getattr(model, MODULE, None)
    table = None if head is None else table_of(family, head.config.kind)
    in_head = [name for name in names if name.startswith(f"{MODULE}.")]
    of_head = [Row(name, (name,)) for name in in_head] if table is None else table.rows(in_head)
    return [*family.rows(model.config, [name for name in names if name not in in_head]), *of_head]


def families(config: ModelConfig, base: str | Path | None = None) -> list[Family | None]:
    """Whose names an adapter of a model may have: the family of the folder ``base``, else the one it is saved as, and
    after it all others of its kind."""
    if isinstance(config, TransformersConfig):
        return [None]
    if base is not None and (Path(base) / "config.json").is_file():
        path = Path(base) / "config.json"
        return [family_named(read_json(path).get("model_type"), f"{path}:model_type")]
    first = family_of(config)
    return [first, *(other for other in FAMILIES if other is not first and isinstance(config, other.config))]


def tied_names(model: Any, family: Family | None, rows: Iterable[Row]) -> dict[str, str]:
    """Tensors that are others under a second name -> those others. Every module of an adapter file has its own copy."""
    if getattr(model, MODULE, None) is not None:
        return {}
    if family is not None:
        own = {row.name for row in rows}
        return {copy: name for copy, name in family.copies.items() if copy not in own}
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.hf.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            found[name] = first[id(parameter)]
    return found


def linear_rows(rows: Iterable[Row], modules: Iterable[str]) -> dict[str, Row]:
    """Their module name -> the row of its weight, for rows that hold weights of ``modules`` and nothing else."""
    weights = {f"{name}{WEIGHT}" for name in modules}
    return {
        row.name.removesuffix(WEIGHT): row
        for row in rows
        if row.name.endswith(WEIGHT) and all(part in weights for part in row.parts)
    }


def compress(values: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """``values`` by endings of module names, without the numbers of layers, where an ending says all.

    ``known`` are all names that an ending could mean; one that would mean another module, or two values, is not used.
    """
    known, made = list(known), {}
    for name, value in values.items():
        ending = NUMBER.sub("", name)
        meant = [other for other in known if ends_with(other, ending)]
        exact = all(other in values and values[other] == value for other in meant)
        made[ending if exact else name] = value
    return made


def ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def value_for(name: str, patterns: Mapping[str, Any], otherwise: Any) -> Any:
    """The first pattern that means a module. They are read as names or endings of names; ``^`` begins a whole name."""
    for pattern, value in patterns.items():
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if name == plain or (not pattern.startswith("^") and ends_with(name, plain)):
            return value
    return otherwise
