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
from llmkit.models.head_config import HeadConfig
from llmkit.models.hf import own
from llmkit.models.hf.families import family_named
from llmkit.models.hf.family import Family, Keys
from llmkit.models.hf.generation_file import take_generation
from llmkit.models.hf.rows import Row, fill
from llmkit.models.hf.task_heads import LEFT_ASIDE, HeadTable, head_kind, is_output_layer, read_head, shape_in, table_of
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
from llmkit.models.hf.wrapped_heads import load_wrapped_head
from llmkit.models.transformers_config import is_wrapped

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

log = logging.getLogger("llmkit.models")

FoundHead = tuple[HeadConfig, HeadTable | None]  # the head that the files have, and its table; None: own format


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
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    head: HeadConfig | None = None,
) -> Any:
    """The model of a folder or of a ``.gguf`` file, its weights cast to ``dtype`` (fp32 when None).

    A task head that the files have is the model's ``task_head``. With ``head`` the model has this one: the files' own
    where it answers the same, else a new one, which takes over BERT's pooler or ModernBERT's dense layer. ``seed``
    draws heads that the files lack.

    Tensors are read one by one: the peak of memory is the model and one tensor. Raises ``CheckpointError`` naming file
    and tensor when one is missing, unknown, of another shape, or not finite; ``MemoryBudgetError`` when the model does
    not fit. Names and sizes are checked before anything is allocated.
    """
    tensors: Mapping[str, Stored] = {}
    family: Family | None = None
    if folder.suffix == SUFFIX and folder.is_file():
        from llmkit.models.gguf.load import load_gguf

        model = load_gguf(folder, device=device, dtype=dtype)
    elif is_wrapped(read_json(folder / "config.json")):
        from llmkit.models.transformers_files import load_wrapped

        model = load_wrapped(folder, device=device, dtype=dtype, seed=seed)
        load_wrapped_head(model, folder)
    else:
        model, tensors, family = _load_by_tables(folder, device, dtype, seed, wanted=head is not None)
    if head is not None:
        _want_head(model, head, seed, tensors, family, folder)
    return model


def _load_by_tables(
    folder: Path, device: torch.device | str, dtype: torch.dtype | None, seed: int, *, wanted: bool
) -> tuple[Any, dict[str, Stored], Family]:
    """The model, the tensors of its files by their names in the family's table, and the family.

    ``wanted``: it will have a task head, whatever the files have.
    """
    import torch

    config, family, keys = _read_config(folder)
    found = read_head(keys, family, config)
    stored = _by_current_names(list_tensors(folder), family, folder)
    _check_size(config, stored, folder)
    with torch.device("meta"):
        model = _unfilled(config, found).to(dtype or torch.float32)
    rows = _rows(config, family, found, [name for name, _ in model.named_parameters()])
    tensors = _without_other_heads(stored, rows, family, folder)
    copies = _pop_copies(tensors, rows, family)
    new = _check_names(tensors, rows, family, folder, with_head=head_kind(keys) is not None)
    model = _allocated(model, device, folder)
    state = dict(model.named_parameters())
    with torch.no_grad():
        for row in rows:
            if row not in new:
                _fill_row(row, tensors[row.name], state)
        _check_copies(copies)
        _init_head(new, state, config, seed, folder, used=not wanted and found is None)
    _settle_head(model)
    take_generation(model, folder)
    return model, tensors, family


# -- config ---------------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> tuple[ModelConfig, Family, Keys]:
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
    return config, family, keys


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


def _by_current_names(stored: list[Stored], family: Family, folder: Path) -> dict[str, Stored]:
    """The tensors of a folder under the names of the family's table."""
    found: dict[str, Stored] = {}
    prefixed = any(tensor.name.startswith(family.prefix) for tensor in stored)
    for tensor in stored:
        name = _renamed(tensor.name, family, prefixed)
        if name in found:
            raise CheckpointError(f"tensors {found[name].name} and {tensor.name} are the same one", where=str(folder))
        found[name] = tensor
    return found


