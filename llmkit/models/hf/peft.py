"""Adapters as files in the format of the library ``peft``, under the names of Hugging Face modules; both directions.

Where a file holds several of our matrices in one tensor, their adapters are one too: the A's one above the other, the
B's along the diagonal of a larger B, the rank their sum, and ``alpha`` so much larger that the scale stays. That is the
same function. The other way, every part of a fused matrix gets the rows of B that are its own, and of A what they use.
Torch is imported inside the functions only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.errors import CheckpointError
from llmkit.models.adapter_config import LoraConfig
from llmkit.models.hf.family import Keys
from llmkit.models.hf.peft_names import WEIGHT, compress, families, linear_rows, rows_of, tied_names, value_for
from llmkit.models.hf.rows import Row, export, fill
from llmkit.models.hf.weight_files import (
    ADAPTER_CONFIG,
    Stored,
    kind_of,
    read_json,
    read_tensor,
    tensors_in,
    write_tensors,
)

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
TASK_TYPES = {"decoder": "CAUSAL_LM", "encoder_decoder": "SEQ_2_SEQ_LM", "class": "SEQ_CLS", "span": "QUESTION_ANS"}
PLAIN: dict[str, tuple[Any, ...]] = {  # keys with another value change what is computed
    "peft_type": ("LORA",),
    "bias": ("none",),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None, {}),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the frozen weights
}


class Part(NamedTuple):
    """What one of our modules gets of a file."""

    a_RI: Tensor
    b_OR: Tensor
    magnitude_O: Tensor | None
    scale: float


# -- write ----------------------------------------------------------------------------------------------------------


def save_adapter(model: Any, folder: Path, base: str | Path) -> None:
    """Write the adapters, and what is trained whole beside them, into ``folder`` (made if absent).

    ``base`` is the folder or the name of the model that they belong to; a folder's own family gives the names of the
    modules. Raises ``CheckpointError`` for a model without adapters, and when the disk refuses.
    """
    from llmkit.models.adapters import adapters, linear_modules, whole_parameters

    config: LoraConfig | None = getattr(model, "adapter_config", None)
    if config is None:
        raise CheckpointError("the model has no adapter", where=str(folder), fix="save the model itself")
    family = families(model.config, base)[0]
    rows = rows_of(model, family)
    known = linear_rows(rows, linear_modules(model))
    adapted = adapters(model)
    chosen = {name: row for name, row in known.items() if any(_module(part) in adapted for part in row.parts)}
    tensors: dict[str, Tensor] = {}
    sizes = {name: _joined(name, row, model, config, tensors) for name, row in chosen.items()}
    state, whole = dict(model.named_parameters()), whole_parameters(model, config)
    saved = [row for row in rows if any(part in whole for part in row.parts)]
    files = {row.name: export(row, state) for row in saved}
    ties = {copy: name for copy, name in tied_names(model, family, rows).items() if name in files}
    files |= {copy: files[name].clone() for copy, name in ties.items()}
    for name in {name for name in ties.values() if name.endswith(".bias")}:
        del files[name]  # of BERT: it belongs to no module that peft could train, its second name does
    tensors |= {PREFIX + name: tensor for name, tensor in files.items()}
    keys = _keys(model, config, base, compress(sizes, known), list(files))
    keys["fan_in_fan_out"] = any(_is_transposed(row, model) for row in chosen.values())
    layout = {name: (kind_of(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}
    order = sorted(layout, key=lambda name: -tensors[name].itemsize)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ADAPTER_CONFIG).write_text(json.dumps(keys, indent=2) + "\n", encoding="utf-8")
        (folder / WEIGHTS).unlink(missing_ok=True)  # a new file: someone may have the old one mapped
        write_tensors(folder / WEIGHTS, {name: layout[name] for name in order}, (tensors[name] for name in order))
    except OSError as error:
        raise CheckpointError(f"the adapter could not be written: {error}", where=str(folder)) from error


def _joined(name: str, row: Row, model: Any, config: LoraConfig, tensors: dict[str, Tensor]) -> tuple[int, float]:
    """Put the adapter of a row into ``tensors``; returns its rank and alpha."""
    import torch

    modules = {part: model.get_submodule(_module(part)) for part in row.parts}
    adapted = {part: module for part, module in modules.items() if hasattr(module, "lora_A")}
    first = next(iter(adapted.values()))
    rank, scale = sum(module.rank for module in adapted.values()), first.lora_scale
    blocks, magnitudes, start = {}, {}, 0
    for part, module in modules.items():
        n_out = _matrix(module).shape[0]
        blocks[part] = first.lora_B.new_zeros(n_out, rank)
        if part in adapted:
            stop = start + module.rank
            blocks[part][:, start:stop] = module.lora_B.detach() * (module.lora_scale / scale)
            start = stop
        if config.use_dora:
            is_in = part in adapted
            magnitudes[part] = module.lora_magnitude if is_in else _matrix(module).to(first.lora_A.dtype).norm(dim=1)
    plain = replace(row, transposed=False)
    tensors[f"{PREFIX}{name}.{A}"] = torch.cat([module.lora_A.detach().cpu() for module in adapted.values()])
    tensors[f"{PREFIX}{name}.{B}"] = export(plain, blocks)
    if magnitudes:
        tensors[f"{PREFIX}{name}.{MAGNITUDE}"] = export(plain, magnitudes)
    return rank, scale * (rank**0.5 if config.use_rslora else rank)


def _keys(
    model: Any, config: LoraConfig, base: str | Path, sizes: Mapping[str, tuple[int, float]], saved: Iterable[str]
) -> dict[str, Any]:
    """``adapter_config.json``. Ranks and alphas stand in the patterns where they are not the common ones."""
    head = getattr(model, "task_head", None)
    keys: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": TASK_TYPES.get(model.config.kind if head is None else head.config.kind),
        "base_model_name_or_path": str(base),
        "r": config.r,
        "lora_alpha": _round(config.alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(sizes),
        "rank_pattern": {name: rank for name, (rank, _) in sizes.items() if rank != config.r},
        "alpha_pattern": {name: _round(alpha) for name, (_, alpha) in sizes.items() if _round(alpha) != config.alpha},
        "modules_to_save": sorted({_saved_module(name) for name in saved}) or None,
    }
    return keys


def _saved_module(name: str) -> str:
    """The module that peft trains whole: a classifier of several layers is one."""
    module = name.rpartition(".")[0]
    return "classifier" if module.startswith("classifier.") else module


def _round(alpha: float) -> float:
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha


# -- read -----------------------------------------------------------------------------------------------------------


def load_adapter(model: Any, folder: Path) -> LoraConfig:
    """Put the adapters of a folder, written here or by peft, on ``model``; the rest of it is frozen as by ``attach``.

    A model that has adapters of the same shape gets their values. An embedding with more rows than the model's makes
    the model grow. Raises ``CheckpointError`` for other shapes, unknown names and methods that are not computed here.
    """
    import torch

    from llmkit.models.adapters import adapt, adapters, choose_trained, linear_modules

    keys = Keys(read_json(folder / ADAPTER_CONFIG), str(folder / ADAPTER_CONFIG))
    stored = _stored(folder)
    rows, linear = _fitting(model, stored, folder)
    config, whole = _read_config(keys), {row.name: row for row in rows if row.name in stored}
    config = replace(
        config,
        train_embeddings=any(not row.parts[0].startswith("task_head.") for row in whole.values()),
        train_head=any(row.parts[0].startswith("task_head.") for row in whole.values()),
    )
    parts: dict[str, Part] = {}
    for name in sorted({name.rpartition(".lora_")[0] for name in stored if ".lora_" in name}):
        parts |= _split(name, linear[name], model, stored, keys, config)
    _check_attached(adapters(model), parts, folder)
    _fill_whole(model, whole, stored, config)
    with torch.no_grad():
        for name, part in parts.items():
            module = model.get_submodule(name)
            if not hasattr(module, "lora_A"):
                adapt(module, part.a_RI.shape[0], part.scale, config)
            for value, ours in zip(part[:3], (module.lora_A, module.lora_B, module.lora_magnitude), strict=True):
                if ours is not None:
                    ours.copy_(value)
    known = linear_modules(model)
    config = replace(config, targets=sorted(compress(dict.fromkeys(parts), known)))
    choose_trained(model, config)
    return config


def _stored(folder: Path) -> dict[str, Stored]:
    """The tensors by name without the prefix that peft puts before all of them."""
    found = {}
    for tensor in tensors_in(folder / WEIGHTS):
        if not tensor.name.startswith(PREFIX):
            raise CheckpointError(f"tensor {tensor.name} does not begin with {PREFIX}", where=tensor.where)
        found[tensor.name.removeprefix(PREFIX).replace(f"{MAGNITUDE}.weight", MAGNITUDE)] = tensor
    return found


def _read_config(keys: Keys) -> LoraConfig:
    for name, allowed in PLAIN.items():
        keys.expect(name, *allowed)
    config = LoraConfig(
        r=keys.integer("r", 8),
        alpha=keys.number("lora_alpha", 8),
        dropout=keys.number("lora_dropout", 0.0),
        targets=["all_linear"],
        use_rslora=keys.flag("use_rslora", False),
        use_dora=keys.flag("use_dora", False),
        train_embeddings=False,
        train_head=False,
    )
    if problems := config.problems():
        raise CheckpointError("; ".join(f"{name} {what}" for name, what in problems), where=keys.where)
    return config


def _fitting(model: Any, stored: dict[str, Stored], folder: Path) -> tuple[list[Row], dict[str, Row]]:
    """All rows, and those of matrices by module name, of the first family that knows every name in ``stored``.

    Names without the prefix of the family's backbone get it, in place. Raises ``CheckpointError`` when none fits.
    """
    from llmkit.models.adapters import linear_modules

    modules = linear_modules(model)
    unknown: list[list[str]] = []
    for family in families(model.config):
        rows = rows_of(model, family)
        linear = linear_rows(rows, modules)
        copies = tied_names(model, family, rows)
        known = {row.name for row in rows} | {f"{name}.{kind}" for name in linear for kind in (A, B, MAGNITUDE)}
        for prefix in ("", family.prefix if family else ""):
            unknown.append([name for name in stored if prefix + name not in known | copies.keys()])
            if not unknown[-1]:
                found = {prefix + name: tensor for name, tensor in stored.items()}
                stored.clear()
                stored.update({copies.get(name, name): tensor for name, tensor in found.items()})
                stored.update({name: tensor for name, tensor in found.items() if name in known})
                return rows, linear
    fewest: list[str] = min(unknown, key=len)
    name = min(fewest)
    fix = "open the model that adapter_config.json names, with its task head"
    raise CheckpointError(f"tensor {stored[name].name} is not part of the model", where=str(folder), fix=fix)


def _split(
    name: str, row: Row, model: Any, stored: Mapping[str, Stored], keys: Keys, config: LoraConfig
) -> dict[str, Part]:
    """What each of our modules gets of the adapter of one of theirs."""
    kinds = (A, B, MAGNITUDE) if config.use_dora else (A, B)
    for kind in kinds:
        if f"{name}.{kind}" not in stored:
            raise CheckpointError(f"tensor {name}.{kind} is missing", where=keys.where)
    a_RI, b_OR, *magnitude = (read_tensor(stored[f"{name}.{kind}"]) for kind in kinds)
    modules = {part: model.get_submodule(_module(part)) for part in row.parts}
    shapes = {part: tuple(_matrix(module).shape) for part, module in modules.items()}
    rank, n_in = a_RI.shape[0], shapes[row.parts[0]][1]
    if tuple(a_RI.shape) != (rank, n_in) or rank < 1:
        what = f"tensor {name}.{A} has the shape {tuple(a_RI.shape)}, the model needs (r, {n_in})"
        raise CheckpointError(what, where=keys.where)
    b_of = {part: b_OR.new_zeros(n_out, rank) for part, (n_out, _) in shapes.items()}
    m_of = {part: b_OR.new_zeros(n_out) for part, (n_out, _) in shapes.items()}
    fill(replace(row, transposed=False), b_OR, b_of, stored[f"{name}.{B}"].where)
    for tensor in magnitude:
        fill(replace(row, transposed=False), tensor, m_of, stored[f"{name}.{MAGNITUDE}"].where)
    alpha = value_for(name, keys.inner("alpha_pattern").raw, config.alpha)
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise keys.error("alpha_pattern", f"has {alpha!r} for {name}")
    scale = replace(config, alpha=float(alpha)).scale(rank)
    chosen = _columns(row, b_of, modules, rank)
    if magnitude:  # a length may be trained where no direction is
        chosen = {part: chosen.get(part, list(range(rank))) for part in row.parts}
    return {
        _module(part): Part(a_RI[columns], b_of[part][:, columns], m_of[part] if magnitude else None, scale)
        for part, columns in chosen.items()
    }


def _columns(row: Row, b_of: Mapping[str, Tensor], modules: Mapping[str, Any], rank: int) -> dict[str, list[int]]:
    """The columns of B that belong to each part of a fused matrix.

    Where no column is used by two parts, each gets those it uses, and a part that uses none gets no adapter; else, or
    where nothing is used yet, each gets all. A model that has adapters says itself how many columns each part has, one
    part after another.
    """
    ranks = {part: module.rank for part, module in modules.items() if hasattr(module, "lora_A")}
    used = {part: b_of[part].any(dim=0).nonzero().flatten().tolist() for part in row.parts}
    found = {part: columns for part, columns in used.items() if columns}
    if ranks and sum(ranks.values()) == rank:
        found, start = {}, 0
        for part, own in ranks.items():
            found[part], start = list(range(start, start + own)), start + own
    apart = sum(map(len, found.values())) == len({column for columns in found.values() for column in columns})
    if found and apart and all(set(columns) <= set(found.get(part, ())) for part, columns in used.items()):
        return found
    return {part: list(range(rank)) for part in row.parts}


def _check_attached(attached: Mapping[str, Any], parts: Mapping[str, Part], folder: Path) -> None:
    """Adapters that are there must be those of the file."""
    if not attached:
        return
    if attached.keys() != parts.keys():
        name = min(attached.keys() ^ parts.keys())
        there = "the model" if name in attached else "the file"
        raise CheckpointError(f"only {there} has an adapter on {name}", where=str(folder), fix="attach none before")
    for name, part in parts.items():
        module = attached[name]
        ours = module.rank, module.lora_magnitude is not None, module.lora_scale
        theirs = part.a_RI.shape[0], part.magnitude_O is not None, part.scale
        if ours[:2] != theirs[:2] or abs(ours[2] - theirs[2]) > 1e-6 * ours[2]:
            what = f"the adapter of {name} has (rank, DoRA, scale) {theirs} in the file, {ours} in the model"
            raise CheckpointError(what, where=str(folder), fix="use the settings in adapter_config.json")


def _fill_whole(model: Any, whole: Mapping[str, Row], stored: Mapping[str, Stored], config: LoraConfig) -> None:
    """Fill what the file holds whole, after the vocabulary has grown to the rows of its embedding."""
    import torch

    from llmkit.models.adapters import whole_parameters
    from llmkit.models.resize import resize_embeddings

    ours = whole_parameters(model, config)
    for name, row in whole.items():
        if not all(part in ours for part in row.parts):
            what = (
                f"tensor {name} is trained whole, which llmkit does with embeddings, output matrix and task head only"
            )
            raise CheckpointError(what, where=stored[name].where)
    n_rows = [stored[name].shape[0] for name, row in whole.items() if not row.parts[0].startswith("task_head.")]
    if n_rows and max(n_rows) > model.config.vocab_rows:
        resize_embeddings(model, max(n_rows))
    state = dict(model.named_parameters())
    with torch.no_grad():
        for name, row in whole.items():
            fill(row, read_tensor(stored[name]), state, stored[name].where)


# -- both -----------------------------------------------------------------------------------------------------------


def _module(weight: str) -> str:
    return weight.removesuffix(WEIGHT)


def _matrix(module: Any) -> Tensor:
    """The weight of one of our modules as outputs x inputs."""
    from llmkit.models.adapters import is_transposed

    weight: Tensor = module.weight.detach()
    return weight.t() if is_transposed(module) else weight


def _is_transposed(row: Row, model: Any) -> bool:
    from llmkit.models.adapters import is_transposed

    return row.transposed or is_transposed(model.get_submodule(_module(row.parts[0])))
