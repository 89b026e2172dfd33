"""The files of a Hugging Face folder: found, checked, read and written one tensor at a time.

Weights are safetensors files: 8 bytes with the length of a header, a JSON header with type, shape and place of every
tensor, the values. The library of the format checks the header against the file (no overlap, no gap, sizes that fit the
shapes); the values are read here, with plain reads into a buffer of one tensor, so that no page of a mapped file counts
as memory of the process. A folder may come from anyone: nothing outside of it is opened but the blobs of a hub cache,
and nothing is allocated that the size of the files does not warrant. Torch is imported inside the functions only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from llmkit.errors import CheckpointError
from llmkit.safe_files import inside, read_text

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_GROWTH = 4  # parameters for each value in the files: a head that is new can be as large as the rest
MAX_LAYERS = 100_000
ADAPTER_CONFIG = "adapter_config.json"  # of a folder in the format of peft
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # in the file -> in torch
KINDS = {theirs: kind for kind, theirs in TYPES.items()}
MAX_HEADER_BYTES = 25_000_000  # the format allows 100 million; a header this long already names 250,000 tensors
MAX_NAME_CHARS = 300
LENGTH_BYTES = 8
CHUNK = 1 << 20  # values that are checked or compared at once


class Stored(NamedTuple):
    """A tensor in a file, not read yet."""

    path: Path
    name: str  # in the file
    kind: str  # its type, in the letters of the format
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    n_bytes: int

    @property
    def where(self) -> str:
        return f"{self.path}:{self.name}"


Layout = tuple[str, tuple[int, ...]]  # a tensor's type and shape


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder. Raises ``CheckpointError``."""
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing", where=str(path)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}", where=str(path)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} must hold an object", where=str(path))
    return content


def list_tensors(folder: Path) -> list[Stored]:
    """All tensors of a folder, each name once; the headers are read, no value is. Raises ``CheckpointError``."""
    single, index = folder / WEIGHTS, folder / INDEX
    if _is_there(single):
        return list(tensors_in(single))
    if _is_there(index):
        return _tensors_of_shards(index)
    if any(next(folder.glob(pattern), None) for pattern in PICKLES):
        raise CheckpointError(
            "the weights are in a pickle file, which can run code when read; llmkit reads safetensors only",
            where=str(folder),
            fix="where you trust it, convert it: AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)",
        )
    raise CheckpointError(f"there is no {WEIGHTS}", where=str(folder))


def tensors_in(path: Path) -> Iterator[Stored]:
    """What one safetensors file holds; its header is read, no value is. Raises ``CheckpointError``."""
    try:
        inside(path)
        header, start = _header(path)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path.name} is not a readable safetensors file: {error}", where=str(path)) from error
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield Stored(path, name, entry["dtype"], tuple(entry["shape"]), start + begin, end - begin)


def read_tensor(stored: Stored) -> Tensor:
    """One tensor, on the CPU in a buffer of its own. Raises ``CheckpointError`` where it is not of finite floats."""
    import torch

    check_type(stored)
    buffer = torch.empty(stored.n_bytes, dtype=torch.uint8)
    _read_into(buffer, stored, 0)
    tensor = buffer.view(getattr(torch, TYPES[stored.kind])).view(stored.shape)
    for chunk in torch.split(tensor.view(-1), CHUNK):
        if not bool(chunk.isfinite().all()):
            raise CheckpointError(f"tensor {stored.name} holds values that are not finite", where=stored.where)
    return tensor


