"""Read a Hugging Face folder. No pickle, no code from the folder; torch is imported inside the functions only."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import CheckpointError, MemoryBudgetError
from llmkit.gguf_file import SUFFIX
from llmkit.interfaces import ModelConfig
from llmkit.models.hf import own
from llmkit.models.hf.families import family_named
from llmkit.models.hf.family import Family, Keys
from llmkit.models.hf.rows import Row, fill
from llmkit.models.hf.weight_files import (
    MAX_GROWTH,
    MAX_LAYERS,
    Stored,
    check_type,
    list_tensors,
    read_json,
    read_tensor,
    same_values,
)
from llmkit.models.transformers_config import is_wrapped

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

log = logging.getLogger("llmkit.models")


def load_config(folder: Path) -> ModelConfig:
    """The architecture in ``config.json``, or in a ``.gguf`` file. Raises ``CheckpointError`` for what llmkit does not
    compute.

    The ``llmkit`` key wins, unless the family's own keys were changed since: then those do, with a warning.
    """
    if folder.suffix == SUFFIX and folder.is_file():
        from llmkit.models.gguf.load import load_gguf_config

        return load_gguf_config(folder)
    if is_wrapped(read_json(folder / "config.json")):
        from llmkit.models.transformers_files import wrapped_config

        return wrapped_config(folder)
    return _read_config(folder)[0]


def load_model(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, seed: int = 0
) -> Any:
    """The model of a folder or of a ``.gguf`` file, its weights cast to ``dtype`` (fp32 when None).

    ``seed`` draws a head that the files lack.

    Tensors are read one by one: the peak of memory is the model and one tensor. Raises ``CheckpointError`` naming file
    and tensor when one is missing, unknown, of another shape, or not finite; ``MemoryBudgetError`` when the model does
    not fit. Names and sizes are checked before anything is allocated.
    """
    import torch

    if folder.suffix == SUFFIX and folder.is_file():
        from llmkit.models.gguf.load import load_gguf

        return load_gguf(folder, device=device, dtype=dtype)
    if is_wrapped(read_json(folder / "config.json")):
        from llmkit.models.transformers_files import load_wrapped

        return load_wrapped(folder, device=device, dtype=dtype, seed=seed)
    config, family = _read_config(folder)
    tensors = _by_table_names(list_tensors(folder), family, folder)
    _check_size(config, tensors, folder)
    with torch.device("meta"):
        model = config.build().to(dtype or torch.float32)
    rows = family.rows(config, [name for name, _ in model.named_parameters()])
    copies = _pop_copies(tensors, rows, family)
    new = _check_names(tensors, rows, family, folder)
    model = _allocated(model, device, folder)
    state = dict(model.named_parameters())
    with torch.no_grad():
        for row in rows:
            if row not in new:
                _fill_row(row, tensors[row.name], state)
        _check_copies(copies)
        _init_head(new, state, config, seed, folder)
    return model


# -- config ---------------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> tuple[ModelConfig, Family]:
    path = folder / "config.json"
    keys = Keys(read_json(path), str(path))
    _check_layers(keys)
    keys.expect("quantization_config", None)
    family = family_named(keys.raw.get("model_type"), f"{path}:model_type")
    try:
        if family.for_padding:
            pad_id = keys.raw.get("pad_token_id")
            family = family.for_padding(None if pad_id is None else keys.integer("pad_token_id"))
        config = _reconcile(family.read(keys), family, keys)
        _check_values(config, str(path))
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:  # a list where a word belongs, 10^400
        raise CheckpointError(f"{path.name} has a value that makes no sense: {error}", where=str(path)) from error
    return config, family


def _check_layers(keys: Keys) -> None:
    """Refuse absurd depths before any list of layers is made."""
    ours = keys.raw.get(own.KEY)
    for name, value in {**(ours if isinstance(ours, dict) else {}), **keys.raw}.items():
        if "layer" in name and isinstance(value, int) and value > MAX_LAYERS:
            raise keys.error(name, f"is above {MAX_LAYERS}")


def _check_values(config: ModelConfig, where: str) -> None:
    problems = [*_infinities(config), *config.problems()]
    if problems:
        raise CheckpointError("; ".join(f"{name} {what}" for name, what in problems), where=where)


def _infinities(config: Any) -> list[tuple[str, str]]:
    """JSON readers take ``NaN`` and ``Infinity``, and ranges may miss them."""
    found = []
    for name, value in asdict(config).items():
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        found += [(name, f"is {number}") for number in inner if isinstance(number, float) and not isfinite(number)]
    return found


def _reconcile(theirs: ModelConfig, family: Family, keys: Keys) -> ModelConfig:
    """Our own key holds more than the family's keys can say; it is used as long as both agree."""
    if own.KEY not in keys.raw or family.own_names:
        return theirs
    ours: ModelConfig = own.read(keys, family.config)
    _check_values(ours, f"{keys.where}:{own.KEY}")
    if family.fits(ours) and family.read(Keys(family.write(ours))) == theirs:
        return ours
    log.warning("%s: changed since llmkit wrote it; its %r key is left aside", keys.where, own.KEY)
    return theirs