def _without_other_heads(found: dict[str, Stored], rows: list[Row], family: Family, folder: Path) -> dict[str, Stored]:
    """Without the tensors of heads that the model does not have; they are named."""
    beginnings, ours = (*family.left_aside, *LEFT_ASIDE), {row.name for row in rows}
    aside = [name for name in found if name.removeprefix(family.prefix).startswith(beginnings) and name not in ours]
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

    For a row in ``ties_absent`` that is not there its original stands in too.
    """
    own_rows = {row.name for row in rows}
    found = []
    for copy, original in family.copies.items():
        if copy in tensors and copy not in own_rows:
            found.append((tensors.pop(copy), original))
            tensors.setdefault(original, found[-1][0])
        elif copy in family.ties_absent and copy in own_rows and original in tensors:
            tensors.setdefault(copy, tensors[original])
    return [(copy, tensors[original]) for copy, original in found]


def _check_names(
    tensors: Mapping[str, Stored], rows: list[Row], family: Family, folder: Path, *, with_head: bool
) -> list[Row]:
    """The rows of output layers that the files lack: all of a family's head, or, in the files of a task head, any
    that it does not read. Raises for other missing tensors and for unknown ones.
    """
    lacking = [row for row in rows if row.name not in tensors]
    head = [row for row in rows if all(part.startswith(family.heads) for part in row.parts)]
    new = head if all(row in lacking for row in head) else []
    if with_head:
        new = [row for row in lacking if all(is_output_layer(part) for part in row.parts)]
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


def _init_head(
    rows: list[Row], state: Mapping[str, Tensor], config: Any, seed: int, folder: Path, *, used: bool
) -> None:
    """A head as ``init_weights`` gives it: normal matrices, biases 0, norms 1. Not ``used``: a task head is."""
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
    if used:
        log.warning("%s: the head is not in the files; it is new: %s", folder, ", ".join(names))
    else:
        log.debug("%s: output layers that the task head does not read are new: %s", folder, ", ".join(names))


# -- task heads -----------------------------------------------------------------------------------------------------


def _unfilled(config: Any, found: FoundHead | None) -> nn.Module:
    """The model with the head of its files, without values."""
    from llmkit.models.heads import put_head

    model: nn.Module = config.build()
    if found is not None:
        head, table = found
        put_head(model, head, shape_in(table, config, head.kind))
    return model


def _rows(config: ModelConfig, family: Family, found: FoundHead | None, names: list[str]) -> list[Row]:
    rows, table = family.rows(config, names), None if found is None else found[1]
    return rows if table is None else [*rows, *table.rows(names)]


def _settle_head(model: Any) -> None:
    """With a task head, the output layers of the language model are not trained."""
    from llmkit.models.heads import freeze_outputs, head_of

    if head_of(model) is not None:
        freeze_outputs(model)


def _want_head(
    model: Any, head: HeadConfig, seed: int, tensors: Mapping[str, Stored], family: Family | None, folder: Path
) -> None:
    """Give the model ``head``: its files' own where that answers the same, else a new one with what they have of it."""
    from llmkit.models.heads import attach_head, head_of, own_dropout

    old = head_of(model)
    if old is not None and old.config.answers_as(head):
        old.take(head.for_model(own_dropout(model)))
        return
    if old is not None:
        what = "spans" if old.config.kind == "span" else f"the labels {', '.join(old.config.labels)}"
        log.warning("%s: its head is left aside: it answers with %s", folder, what)
    attach_head(model, head, seed)
    table = None if family is None else table_of(family, head.kind)
    if table is not None and shape_in(table, model.config, head.kind).same_function(model.task_head.shape):
        _take_over(model, table, tensors, folder)


def _take_over(model: Any, table: HeadTable, tensors: Mapping[str, Stored], folder: Path) -> None:
    """Fill the layers of a new head that belong to the backbone."""
    import torch

    state = dict(model.named_parameters())
    rows = [row for row in table.backbone_rows(state) if row.name in tensors]
    with torch.no_grad():
        for row in rows:
            _fill_row(row, tensors[row.name], state)
    if rows:
        log.info("%s: the head takes over %s", folder, ", ".join(row.name for row in rows))
