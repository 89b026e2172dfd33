"""What a family of Hugging Face checkpoints is to llmkit: two ways for the config, one table for the tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmkit.errors import CheckpointError
from llmkit.interfaces import ModelConfig


@dataclass(frozen=True)
class Row:
    """One tensor of a file: our tensors stacked along their first axis, then transposed where the file stores it so.

    ``before`` rows of no use stand before ours, zeros where we write them. ``lifted``: the file has an axis of length 1
    in front.
    """

    name: str
    parts: tuple[str, ...]
    transposed: bool = False
    before: int = 0
    lifted: bool = False


@dataclass(frozen=True)
class Stack:
    """Equal blocks. ``n_blocks`` is the config's field with their number; ``{}`` in a row stands for the block's."""

    n_blocks: str
    rows: tuple[Row, ...]


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
    zero_biases: bool = False  # the architecture always has biases: a model without them writes zeros
    own_names: bool = False  # every parameter under its own name; then there are no rows here
    copies: Mapping[str, str] = field(default_factory=dict)  # tensors that some files repeat -> the row they equal
    old_endings: Mapping[str, str] = field(default_factory=dict)  # of tensors in the first files -> what they are now
    for_padding: Callable[[int | None], Family] | None = None  # the same family for a pad id, where that changes it

    def rows(self, config: ModelConfig, present: Sequence[str]) -> list[Row]:
        """The tensors of a checkpoint of ``config``, whose own parameters are named ``present``."""
        if self.own_names:
            return [Row(name, (name,)) for name in present]
        rows = [row for row in self.outer_rows if row.parts[0] in present or self._kept(row)]
        for stack in self.stacks:
            for block in range(getattr(config, stack.n_blocks)):
                for row in stack.rows:
                    parts = tuple(part.format(block) for part in row.parts)
                    if parts[0] in present or self._kept(row):
                        rows.append(Row(row.name.format(block), parts, row.transposed))
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

    def rope_theta(self) -> float:
        """From ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
        rope: Any = self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise self.error("rope_parameters", "must be an object")
        inner = Keys(rope, f"{self.where}:rope_parameters")
        inner.expect("rope_type", "default")
        inner.expect("type", "default")
        inner.expect("partial_rotary_factor", 1, None)
        return inner.number("rope_theta", self.number("rope_theta", 10000.0))

    def error(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{name} {what}", where=f"{self.where}:{name}")


def stacked_rows(pairs: Sequence[tuple[str, str]], *, kinds: Sequence[str] = ("weight",)) -> tuple[Row, ...]:
    """Rows for tensors that are stored as ours are: (theirs, ours) module names and the kinds of tensor they hold."""
    return tuple(Row(f"{theirs}.{kind}", (f"{ours}.{kind}",)) for theirs, ours in pairs for kind in kinds)