def _allocated(model: nn.Module, device: torch.device | str, folder: Path) -> nn.Module:
    """A model of the meta device with memory on ``device``, not filled yet."""
    try:
        return model.to_empty(device=device)
    except RuntimeError as error:  # what torch raises on every device
        n_bytes = sum(parameter.nbytes for parameter in model.parameters())
        what = f"the model needs {n_bytes / 1e9:.1f} GB on {device}, which are not there"
        raise MemoryBudgetError(what, where=str(folder), fix="use a smaller dtype, or a machine with more") from error


# -- weights --------------------------------------------------------------------------------------------------------


def _by_table_names(stored: list[Stored], family: Family, folder: Path) -> dict[str, Stored]:
    """The tensors of a folder under the names of the family's table, tensors of other heads left aside."""
    found: dict[str, Stored] = {}
    prefixed = any(tensor.name.startswith(family.prefix) for tensor in stored)
    for tensor in stored:
        name = _renamed(tensor.name, family, prefixed)
        if name in found:
            raise CheckpointError(f"tensors {found[name].name} and {tensor.name} are the same one", where=str(folder))
        found[name] = tensor
    aside = [name for name in found if name.removeprefix(family.prefix).startswith(family.left_aside)]
    if aside:
        log.info("%s: tensors of other heads are left aside: %s", folder, ", ".join(sorted(aside)))
    return {name: tensor for name, tensor in found.items() if name not in aside}


def _renamed(name: str, family: Family, prefixed: bool) -> str:
    """A tensor's name with today's ending and with the backbone's prefix."""
    for old, new in family.old_endings.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
            break
    return name if prefixed or name.startswith(family.unprefixed) else family.prefix + name


def _check_size(config: ModelConfig, tensors: Mapping[str, Stored], folder: Path) -> None:
    """Refuse a config that asks for far more than the files hold, before anything is built or allocated."""
    held = sum(prod(tensor.shape) for tensor in tensors.values())
    if config.n_params() > MAX_GROWTH * held:
        raise CheckpointError(
            f"config.json asks for {config.n_params():,} parameters, the weights hold {held:,}", where=str(folder)
        )


def _pop_copies(tensors: dict[str, Stored], rows: list[Row], family: Family) -> list[tuple[Stored, Stored]]:
    """Take out the tensors that repeat others; (copy, original) each. A copy stands in for an original not there.

    With ``ties_absent`` an original stands in for a row not there too.
    """
    own_rows = {row.name for row in rows}
    found = []
    for copy, original in family.copies.items():
        if copy in tensors and copy not in own_rows:
            found.append((tensors.pop(copy), original))
            tensors.setdefault(original, found[-1][0])
        elif family.ties_absent and copy in own_rows and original in tensors:
            tensors.setdefault(copy, tensors[original])
    return [(copy, tensors[original]) for copy, original in found]


def _check_names(tensors: Mapping[str, Stored], rows: list[Row], family: Family, folder: Path) -> list[Row]:
    """The rows of a head that the files do not have at all. Raises for other missing tensors and for unknown ones."""
    lacking = [row for row in rows if row.name not in tensors]
    head = [row for row in rows if all(part.startswith(family.heads) for part in row.parts)]
    new = head if all(row in lacking for row in head) else []
    missing = {row.name for row in lacking} - {row.name for row in new}
    unknown = {name for name in tensors if not name.endswith(family.ignored)} - {row.name for row in rows}
    for names, what in ((sorted(missing), "missing"), (sorted(unknown), "not part of the model")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"tensor {names[0]}{more}: {what}", where=str(folder))
    for row in rows:
        if row not in new:
            check_type(tensors[row.name])
    return new


def _check_copies(copies: list[tuple[Stored, Stored]]) -> None:
    for copy, original in copies:
        if copy != original and not same_values(copy, original):
            raise CheckpointError(
                f"tensor {copy.name} differs from {original.name}, but the config ties them",
                where=copy.where,
                fix="set tie_word_embeddings to false in config.json",
            )


def _fill_row(row: Row, stored: Stored, state: Mapping[str, Tensor]) -> None:
    tensor = read_tensor(stored)
    fill(row, tensor, state, stored.where)
    for part in row.parts:
        if part in state and _narrower(state[part], tensor) and not bool(state[part].isfinite().all()):
            what = f"tensor {row.name} has values too large for {state[part].dtype}"
            raise CheckpointError(what, where=stored.where, fix="load it in bfloat16 or float32")


def _narrower(a: Tensor, b: Tensor) -> bool:
    """Whether ``b`` can hold numbers that are infinite in the type of ``a``."""
    import torch

    return torch.finfo(a.dtype).max < torch.finfo(b.dtype).max


def _init_head(rows: list[Row], state: Mapping[str, Tensor], config: Any, seed: int, folder: Path) -> None:
    """A head as ``init_weights`` gives it: normal matrices, biases 0, norms 1."""
    import torch

    names = [part for row in rows for part in row.parts if part in state]
    if not names:
        return
    std = config.init_std or config.d_model**-0.5
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        if state[name].dim() == 2:
            state[name].copy_(torch.empty(state[name].shape).normal_(0.0, std, generator=generator))
        else:
            state[name].fill_(0.0 if name.endswith("bias") else 1.0)
    log.warning("%s: the head is not in the files; it is new: %s", folder, ", ".join(names))
