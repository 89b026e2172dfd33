"""The header of a GGUF file: its metadata and where its tensors lie. Nothing in the file is trusted.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian, one file. The sizes
of the tensor types come from the package ``gguf`` (extra ``gguf``).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from llmkit.errors import CheckpointError, missing_extra

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SUFFIX = ".gguf"
TOKENS, TYPES, SCORES = (f"tokenizer.ggml.{key}" for key in ("tokens", "token_type", "scores"))  # one for each id
UNUSED = 5  # the type of pieces that only fill up an embedding
MAX_HEADER_BYTES = 1 << 26  # a quarter of a million pieces with their merges take about 2^24
MAX_DIMENSIONS = 4
_MAGIC, _VERSIONS, _ALIGNMENT = b"GGUF", (2, 3), 32
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_MIN_ENTRY_BYTES = 13  # of a metadata entry, and less than those of a tensor: bounds both counts


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of the file. ``shape`` has the order of torch, ``kind`` is its ``GGMLQuantizationType``."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int  # bytes from the beginning of the file
    n_bytes: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class GGUFFile:
    """Metadata (texts, numbers, booleans, lists of texts, arrays of numbers) and tensors, by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    def text(self, key: str) -> str | None:
        """A text of the metadata; None where there is none. Raises ``CheckpointError`` for another type."""
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, f"must be a text, got {value!r}")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts, empty where there is none."""
        value = self.metadata.get(key, [])
        if not isinstance(value, list):
            raise self.error(key, "must be a list of texts")
        return value

    def numbers(self, key: str, length: int) -> list[float] | list[int] | None:
        """An array of ``length`` numbers; None where there is none."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if not hasattr(value, "tolist") or len(value) != length:
            raise self.error(key, f"must be {length} numbers")
        numbers: list[float] | list[int] = value.tolist()
        return numbers

    def index(self, key: str, limit: int) -> int | None:
        """A whole number below ``limit``; None where there is none."""
        value = self.metadata.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit):
            raise self.error(key, f"must be in 0 ... {limit - 1}, got {value!r}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, got {value!r}")
        return value

    def error(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"{key} {what}", where=f"{self.path}:{key}")


def read_gguf(path: Path) -> GGUFFile:
    """The header of the file at ``path``. No tensor is read.

    Raises ``CheckpointError`` for a file that is no GGUF, is cut off, or whose tensors lie outside of it or over one
    another; ``SetupError`` where the package ``gguf`` is missing.
    """
    try:
        with path.open("rb") as file:
            return _Header(file, path).read()
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}", where=str(path)) from error


