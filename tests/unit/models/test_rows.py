"""Rows of a table: every way a file may store our tensors, in and out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmkit.errors import CheckpointError
from llmkit.models.hf.rows import Row, export, fill


def random_state(*shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in zip("abc", shapes, strict=False)
    }


def returned(row: Row, state: dict[str, Tensor]) -> dict[str, Tensor]:
    empty = {name: torch.zeros_like(value) for name, value in state.items()}
    fill(row, export(row, state), empty, "here")
    return empty


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 4),
    width=st.integers(1, 3),
    columns=st.integers(1, 3),
    transposed=st.booleans(),
    lifted=st.booleans(),
    interleaved=st.booleans(),
    before=st.integers(0, 2),
)
def test_what_is_written_is_read(
    heads: int, width: int, columns: int, transposed: bool, lifted: bool, interleaved: bool, before: int
) -> None:
    state = random_state(*[(heads * width, columns)] * 3)
    before = 0 if interleaved else before
    row = Row("x", tuple(state), transposed, before, lifted, interleaved=interleaved, heads=heads)
    assert all(torch.equal(value, state[name]) for name, value in returned(row, state).items())


def test_heads_in_turn() -> None:
    state = {name: torch.tensor([[base + 0.0], [base + 1.0]]) for name, base in (("q", 0), ("k", 10), ("v", 20))}
    row = Row("x", ("q", "k", "v"), interleaved=True, heads=2)
    assert export(row, state).flatten().tolist() == [0, 10, 20, 1, 11, 21]


def test_an_offset_is_added_in_and_taken_off() -> None:
    state = {"norm.weight": torch.zeros(3)}
    row = Row("x", ("norm.weight",), offset=1.0)
    fill(row, torch.tensor([0.5, -1.0, 0.25], dtype=torch.bfloat16), state, "here")
    assert state["norm.weight"].tolist() == [1.5, 0.0, 1.25]
    assert export(row, state).tolist() == [0.5, -1.0, 0.25]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_come_back_bit_for_bit_through_an_offset(dtype: torch.dtype) -> None:
    """Down to 2^-13, where 1 + w in fp32 has no bits left for w: below that the error is 2^-24."""
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(4000, generator=generator) * 0.3).to(dtype)
    values = values[values.abs() >= 2.0**-13]
    state = {"w": torch.zeros(len(values))}
    row = Row("x", ("w",), offset=1.0)
    fill(row, values, state, "here")
    assert torch.equal(export(row, state).to(dtype), values)
    fill(row, torch.full((len(values),), 1e-9), state, "here")
    assert float((export(row, state) - 1e-9).abs().max()) <= 2.0**-24


def test_an_absent_bias_is_zeros_out_and_must_be_zeros_in() -> None:
    state = {"a.weight": torch.ones(4, 2), "b.weight": torch.ones(4, 2), "b.bias": torch.ones(4)}
    row = Row("x", ("a.bias", "b.bias"), interleaved=True, heads=2)
    assert export(row, state).tolist() == [0, 0, 1, 1] * 2
    fill(row, torch.tensor([0.0, 0, 5, 6] * 2), state, "here")
    assert state["b.bias"].tolist() == [5, 6, 5, 6]
    with pytest.raises(CheckpointError, match="x is not zero") as error:
        fill(row, torch.ones(8), state, "here")
    assert error.value.where == "here"


@pytest.mark.parametrize(
    ("row", "shape", "needed"),
    [
        (Row("x", ("a.weight", "b.weight")), (5, 2), r"\(7, 2\)"),
        (Row("x", ("a.weight",), transposed=True), (3, 2), r"\(2, 3\)"),
        (Row("x", ("a.weight",), before=2), (3, 2), r"\(5, 2\)"),
        (Row("x", ("a.weight",), interleaved=True, heads=3), (3, 3), r"\(3, 2\)"),
        (Row("x", ("a.weight",)), (3,), r"\(3, 2\)"),
    ],
)
def test_another_shape_is_refused_in_the_file_s_own_order(row: Row, shape: tuple[int, ...], needed: str) -> None:
    state = random_state((3, 2), (4, 2))
    with pytest.raises(CheckpointError, match=f"tensor x has the shape .*, the config needs {needed}"):
        fill(row, torch.zeros(shape), state, "here")
