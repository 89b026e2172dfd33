"""The header as it is read, against what the package ``gguf`` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.errors import CheckpointError
from llmkit.gguf_file import GGUFFile, read_gguf

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

V = gguf.GGUFValueType
INTEGERS = {
    **{V.UINT8: (0, 255), V.INT8: (-128, 127), V.UINT16: (0, 65535), V.INT16: (-32768, 32767)},
    **{
        V.UINT32: (0, 2**32 - 1),
        V.INT32: (-(2**31), 2**31 - 1),
        V.UINT64: (0, 2**64 - 1),
        V.INT64: (-(2**63), 2**63 - 1),
    },
}
VALUES = st.one_of(
    *(st.tuples(st.just(kind), st.integers(*bounds)) for kind, bounds in INTEGERS.items()),
    st.tuples(st.just(V.BOOL), st.booleans()),
    st.tuples(st.just(V.FLOAT64), st.floats(allow_nan=False)),
    st.tuples(st.just(V.STRING), st.text(min_size=1).filter(lambda text: text.isprintable())),
    st.tuples(st.just(V.ARRAY), st.lists(st.text(alphabet="aé漢 \n"), min_size=1, max_size=5)),
    st.tuples(st.just(V.ARRAY), st.lists(st.integers(-1000, 1000), min_size=1, max_size=5)),
    st.tuples(st.just(V.ARRAY), st.lists(st.booleans(), min_size=1, max_size=5)),
)


def written(path: Path, entries: dict[str, tuple[Any, Any]], tensors: dict[str, Any], alignment: int = 32) -> GGUFFile:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for key, (kind, value) in entries.items():
        writer.add_key_value(key, value, kind)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_gguf(path)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(VALUES, max_size=6))
def test_metadata_of_every_type(tmp_path: Path, values: list[tuple[Any, Any]]) -> None:
    entries = {f"key.{place}": value for place, value in enumerate(values)}
    found = written(tmp_path / "m.gguf", entries, {}).metadata
    assert found["general.architecture"] == "llama"
    for key, (_, value) in entries.items():
        read = found[key] if isinstance(found[key], str | int | float | list) else found[key].tolist()
        assert (read, type(read)) == (value, type(value))


def test_fp32_numbers_are_the_shortest_that_round_to_them(tmp_path: Path) -> None:
    entries = {str(value): (V.FLOAT32, value) for value in (1e-5, 1e-6, 10000.0, 0.1, 1 / 3)}
    found = written(tmp_path / "m.gguf", entries, {}).metadata
    assert [found[key] for key in entries][:4] == [1e-5, 1e-6, 10000.0, 0.1]
    assert np.float32(found[str(1 / 3)]) == np.float32(1 / 3)


@pytest.mark.parametrize("alignment", [32, 128])
def test_tensors_and_where_they_lie(alignment: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    arrays = {
        "a": draw.normal(size=5).astype(np.float32),
        "b.weight": draw.normal(size=(3, 64)).astype(np.float16),
        "c": draw.normal(size=(2, 3, 4)).astype(np.float32),
    }
    path = tmp_path / "m.gguf"
    file = written(path, {}, arrays, alignment)
    whole = path.read_bytes()
    for name, array in arrays.items():
        tensor = file.tensors[name]
        assert (tensor.shape, tensor.n_bytes, tensor.n_elements) == (array.shape, array.nbytes, array.size)
        assert whole[tensor.offset : tensor.offset + tensor.n_bytes] == array.tobytes()
        assert tensor.offset % alignment == 0


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_gguf(tmp_path / "none.gguf")


def test_typed_reading() -> None:
    metadata = {"text": "x", "n": 3, "list": ["a"], "flag": True, "array": np.array([1, 2])}
    file = GGUFFile(Path("f"), metadata, {})
    assert (file.text("text"), file.text("none"), file.index("n", 4), file.index("none", 4)) == ("x", None, 3, None)
    assert (file.texts("list"), file.texts("none"), file.flag("flag", False), file.flag("none", True)) == (
        ["a"],
        [],
        True,
        True,
    )
    assert (file.numbers("array", 2), file.numbers("none", 2)) == ([1, 2], None)
    for wrong in (
        lambda: file.text("n"),
        lambda: file.index("n", 3),
        lambda: file.index("flag", 3),
        lambda: file.texts("text"),
        lambda: file.flag("n", True),
        lambda: file.numbers("array", 3),
        lambda: file.numbers("list", 1),
    ):
        with pytest.raises(CheckpointError, match="must be"):
            wrong()
