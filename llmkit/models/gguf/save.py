"""Write a model as a GGUF file, tensor by tensor. Torch is imported inside functions only."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmkit.errors import CheckpointError, ConfigError
from llmkit.gguf_file import SCORES, TOKENS, TYPES, UNUSED, GGUFFile, GGUFTensor, package
from llmkit.models.gguf import rope
from llmkit.models.gguf.architectures import ARCHITECTURES, Architecture, lost, tensor_name
from llmkit.models.gguf.tensors import n_bytes_of, stored, type_of
from llmkit.models.hf.families import family_of
from llmkit.models.hf.family import Family, Keys
from llmkit.models.hf.rows import Row, export

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

_UNUSED_SCORE = -1000.0  # of the pieces for embedding rows that no token has
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}

Kind = Literal["f16", "q8_0", "f32"]


@dataclass(frozen=True)
class _Place:
    """One tensor of the file to be written."""

    name: str
    row: Row
    shape: tuple[int, ...]
    type: str  # a name of GGMLQuantizationType


def save_gguf(model: nn.Module, path: Path, *, kind: Kind, tokenizer_fields: Mapping[str, Any]) -> None:
    """Write ``model`` to ``path``; a file that is there is replaced once the new one is whole.

    ``kind`` is the type of the matrices; vectors stay in F32. ``tokenizer_fields`` is what
    ``llmkit.tokenizers.gguf.gguf_fields`` gives; other metadata, such as ``general.name``, may stand beside it.

    Raises ``ConfigError`` for a model that GGUF has no words for, ``CheckpointError`` when a weight does not fit
    ``kind`` or the disk refuses.
    """
    gguf = package()
    config: Any = model.config
    if hasattr(model, "task_head"):
        raise ConfigError("GGUF has no place for a task head", where="format", fix="format=hf")
    family, architecture = _chosen(config)
    places = list(_places(family.rows(config, list(state := dict(model.named_parameters()))), state, kind))
    metadata = _metadata(config, family, architecture, places)
    fields = {**_general(kind, gguf), **metadata, **_padded(tokenizer_fields, config.vocab_rows)}
    part = path.with_name(path.name + ".part")
    try:
        with closing(gguf.GGUFWriter(part, architecture.name)) as writer:
            for key, value in fields.items():
                _add(writer, key, value, gguf)
            divisors = rope.divisors(family.write(config))
            _write_table(writer, places, divisors, gguf)
            if divisors is not None:
                writer.write_tensor_data(divisors)
            for place in places:
                writer.write_tensor_data(_values(place, state, architecture, config))
        os.replace(part, path)
    except OSError as error:
        raise CheckpointError(f"the model could not be written: {error}", where=str(path)) from error
    finally:
        if part.is_file():
            part.unlink()


def _chosen(config: Any) -> tuple[Family, Architecture]:
    family = family_of(config)
    for architecture in ARCHITECTURES:
        if architecture.model_type == family.model_types[0]:
            return family, architecture
    names = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise ConfigError(
        f"{family.architecture or 'a model of our own format'} cannot be written as GGUF; llmkit writes {names}",
        where="format",
        fix="format=hf",
    )


# -- metadata -------------------------------------------------------------------------------------------------------


def _metadata(config: Any, family: Family, architecture: Architecture, places: list[_Place]) -> dict[str, Any]:
    """What GGUF says of the config, after a check that reading it gives the same model."""
    content = family.write(config)
    metadata = architecture.metadata(content)
    tensors = {place.name: GGUFTensor(place.name, place.shape, 0, 0, 0) for place in places}
    imagined = GGUFFile(Path("GGUF"), metadata, tensors)
    read_back = family.write(family.read(Keys(architecture.config(imagined, rope.divisors(content)))))
    if keys := lost(content, read_back):
        shown = ", ".join(f"{key}={content.get(key)!r}" for key in keys)
        raise ConfigError(f"GGUF's {architecture.name} does not compute {shown}", where="format", fix="format=hf")
    return metadata


def _general(kind: Kind, gguf: Any) -> dict[str, Any]:
    return {
        "general.type": "model",
        "general.file_type": int(gguf.LlamaFileType[_FILE_TYPES[kind]]),
        "general.quantization_version": int(gguf.GGML_QUANT_VERSION),
    }


def _padded(fields: Mapping[str, Any], n_rows: int) -> dict[str, Any]:
    """With a name for every row of the embedding: llama.cpp takes their number from the names."""
    tokens = fields.get(TOKENS, [])
    if len(tokens) > n_rows:
        raise ConfigError(
            f"the tokenizer has {len(tokens)} ids, the model {n_rows} embedding rows",
            where="tokenizer",
            fix="export the model with its own tokenizer",
        )
    new = range(len(tokens), n_rows) if tokens else range(0)
    fillers: dict[str, list[Any]] = {
        TOKENS: [f"[PAD{i}]" for i in new],
        TYPES: [UNUSED for _ in new],
        SCORES: [_UNUSED_SCORE for _ in new],
    }
    return {key: [*value, *fillers.get(key, ())] if isinstance(value, list) else value for key, value in fields.items()}


def _add(writer: Any, key: str, value: Any, gguf: Any) -> None:
    types = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    if value not in ("", []):  # which the format has no use for
        writer.add_key_value(key, value, gguf.GGUFValueType[types[type(value)]])


# -- tensors --------------------------------------------------------------------------------------------------------


def _places(rows: list[Row], state: Mapping[str, Tensor], kind: Kind) -> Iterator[_Place]:
    for row in rows:
        shape = tuple(state[row.parts[0]].shape)  # one of ours in every row of these families
        yield _Place(tensor_name(row.name), row, shape, type_of(shape, kind))


def _write_table(writer: Any, places: list[_Place], divisors: NDArray[np.float32] | None, gguf: Any) -> None:
    """Everything before the values."""
    if divisors is not None:
        writer.add_tensor_info(rope.DIVISORS, divisors.shape, divisors.dtype, divisors.nbytes)
    for place in places:
        raw_type = gguf.GGMLQuantizationType[place.type]
        writer.add_tensor_info(place.name, place.shape, None, n_bytes_of(place.shape, place.type), raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _values(place: _Place, state: Mapping[str, Tensor], architecture: Architecture, config: Any) -> NDArray[Any]:
    """The tensor as the file has it, Llama's rotary pairs side by side."""
    tensor = export(place.row, state).float()
    heads = architecture.n_heads_of(place.name, config.n_heads, config.kv_heads)
    if heads is not None:
        tensor = tensor.reshape(heads, 2, -1, *place.shape[1:]).transpose(1, 2).reshape(place.shape)
    return stored(tensor.contiguous().numpy(), place.type, place.name)
