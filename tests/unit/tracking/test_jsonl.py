"""``metrics.jsonl`` gives back what was put in, whatever cut it short."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import CheckpointError, DataError
from llmkit.tracking.jsonl import MetricsFile, decode_row, encode_row, read_metrics


def test_rows_come_back_in_order_and_are_there_at_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(3):
        file.append({"step": step, "train/loss": 1 / 3})
        assert read_metrics(file.path)[-1] == {"step": step, "train/loss": 1 / 3}
    file.sync()
    assert [row["step"] for row in read_metrics(file.path)] == [0, 1, 2]


@given(st.dictionaries(st.text(max_size=8), st.floats() | st.integers(-(2**70), 2**70), max_size=5))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_numbers_round_trip_bit_for_bit_as_valid_json(row: dict[str, float]) -> None:
    line = encode_row(row)
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back = decode_row(line)
    assert line.count(b"\n") == 1
    assert {k: repr(v) for k, v in back.items()} == {k: repr(v) for k, v in row.items()}


def test_numbers_of_numpy_and_torch_become_plain_ones() -> None:
    row = {"a": np.float32(0.1), "b": np.int64(3), "c": torch.tensor(0.5), "d": np.float64("nan"), "e": True}
    assert encode_row(row) == b'{"a": 0.10000000149011612, "b": 3, "c": 0.5, "d": "NaN", "e": true}\n'


def test_nonfinite_numbers_are_strings_in_the_file_and_numbers_again_when_read() -> None:
    line = encode_row({"a": math.nan, "b": math.inf, "c": -math.inf})
    assert line == b'{"a": "NaN", "b": "Infinity", "c": "-Infinity"}\n'
    back = decode_row(line)
    assert math.isnan(back["a"])
    assert (back["b"], back["c"]) == (math.inf, -math.inf)


def test_resume_forgets_the_rows_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.append({"step": 1})
    offset = file.offset()
    file.append({"step": 2})
    file.close()
    again = MetricsFile(path)
    again.truncate(offset)
    again.append({"step": 22})
    assert [row["step"] for row in read_metrics(path)] == [1, 22]


@pytest.mark.parametrize("torn", [b'{"st', b'{"step": 3}', b"x" * 10_000])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    file = MetricsFile(path)
    file.append({"step": 33})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 33]


def test_an_offset_inside_a_line_or_past_the_end_is_safe(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1})
    file.append({"step": 2})
    file.truncate(10**9)
    assert len(read_metrics(file.path)) == 2
    file.truncate(file.offset() - 3)
    assert [row["step"] for row in read_metrics(file.path)] == [1]
    file.truncate(3)
    assert file.offset() == 0


def test_a_full_disk_is_a_typed_error_and_leaves_no_half_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1})
    real = os.write
    left = [5]

    def write(fd: int, data: bytes) -> int:
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[: left.pop()])

    monkeypatch.setattr("llmkit.tracking.jsonl.os.write", write)
    with pytest.raises(CheckpointError, match="No space left on device"):
        file.append({"step": 2})
    monkeypatch.undo()
    assert file.path.read_bytes() == b'{"step": 1}\n'
    file.append({"step": 2})
    assert len(read_metrics(file.path)) == 2


@pytest.mark.parametrize("broken", ["{oops", "[1]", '"text"'])
def test_a_broken_line_before_the_last_names_file_and_line(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 2}}\n')
    with pytest.raises(DataError) as error:
        read_metrics(path)
    assert error.value.where == f"{path}:2"
