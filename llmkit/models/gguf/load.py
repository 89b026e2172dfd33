"""Read a model from a GGUF file: tensors are dequantised to fp32 one by one. Torch is imported in functions only."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import CheckpointError
from llmkit.gguf_file import GGUFFile, GGUFTensor, read_gguf
from llmkit.interfaces import ModelConfig
from llmkit.models.gguf import rope
from llmkit.models.gguf.architectures import Architecture, architecture_of, tensor_name
from llmkit.models.gguf.tensors import read_tensor
from llmkit.models.hf.families import family_named
from llmkit.models.hf.family import Family, Keys
from llmkit.models.hf.rows import Row, fill

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

log = logging.getLogger("llmkit.models")


def load_gguf_config(path: Path) -> ModelConfig:
    """The architecture in a file's metadata. Raises ``CheckpointError`` for what llmkit does not compute."""
    return read_config(read_gguf(path))[0]


def load_gguf(path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """The model of a file, its weights dequantised and cast to ``dtype`` (fp32 when None).

    Beside the weights, one tensor is held at a time. Raises ``CheckpointError`` naming file and tensor when one is
    missing, unknown, of another shape or type, or not finite; nothing large is allocated before that is known.
    """
    import torch

    file = read_gguf(path)
    config, family, architecture = read_config(file)
    _check_size(config, file)
    with torch.device("meta"):
        model = config.build().to(dtype or torch.float32)
    present = dict(model.named_parameters())
    rows = family.rows(config, list(present))
    places = _places(rows, file)
    with torch.no_grad():
        for row, tensor in places:
            fill(row, torch.empty(tensor.shape, device="meta"), present, f"{path}:{tensor.name}")
        model = model.to_empty(device=device)
        state = dict(model.named_parameters())
        with path.open("rb") as data:
            for row, tensor in places:
                where = f"{path}:{tensor.name}"
                values = torch.from_numpy(read_tensor(data, tensor, where))
                fill(row, _in_our_order(values, tensor.name, architecture, config), state, where)
    return model


def read_config(file: GGUFFile) -> tuple[ModelConfig, Family, Architecture]:
    """Through the family's own table, so that a GGUF file and a folder of the same model give the same."""
    architecture = architecture_of(file)
    family = family_named(architecture.model_type, str(file.path))
    try:
        config = family.read(Keys(architecture.config(file, _divisors(file)), str(file.path)))
        problems = config.problems()
    except (TypeError, ValueError, ArithmeticError) as error:  # a list where a number belongs
        raise CheckpointError(f"the metadata make no sense: {error}", where=str(file.path)) from error
    if problems:
        raise CheckpointError("; ".join(f"{name} {what}" for name, what in problems), where=str(file.path))
    if unknown := architecture.unknown_keys(file):
        log.warning("%s: llmkit does not know %s", file.path, ", ".join(unknown))
    return config, family, architecture


def _divisors(file: GGUFFile) -> NDArray[np.float32] | None:
    if rope.DIVISORS not in file.tensors:
        return None
    with file.path.open("rb") as data:
        return read_tensor(data, file.tensors[rope.DIVISORS], str(file.path)).ravel()


def _check_size(config: ModelConfig, file: GGUFFile) -> None:
    """Metadata that ask for a model far larger than the file are refused before any of it is built."""
    held = sum(tensor.n_elements for tensor in file.tensors.values())
    if config.n_params() > 2 * held:
        raise CheckpointError(
            f"the metadata ask for {config.n_params()} parameters, the file holds {held}",
            where=str(file.path),
            fix="copy the file again",
        )


def _places(rows: list[Row], file: GGUFFile) -> list[tuple[Row, GGUFTensor]]:
    """The tensor of every row. Raises for missing and for unknown ones."""
    names = {tensor_name(row.name): row for row in rows}
    missing = sorted(names.keys() - file.tensors.keys())
    extra = sorted(file.tensors.keys() - names.keys() - {rope.DIVISORS})
    for found, what in ((missing, "missing"), (extra, "not part of the model")):
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise CheckpointError(f"tensor {found[0]}{more}: {what}", where=str(file.path))
    return [(row, file.tensors[name]) for name, row in names.items()]


def _in_our_order(values: Tensor, name: str, architecture: Architecture, config: Any) -> Tensor:
    """Rotary pairs apart, halves of a head after one another, where the file has them side by side."""
    heads = architecture.n_heads_of(name, config.n_heads, config.kv_heads)
    if heads is None:
        return values
    return values.reshape(heads, -1, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
