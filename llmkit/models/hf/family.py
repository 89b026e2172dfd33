"""What a family of Hugging Face checkpoints is to llmkit: two ways for the config, one table for the tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from llmkit.errors import CheckpointError
from llmkit.interfaces import ModelConfig
from llmkit.models.hf.rows import Row, Stack

log = logging.getLogger("llmkit.models")


@dataclass(frozen=True)
class Family:
    """A family's table. ``fits``, ``write`` and ``read`` deal in objects of the class ``config``."""

    model_types: tuple[str, ...]  # read as this family; the first one is written
    architecture: str | None  # class name in transformers
    config: type
    fits: Callable[[Any], bool]
    write: Callable[[Any], dict[str, Any]]
    read: Callable[[Keys], ModelConfig]
    outer_rows: tuple[Row, ...] = ()
    stacks: tuple[Stack, ...] = ()
    prefix: str = ""  # of the backbone; older files leave it out
    unprefixed: tuple[str, ...] = ("lm_head.",)  # beginnings of the tensors outside of the backbone
    ignored: tuple[str, ...] = ()  # endings of tensors that are constants, not weights
    heads: tuple[str, ...] = ()  # beginnings of our parameters in the output head; new where a file has none of them
    left_aside: tuple[str, ...] = ()  # beginnings of tensors that belong to other heads; they are named and not read
    zero_biases: bool = False  # the architecture always has biases: a model without them writes zeros
    own_names: bool = False  # every parameter under its own name; then there are no rows here
    copies: Mapping[str, str] = field(default_factory=dict)  # tensors that some files repeat -> the row they equal
    ties_absent: tuple[str, ...] = ()  # rows named in ``copies`` that are filled with what they would repeat if absent
    old_endings: Mapping[str, str] = field(default_factory=dict)  # of tensors in the first files -> what they are now
    for_padding: Callable[[int | None], Family] | None = None  # the same family for a pad id, where that changes it

    def rows(self, config: ModelConfig, present: Sequence[str]) -> list[Row]:
        """The tensors of a checkpoint of ``config``, whose own parameters are named ``present``."""
        if self.own_names:
            return [Row(name, (name,)) for name in present]
        known, n_heads = set(present), getattr(config, "n_heads", 0)
        rows = [row for row in self.outer_rows if row.parts[0] in known or self._kept(row)]
        for stack in self.stacks:
            for block in range(getattr(config, stack.n_blocks)):
                for row in stack.rows:
                    parts = tuple(part.format(block) for part in row.parts)
                    if parts[0] in known or self._kept(row):
                        name, heads = row.name.format(block), n_heads if row.interleaved else 0
                        rows.append(replace(row, name=name, parts=parts, heads=heads))
        return rows

    def _kept(self, row: Row) -> bool:
        return self.zero_biases and row.parts[0].endswith(".bias")


@dataclass(frozen=True)
class Keys:
    """Typed reading of a ``config.json``: a value of the wrong kind is a ``CheckpointError`` with file and key."""

    raw: dict[str, Any]
    where: str = field(default="config.json")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name, default)
        if value is None or isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, f"must be an integer, got {value!r}")
        return value

    def integer_or(self, name: str, otherwise: int) -> int:
        """For keys that may be null."""
        return otherwise if self.raw.get(name) is None else self.integer(name)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(name, f"must be a number, got {value!r}")
        return float(value)

    def number_or_none(self, name: str) -> float | None:
        return None if self.raw.get(name) is None else self.number(name)

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, got {value!r}")
        return value

    def choice(self, name: str, default: str, meanings: dict[str, Any]) -> Any:
        """The meaning of a word; other words are computations llmkit does not have."""
        value = self.raw.get(name, default)
        if not isinstance(value, str) or value not in meanings:
            raise self.error(name, f"is {value!r}; llmkit has {', '.join(meanings)}")
        return meanings[value]

    def expect(self, name: str, *allowed: Any) -> None:
        """A key that would change the computation must be absent or have one of these values."""
        if name in self.raw and self.raw[name] not in allowed:
            raise self.error(name, f"is {self.raw[name]!r}; llmkit computes only {' or '.join(map(repr, allowed))}")

    def with_defaults(self, **values: Any) -> Keys:
        """The same keys, and these where the file does not have them (it may have them as null)."""
        return Keys({**values, **self.raw}, self.where)

    def inner(self, name: str) -> Keys:
        """The keys of an object in this one; absent or null is empty."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return Keys(value or {}, f"{self.where}:{name}")

    def error(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{name} {what}", where=f"{self.where}:{name}")


def one_dropout(keys: Keys, names: Sequence[str], default: float) -> float:
    """The first of several probabilities, for llmkit has one for all places; a file that says another is named once."""
    first = keys.number(names[0], default)
    said = {names[0]: first} | {name: keys.number(name) for name in names if name in keys.raw}
    if len(set(said.values())) > 1:
        warn_once(f"{keys.where}: {said}; all places will use the first")
    return first


@cache
def warn_once(what: str) -> None:
    """Opening a model reads its configuration more than once."""
    log.warning(what)
