"""Tensors of a GGUF file as fp32 arrays, and the other way, in pieces, so that little is held beside the result.

The arithmetic of the block types is that of the package ``gguf`` (extra ``gguf``).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, BinaryIO

from llmkit.errors import CheckpointError
from llmkit.gguf_file import GGUFTensor, package

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PIECE_VALUES = 1 << 20  # dequantised at a time: a multiple of the size of all blocks
_MAX_F16 = 65504.0
_LIMITS = {"F32": 3.5e38, "F16": _MAX_F16, "Q8_0": 127 * _MAX_F16}  # Q8_0: 127 steps of an F16 scale


def read_tensor(data: BinaryIO, tensor: GGUFTensor, where: str) -> NDArray[np.float32]:
    """The values. Raises ``CheckpointError`` for a type that is not of weights, and for values that are not finite."""
    import numpy

    gguf = package()
    kind = gguf.GGMLQuantizationType(tensor.kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    values = numpy.empty(tensor.n_elements, numpy.float32)
    step = _PIECE_VALUES
    data.seek(tensor.offset)
    try:
        with numpy.errstate(all="ignore"):  # what overflows is found below
            for start in range(0, len(values), step):
                piece = values[start : start + step]
                raw = data.read(len(piece) // block * block_bytes)
                piece[:] = gguf.dequantize(numpy.frombuffer(raw, numpy.uint8)[None], kind)[0]
                if not numpy.isfinite(piece).all():
                    raise CheckpointError(f"tensor {tensor.name} holds values that are not finite", where=where)
    except NotImplementedError as error:
        raise CheckpointError(f"tensor {tensor.name} has the type {kind.name}", where=where) from error
    except ValueError as error:  # the file became shorter since its header was read
        raise CheckpointError(f"tensor {tensor.name} is cut off", where=where) from error
    return values.reshape(tensor.shape)


def type_of(shape: tuple[int, ...], kind: str) -> str:
    """How a tensor is stored in a file of ``kind``: vectors in F32, and rows that hold no whole blocks in F16."""
    if len(shape) == 1:
        return "F32"
    return "F16" if kind == "q8_0" and shape[-1] % 32 else kind.upper()


def n_bytes_of(shape: tuple[int, ...], type_: str) -> int:
    gguf = package()
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_]]
    return math.prod(shape) // int(block) * int(block_bytes)


def stored(values: NDArray[np.float32], type_: str, name: str) -> NDArray[Any]:
    """The values of the tensor ``name`` in a type of GGUF. Raises ``CheckpointError`` for values it cannot hold."""
    import numpy

    gguf = package()
    largest = float(numpy.abs(values).max(initial=0.0))
    if not largest <= _LIMITS[type_]:
        what = f"{largest:g}, which {type_} cannot hold" if math.isfinite(largest) else "values that are not finite"
        raise CheckpointError(f"tensor {name} holds {what}", where=name, fix="write it with dtype=float32")
    done: NDArray[Any] = gguf.quantize(values, gguf.GGMLQuantizationType[type_])
    return done
