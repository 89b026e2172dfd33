"""Read a Hugging Face folder. No pickle, no code from the folder; torch is imported inside the functions only."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from llmkit.errors import CheckpointError
from llmkit.interfaces import ModelConfig
from llmkit.models.hf import own
from llmkit.models.hf.families import family_named
from llmkit.models.hf.family import Family, Keys, Row
from llmkit.models.hf.save import INDEX

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger("llmkit.models")


def load_config(folder: Path) -> ModelConfig:
    """The architecture in ``config.json``. Raises ``CheckpointError`` for what llmkit does not compute.

    The ``llmkit`` key wins, unless the family's own keys were changed since: then those do, with a warning.
    """
    return _read_config(folder)[0]


def load_model(folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """The model of a folder, its weights cast to ``dtype`` (fp32 when None). Tensors are copied in one by one.

    Raises ``CheckpointError`` naming file and tensor when one is missing, unknown, of another shape, or not finite.
    """
    import torch

    config, family = _read_config(folder)
    with torch.device("meta"):
        model = config.build()
    model = model.to(dtype or torch.float32).to_empty(device=device)
    state = dict(model.named_parameters())
    rows = family.rows(config, list(state))
    with ExitStack() as stack, torch.no_grad():
        tensors = _open_weights(folder, family, stack)
        copies = _check_names(tensors, rows, family, folder)
        for row in rows:
            _fill(row, _read(tensors, row.name), state, f"{tensors[row.name][1]}:{row.name}")
        for copy, original in copies:
            _check_equal(copy, original, tensors, folder)
    return model


# -- config ---------------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> tuple[ModelConfig, Family]:
    path = folder / "config.json"
    keys = Keys(_read_json(path), str(path))
    family = family_named(keys.raw.get("model_type"), f"{path}:model_type")
    if family.for_padding:
        pad_id = keys.raw.get("pad_token_id")
        family = family.for_padding(None if pad_id is None else keys.integer("pad_token_id"))
    config = _reconcile(family.read(keys), family, keys)
    problems = config.problems()
    if problems:
        raise CheckpointError("; ".join(f"{name} {what}" for name, what in problems), where=str(path))
    return config, family


def _reconcile(theirs: ModelConfig, family: Family, keys: Keys) -> ModelConfig:
    """Our own key holds more than the family's keys can say; it is used as long as both agree."""
    if own.KEY not in keys.raw or family.own_names:
        return theirs
    ours: ModelConfig = own.read(keys, family.config)
    if family.fits(ours) and family.read(Keys(family.write(ours))) == theirs:
        return ours
    log.warning("%s: changed since llmkit wrote it; its %r key is left aside", keys.where, own.KEY)
    return theirs


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing", where=str(path)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}", where=str(path)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} must hold an object", where=str(path))
    return content


# -- weights --------------------------------------------------------------------------------------------------------

Tensors = Mapping[str, tuple[Any, Path, str]]  # name in the table -> (open file, its path, name in the file)


def _open_weights(folder: Path, family: Family, stack: ExitStack) -> Tensors:
    """All tensors of the folder, none of them read yet."""
    found: dict[str, tuple[Any, Path, str]] = {}
    for path in _weight_files(folder):
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
            names = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path.name} is not a readable safetensors file: {error}", where=str(path)
            ) from error
        found |= {_renamed(name, family): (file, path, name) for name in names}
    if any(name.startswith(family.prefix) for name in found):
        return found
    return {
        name if name.startswith(family.unprefixed) else family.prefix + name: place for name, place in found.items()
    }


def _renamed(name: str, family: Family) -> str:
    """A tensor's name with today's ending."""
    for old, new in family.old_endings.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / INDEX
    if single.exists():
        return [single]
    if index.exists():
        return list(_shard_files(index))
    if list(folder.glob("*.bin")) + list(folder.glob("*.pt")) + list(folder.glob("*.pth")):
        raise CheckpointError(
            "the weights are in a pickle file, which can run code when read; llmkit reads safetensors only",
            where=str(folder),
            fix="where you trust it, convert it: AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)",
        )
    raise CheckpointError("there is no model.safetensors", where=str(folder))


def _shard_files(index: Path) -> Iterator[Path]:
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError("weight_map must name a file for every tensor", where=str(index))
    for name in sorted(set(places.values())):
        path = index.parent / name
        if Path(name).name != name:
            raise CheckpointError(f"shard {name!r} is outside of the folder", where=str(index))
        if not path.exists():
            raise CheckpointError(f"shard {name} is missing", where=str(path))
        yield path


def _check_names(tensors: Tensors, rows: list[Row], family: Family, folder: Path) -> list[tuple[str, str]]:
    """The tensors that repeat others, as (copy, original). Raises for missing and for unknown ones."""
    expected = {row.name for row in rows}
    missing = sorted(expected - tensors.keys())
    unknown = [name for name in tensors.keys() - expected if not name.endswith(family.ignored)]
    copies = [(name, family.copies[name]) for name in unknown if name in family.copies]
    extra = sorted(set(unknown) - family.copies.keys())
    for names, what in ((missing, "missing"), (extra, "not part of the model")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"tensor {names[0]}{more}: {what}", where=str(folder))
    return copies


def _read(tensors: Tensors, name: str) -> Tensor:
    file, path, name_in_file = tensors[name]
    try:
        tensor: Tensor = file.get_tensor(name_in_file)
    except SafetensorError as error:
        raise CheckpointError(f"tensor {name} cannot be read: {error}", where=str(path)) from error
    if not tensor.is_floating_point():
        raise CheckpointError(f"tensor {name} has the type {tensor.dtype}", where=str(path))
    if not bool(tensor.float().isfinite().all()):
        raise CheckpointError(f"tensor {name} holds values that are not finite", where=str(path))
    return tensor


def _fill(row: Row, tensor: Tensor, state: Mapping[str, Tensor], where: str) -> None:
    """Copy a tensor of the file into our parameters."""
    import torch

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
    pieces: tuple[Tensor, ...] = torch.split(tensor[row.before :], [shape[0] for shape in shapes])
    for part, piece in zip(row.parts, pieces, strict=True):
        if part in state:
            state[part].copy_(piece)
        elif bool(piece.any()):
            raise CheckpointError(
                f"tensor {row.name} is not zero, but the config says there is no such bias", where=where
            )


def _shape(part: str, state: Mapping[str, Tensor]) -> tuple[int, ...]:
    if part in state:
        return tuple(state[part].shape)
    return (state[part.removesuffix("bias") + "weight"].shape[0],)


def _check_equal(copy: str, original: str, tensors: Tensors, folder: Path) -> None:
    import torch

    if not torch.equal(_read(tensors, copy), _read(tensors, original)):
        raise CheckpointError(
            f"tensor {copy} differs from {original}, but the config ties them",
            where=str(folder),
            fix="set tie_word_embeddings to false in config.json",
        )