class _Header:
    """Reads from the front of a file; ``_left`` is what the header may still take."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._size = file.seek(0, 2)
        file.seek(0)
        self._left = min(self._size, MAX_HEADER_BYTES)

    def read(self) -> GGUFFile:
        if self._size < len(_MAGIC) or self._take(len(_MAGIC)) != _MAGIC:
            raise self._damaged("this is no GGUF file")
        version = self._number(4)
        if version not in _VERSIONS:
            why = "big-endian" if not version & 0xFFFF else f"version {version}"
            raise self._damaged(f"GGUF files are read in version 2 or 3, little-endian; this one is {why}")
        n_tensors, n_entries = self._number(8), self._number(8)
        metadata = self._metadata(self._checked(n_entries, "metadata entries"))
        if metadata.get("split.count", 0) not in (0, 1):
            raise CheckpointError(
                f"{self._path.name} is one of {metadata['split.count']} parts",
                where=str(self._path),
                fix="join them first: llama-gguf-split --merge FIRST-PART WHOLE.gguf",
            )
        tensors = self._tensors(self._checked(n_tensors, "tensors"), metadata.get("general.alignment", _ALIGNMENT))
        return GGUFFile(self._path, metadata, tensors)

    # -- metadata ---------------------------------------------------------------------------------------------------

    def _metadata(self, n_entries: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(n_entries):
            key = self._string()
            if key in found:
                raise self._damaged(f"{key} is there twice")
            found[key] = self._value(self._number(4), key)
        return found

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            kind, length = self._number(4), self._number(8)
            if kind == _STRING:
                return [self._string() for _ in range(self._checked(length, f"texts in {key}", 8))]
            return self._array(kind, length, key)
        return _plain(self._array(kind, 1, key)[0])

    def _array(self, kind: int, length: int, key: str) -> NDArray[Any]:
        import numpy

        if kind not in _SCALARS:
            raise self._damaged(f"{key} has the unknown type {kind}")
        dtype = numpy.dtype(_SCALARS[kind])
        return numpy.frombuffer(self._take(length * dtype.itemsize), dtype)

    # -- tensors ----------------------------------------------------------------------------------------------------

    def _tensors(self, n_tensors: int, alignment: Any) -> dict[str, GGUFTensor]:
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment must be a power of two, got {alignment!r}")
        places = [self._tensor() for _ in range(n_tensors)]
        start = -(-self._file.tell() // alignment) * alignment
        found: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in places:
            if name in found:
                raise self._damaged(f"tensor {name} is there twice")
            if offset % alignment:
                raise self._damaged(f"tensor {name} begins at {offset}, which is no multiple of {alignment}")
            found[name] = GGUFTensor(name, shape, kind, start + offset, self._n_bytes(name, shape, kind))
        self._check_places(found)
        return found

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n_dimensions = self._string(), self._number(4)
        if not 1 <= n_dimensions <= MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name} has {n_dimensions} dimensions")
        shape = struct.unpack(f"<{n_dimensions}Q", self._take(8 * n_dimensions))[::-1]
        return name, shape, self._number(4), self._number(8)

    def _n_bytes(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        block, block_bytes = self._block_sizes(name, kind)
        if not all(shape) or shape[-1] % block:
            raise self._damaged(f"tensor {name} has the shape {shape}; rows must hold blocks of {block}")
        return math.prod(shape) // block * block_bytes

    def _block_sizes(self, name: str, kind: int) -> tuple[int, int]:
        sizes: dict[int, tuple[int, int]] = {int(known): size for known, size in package().GGML_QUANT_SIZES.items()}
        if kind not in sizes:
            raise self._damaged(f"tensor {name} has the unknown type {kind}")
        return sizes[kind]

    def _check_places(self, tensors: Mapping[str, GGUFTensor]) -> None:
        """Every tensor inside of the file, none over another."""
        end, before = 0, ""
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise self._damaged(f"tensor {tensor.name} lies over tensor {before}")
            end, before = tensor.offset + tensor.n_bytes, tensor.name
            if end > self._size:
                raise self._damaged(f"tensor {before} ends at byte {end}, the file at {self._size}: it is cut off")

    # -- bytes ------------------------------------------------------------------------------------------------------

    def _take(self, n_bytes: int) -> bytes:
        if n_bytes > self._left:
            raise self._damaged(f"the header is cut off, or asks for {n_bytes} bytes where {self._left} can be left")
        self._left -= n_bytes
        data = self._file.read(n_bytes)
        if len(data) != n_bytes:
            raise self._damaged("the header is cut off")
        return data

    def _number(self, n_bytes: int) -> int:
        return int.from_bytes(self._take(n_bytes), "little")

    def _string(self) -> str:
        data = self._take(self._number(8))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"a text is not UTF-8: {error.reason}") from error

    def _checked(self, count: int, what: str, entry_bytes: int = _MIN_ENTRY_BYTES) -> int:
        if count > self._left // entry_bytes:
            raise self._damaged(f"the header says that there are {count} {what}, more than the file can hold")
        return count

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path.name}: {what}", where=str(self._path))


def _plain(value: np.generic) -> Any:
    """A Python value; of an fp32 number the shortest one that rounds to it, as it was before it was written."""
    return float(str(value)) if value.dtype.name == "float32" else value.item()


def package() -> Any:
    """The package ``gguf``. Raises ``SetupError`` where it is missing."""
    try:
        import gguf
    except ImportError:
        raise missing_extra("gguf", "gguf") from None
    return gguf
