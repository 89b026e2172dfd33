"""The tensors of a checkpoint and ours: one row of a table each, copied in and out. Torch is imported in functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmkit.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One tensor of a file: our tensors stacked along their first axis, then transposed where the file stores it so.

    ``before`` rows of no use stand before ours, zeros where we write them. ``lifted``: the file has an axis of length 1
    in front. ``offset`` is what our values have more than the file's. ``interleaved``: not one tensor after another but
    a head of each in turn; ``heads`` is their number, and ``Family.rows`` fills it in.
    """

    name: str
    parts: tuple[str, ...]
    transposed: bool = False
    before: int = 0
    lifted: bool = False
    offset: float = 0.0
    interleaved: bool = False
    heads: int = 0


@dataclass(frozen=True)
class Stack:
    """Equal blocks. ``n_blocks`` is the config's field with their number; ``{}`` in a row stands for the block's."""

    n_blocks: str
    rows: tuple[Row, ...]


def stacked_rows(
    pairs: Sequence[tuple[str, str]], *, kinds: Sequence[str] = ("weight",), offset: float = 0.0
) -> tuple[Row, ...]:
    """Rows for tensors that are stored as ours are: (theirs, ours) module names and the kinds of tensor they hold."""
    return tuple(
        Row(f"{theirs}.{kind}", (f"{ours}.{kind}",), offset=offset) for theirs, ours in pairs for kind in kinds
    )


def fill(row: Row, tensor: Tensor, state: Mapping[str, Tensor], where: str) -> None:
    """Copy a tensor of the file into our parameters ``state``; ``where`` is its place for messages.

    Raises ``CheckpointError`` for another shape, and for a bias that is not zero where the model has none.
    """
    if row.lifted and tensor.shape[:1] == (1,):
        tensor = tensor[0]
    if row.transposed:
        tensor = tensor.t()
    shapes = [_shape(part, state) for part in row.parts]
    expected = (row.before + sum(shape[0] for shape in shapes), *shapes[0][1:])
    if tuple(tensor.shape) != expected:
        needed = expected[::-1] if row.transposed else expected
        got = tuple(tensor.t().shape) if row.transposed else tuple(tensor.shape)
        raise CheckpointError(f"tensor {row.name} has the shape {got}, the config needs {needed}", where=where)
    for part, piece in zip(row.parts, _pieces(row, tensor, [shape[0] for shape in shapes]), strict=True):
        if part in state:
            state[part].copy_(piece.float() + row.offset if row.offset else piece)
        elif bool(piece.any()):
            raise CheckpointError(
                f"tensor {row.name} is not zero, but the config says there is no such bias", where=where
            )


def export(row: Row, state: Mapping[str, Tensor]) -> Tensor:
    """The tensor of a file row, as a contiguous copy on the CPU; absent biases are zeros."""
    import torch

    parts = [_part(part, state) for part in row.parts]
    if row.offset:
        parts = [(part.float() - row.offset).to(part.dtype) for part in parts]
    if row.before:
        parts.insert(0, parts[0].new_zeros(row.before, *parts[0].shape[1:]))
    if row.interleaved:
        tensor = torch.stack([_by_head(part, row.heads) for part in parts], dim=1).flatten(0, 2)
    else:
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    tensor = tensor.t() if row.transposed else tensor
    return (tensor[None] if row.lifted else tensor).contiguous()


def _pieces(row: Row, tensor: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """What belongs to each part, as views where the layout allows it."""
    import torch

    if row.interleaved:
        in_turn = _by_head(tensor, row.heads).chunk(len(sizes), dim=1)
        return [piece.flatten(0, 1) for piece in in_turn]
    return torch.split(tensor[row.before :], list(sizes))


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    return tensor.reshape(heads, -1, *tensor.shape[1:])


def _shape(part: str, state: Mapping[str, Tensor]) -> tuple[int, ...]:
    if part in state:
        return tuple(state[part].shape)
    return (state[part.removesuffix("bias") + "weight"].shape[0],)


def _part(name: str, state: Mapping[str, Tensor]) -> Tensor:
    if name in state:
        return state[name].detach().cpu()
    weight = state[name.removesuffix("bias") + "weight"]
    return weight.new_zeros(weight.shape[0], device="cpu")
