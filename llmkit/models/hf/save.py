"""Write a model as a Hugging Face folder. Torch is imported inside the functions only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import CheckpointError
from llmkit.interfaces import ModelConfig
from llmkit.models.hf import own
from llmkit.models.hf.families import family_of
from llmkit.models.hf.family import Family
from llmkit.models.hf.generation_file import GENERATION_FILE, generation_settings
from llmkit.models.hf.rows import Row, export
from llmkit.models.hf.task_heads import is_output_layer, saved_as, write_head
from llmkit.models.hf.weight_files import INDEX, Layout, kind_of, write_tensors
from llmkit.models.hf.wrapped_heads import save_wrapped_head
from llmkit.models.transformers_config import TransformersConfig

if TYPE_CHECKING:
    from torch import Tensor, nn


MAX_SHARD_BYTES = 5_000_000_000
Shard = list[tuple[Row, int]]  # rows and their bytes


def save_model(
    model: nn.Module,
    folder: Path,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config, weights and generation config into ``folder`` (made if absent; weights in it are replaced).

    The last one keeps the end tokens and the sampling settings of the folder that the model came from. Weights keep
    their type. A tied head is left out, and so are the output layers that a task head does not read where
    its class in transformers has none. Above ``max_shard_bytes`` there are shards. Only one tensor is copied at a time.
    Raises ``CheckpointError`` when the disk refuses, and for a model with adapters, which no name in the files is for.
    """
    _refuse_adapters(model, folder)
    architecture: ModelConfig = model.config  # type: ignore[assignment]
    if isinstance(architecture, TransformersConfig):
        from llmkit.models.transformers_files import save_wrapped

        save_wrapped(model, folder, bos_id, eos_id, pad_id, max_shard_bytes)
        try:
            save_wrapped_head(model, folder)
        except OSError as error:
            raise CheckpointError(f"the head could not be written: {error}", where=str(folder)) from error
        return
    head: Any = getattr(model, "task_head", None)
    family, table = (
        (family_of(architecture), None) if head is None else saved_as(architecture, head.config.kind, head.shape)
    )
    family = family.for_padding(pad_id) if family.for_padding else family
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
    if architecture.kind == "encoder_decoder" and pad_id is not None:
        start = getattr(architecture, "start_id", None)
        ids["decoder_start_token_id"] = pad_id if start is None else start
    if head is not None and architecture.kind == "decoder" and pad_id == eos_id:
        ids["pad_token_id"] = None  # transformers takes the last token that is not padding, and rows end with eos
    state = dict(model.named_parameters())
    rows = family.rows(architecture, list(state))
    if table is not None:
        rows = [*(row for row in rows if not is_output_layer(row.parts[0])), *table.rows(state)]
    answer = {} if head is None else write_head(head.config, head.shape, table, type(model).__name__)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "config.json", {**ids, **_config(model, architecture, family), **answer})
        _write_json(folder / GENERATION_FILE, generation_settings(model, ids))
        _write_weights(rows, state, folder, max_shard_bytes)
    except OSError as error:
        raise CheckpointError(f"the model could not be written: {error}", where=str(folder)) from error


def _refuse_adapters(model: nn.Module, folder: Path) -> None:
    """What was trained would be left out without a word."""
    from llmkit.models.adapters import adapters

    if found := adapters(model):
        what = f"the model has adapters ({next(iter(found))} among {len(found)}), which are no part of its own files"
        fix = (
            "merge them first (llmkit.models.adapters.merge), or save the adapter (llmkit.models.hf.peft.save_adapter)"
        )
        raise CheckpointError(what, where=str(folder), fix=fix)


def _config(model: nn.Module, config: ModelConfig, family: Family) -> dict[str, Any]:
    """The key ``torch_dtype`` is the old name of ``dtype``; other tools still read it."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {
        "architectures": [family.architecture or type(model).__name__],
        "model_type": family.model_types[0],
        **family.write(config),
        "dtype": dtype,
        "torch_dtype": dtype,
        own.KEY: own.as_key(config),
    }


def _write_weights(rows: list[Row], state: Mapping[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
        old.unlink(missing_ok=True)  # a new file: someone may have the old one mapped
    shards = list(_shards(rows, state, max_shard_bytes))
    names = _file_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        layout = {row.name: _layout(row, state) for row, _ in shard}
        write_tensors(folder / name, layout, (export(row, state) for row, _ in shard))
    if len(shards) > 1:
        places = {row.name: name for name, shard in zip(names, shards, strict=True) for row, _ in shard}
        total = sum(size for shard in shards for _, size in shard)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _shards(rows: list[Row], state: Mapping[str, Tensor], max_bytes: int) -> Iterator[Shard]:
    """Rows in order, wider types first, cut before a shard would pass ``max_bytes``."""
    shard: Shard = []
    for row in sorted(rows, key=lambda row: -_meta_part(row.parts[0], state).itemsize):
        size = prod(_layout(row, state)[1]) * _meta_part(row.parts[0], state).itemsize
        if shard and sum(known for _, known in shard) + size > max_bytes:
            yield shard
            shard = []
        shard.append((row, size))
    yield shard


def _layout(row: Row, state: Mapping[str, Tensor]) -> Layout:
    """Type and shape of what ``export`` will give."""
    parts = [_meta_part(name, state) for name in row.parts]
    shape = (row.before + sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    shape = shape[::-1] if row.transposed else shape
    return kind_of(parts[0]), (1, *shape) if row.lifted else shape


def _meta_part(name: str, state: Mapping[str, Tensor]) -> Tensor:
    """Shape and type of a part without its data."""
    if name in state:
        return state[name]
    weight = state[name.removesuffix("bias") + "weight"]
    return weight.new_empty(weight.shape[0], device="meta")


def _file_names(n: int) -> list[str]:
    if n == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