def write_tensors(path: Path, layout: Mapping[str, Layout], tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file, tensor by tensor in the order of ``layout``; one of them is in memory at a time.

    Wider types must come first, so that every tensor is aligned. Raises ``OSError`` when the disk refuses.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (kind, shape) in layout.items():
        start, end = end, end + prod(shape) * getattr(torch, TYPES[kind]).itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for (kind, shape), tensor in zip(layout.values(), tensors, strict=True):
            if (kind_of(tensor), tuple(tensor.shape)) != (kind, tuple(shape)):
                raise ValueError(f"a tensor of {kind_of(tensor)}{list(tensor.shape)} where {kind}{list(shape)} was due")
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def kind_of(tensor: Tensor) -> str:
    """A tensor's type in the letters of the format."""
    return KINDS[str(tensor.dtype).removeprefix("torch.")]


def same_values(a: Stored, b: Stored) -> bool:
    """Whether two tensors of files are equal, read in pieces."""
    if a.shape != b.shape:
        return False
    return all(bool((x == y).all()) for x, y in zip(_chunks(a), _chunks(b), strict=True))


def check_type(stored: Stored) -> None:
    """Raise ``CheckpointError`` for integers, and for floats of 8 bits and less, which need scales to mean anything."""
    if stored.kind not in TYPES:
        raise CheckpointError(
            f"tensor {stored.name} has the type {stored.kind}; llmkit reads {', '.join(TYPES)}",
            where=stored.where,
            fix="take the checkpoint that is not quantised",
        )


# -- private --------------------------------------------------------------------------------------------------------


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the values begin."""
    with path.open("rb") as file:
        n_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if n_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"its header claims {n_bytes} bytes")
        with safe_open(path, framework="np"):  # raises for all that is wrong with the layout
            header: dict[str, Any] = json.loads(file.read(n_bytes), object_pairs_hook=_object_of_unique_names)
    return header, LENGTH_BYTES + n_bytes


def _object_of_unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found or len(name) > MAX_NAME_CHARS or not name.isprintable():
            raise ValueError(f"it {'repeats' if name in found else 'has'} the name {name[:MAX_NAME_CHARS]!r}")
        found[name] = value
    return found


def _tensors_of_shards(index: Path) -> list[Stored]:
    """What the shards hold, checked against the index: nothing twice, and everything where the index says."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError("weight_map must name a file for every tensor", where=str(index))
    found: dict[str, Stored] = {}
    for name in sorted(set(places.values())):
        for stored in tensors_in(_shard(index, name)):
            if stored.name in found:
                first = found[stored.name].path.name
                raise CheckpointError(f"tensor {stored.name} is in {first} and in {name}", where=str(index))
            found[stored.name] = stored
    for tensor, name in places.items():
        if tensor not in found or found[tensor].path.name != name:
            raise CheckpointError(f"tensor {tensor} is not in {name}, where the index has it", where=str(index))
    return list(found.values())


def _shard(index: Path, name: str) -> Path:
    path = index.parent / name
    if Path(name).name != name or "\\" in name or "\0" in name:
        raise CheckpointError(f"shard {name!r} is outside of the folder", where=str(index))
    if path.suffix != ".safetensors":
        raise CheckpointError(f"shard {name!r} is not a safetensors file", where=str(index))
    if not path.exists():
        raise CheckpointError(f"shard {name} is missing", where=str(path))
    return path


def _chunks(stored: Stored) -> Iterator[Tensor]:
    """The values in order, in fp64 where they have it and else in fp32."""
    import torch

    check_type(stored)
    kind = getattr(torch, TYPES[stored.kind])
    width = kind.itemsize
    for first in range(0, prod(stored.shape), CHUNK):
        n = min(CHUNK, prod(stored.shape) - first)
        buffer = torch.empty(n * width, dtype=torch.uint8)
        _read_into(buffer, stored, first * width)
        values = buffer.view(kind)
        yield values if kind is torch.float64 else values.float()


def _read_into(buffer: Tensor, stored: Stored, offset: int) -> None:
    """Fill ``buffer`` with the tensor's bytes from ``offset`` on."""
    rest = buffer.numpy().data
    try:
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.start + offset)
            while rest and (n := file.readinto(rest)):
                rest = rest[n:]
    except OSError as error:
        raise CheckpointError(f"tensor {stored.name} cannot be read: {error}", where=stored.where) from error
    if rest:
        raise CheckpointError(f"tensor {stored.name} cannot be read: the file became shorter", where=stored.where)
