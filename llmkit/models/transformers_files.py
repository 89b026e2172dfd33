"""Folders of wrapped models. Weights and ``config.json`` are read by llmkit and handed to ``transformers`` as values.

So no file names code, other files or the network; the library's own table of renamed tensors is applied all the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from llmkit.errors import CheckpointError, ConfigError
from llmkit.models.hf.family import Keys
from llmkit.models.hf.generation_file import GENERATION_FILE, generation_settings, take_generation
from llmkit.models.hf.own import KEY as OURS
from llmkit.models.hf.weight_files import MAX_GROWTH, MAX_LAYERS, TYPES, Stored, list_tensors, read_json, read_tensor
from llmkit.models.transformers_build import (
    LENGTHS,
    hf_config,
    known_length,
    new_module,
    quiet,
    settings_of,
    text_of,
)
from llmkit.models.transformers_config import KEY, TransformersConfig, is_wrapped
from llmkit.models.transformers_model import WRAPPERS, Wrapped

log = logging.getLogger("llmkit.models")

MAX_BUFFER_BYTES = 1 << 32  # what is computed when a model is made, such as masks for every pair of positions
MAX_NUMBER = 1 << 40  # a size above it is a mistake, and lists as long as that must not be made


def wrapped_config(folder: Path, chosen: TransformersConfig | None = None) -> TransformersConfig:
    """The config of a folder that was saved here, or of anyone's when ``chosen`` says how to open it.

    ``chosen.max_seq_len`` counts where the architecture has no limit of its own. Raises ``CheckpointError``.
    """
    path = folder / "config.json"
    keys = Keys(read_json(path), str(path))
    task, limit = _ours(keys) if is_wrapped(keys.raw) else (None, None)
    if chosen is not None and limit is None:
        task = chosen.task
    if task not in WRAPPERS:
        raise keys.error(f"{OURS}.{KEY}", f"must be one of {', '.join(WRAPPERS)}, got {task!r}")
    keys.expect("quantization_config", None)
    _check_sizes(keys.raw, keys)
    settings = settings_of(keys.raw)
    model_type = settings.pop("model_type", None)
    if not isinstance(model_type, str):
        raise keys.error("model_type", f"must be a name, got {model_type!r}")
    vocab_size = settings.pop("vocab_size", None)
    given = TransformersConfig(task, model_type, settings, vocab_size, 1)
    try:
        made = hf_config(given, as_they_are=True)
        settings |= {name: value for name in LENGTHS if isinstance(value := getattr(text_of(made), name, None), int)}
        with torch.device("meta"):
            length = limit or known_length(new_module(given, made)) or (chosen.max_seq_len if chosen else 1)
    except ConfigError as error:
        raise CheckpointError(error.what, where=str(path), fix=error.fix) from error
    return TransformersConfig(task, model_type, settings, text_of(made).vocab_size, length)


def load_wrapped(
    folder: Path,
    chosen: TransformersConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Wrapped:
    """The model of a folder, in ``dtype`` (fp32 when None); ``seed`` draws a head that the files lack.

    Raises ``CheckpointError`` naming the tensor when one is missing, unknown, mis-shaped or not finite.
    """
    config = wrapped_config(folder, chosen)
    stored = list_tensors(folder)
    try:
        model = config.build()
        _check_growth(model.hf, stored, folder)
        module = _filled(model, _state(model, stored), dtype or torch.float32, seed, folder)
        model.take(module.to(device))
        take_generation(model, folder)
    except ConfigError as error:
        raise CheckpointError(error.what, where=str(folder), fix=error.fix) from error
    return model


def save_wrapped(
    model: Any, folder: Path, bos_id: int | None, eos_id: int | None, pad_id: int | None, max_shard_bytes: int
) -> None:
    """Write config, weights and generation config; the last one as ``save_model``. Raises ``CheckpointError``."""
    hf = model.hf
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
    if model.config.kind == "encoder_decoder":
        ids["decoder_start_token_id"] = pad_id  # what llmkit's objectives begin a target with
    setattr(hf.config, OURS, {KEY: model.config.task, "max_seq_len": model.config.max_seq_len})
    try:
        with quiet():
            hf.save_pretrained(folder, max_shard_size=max_shard_bytes)
        if (file := folder / GENERATION_FILE).is_file():
            file.write_text(json.dumps(generation_settings(model, ids), indent=2) + "\n", encoding="utf-8")
        mode = (folder / "config.json").stat().st_mode  # as the umask has it; safetensors writes 0600
        for path in folder.glob("model*.safetensors"):
            path.chmod(mode)
    except (OSError, SafetensorError, ValueError) as error:  # ValueError: generation settings that contradict
        raise CheckpointError(f"the model could not be written: {error}", where=str(folder)) from error


# -- private --------------------------------------------------------------------------------------------------------


def _ours(keys: Keys) -> tuple[Any, int]:
    inner = Keys(keys.raw[OURS], f"{keys.where}:{OURS}")
    length = inner.integer("max_seq_len")
    if length < 1:
        raise inner.error("max_seq_len", f"must be at least 1, got {length}")
    return inner.raw[KEY], length


def _check_sizes(raw: Mapping[str, Any], keys: Keys) -> None:
    """Refuse absurd numbers before a list is made as long as they say."""
    for name, value in raw.items():
        if isinstance(value, Mapping):
            _check_sizes(value, keys)
        elif isinstance(value, int) and value > (MAX_LAYERS if "layer" in name else MAX_NUMBER):
            raise keys.error(name, "is absurdly large")


def _check_growth(module: nn.Module, stored: list[Stored], folder: Path) -> None:
    """Refuse a config that asks for far more than the files hold; ``module`` has no memory yet."""
    held = sum(prod(tensor.shape) for tensor in stored)
    asked = sum(parameter.numel() for parameter in module.parameters())
    n_bytes = sum(buffer.nbytes for buffer in module.buffers())
    if asked > MAX_GROWTH * held:
        what = f"config.json asks for {asked:,} parameters, the weights hold {held:,}"
        raise CheckpointError(what, where=str(folder))
    if n_bytes > MAX_BUFFER_BYTES:
        raise CheckpointError(f"config.json asks for {n_bytes:,} bytes of masks and tables", where=str(folder))


def _state(model: Wrapped, stored: list[Stored]) -> dict[str, Tensor]:
    """The tensors of the files; masks and positions that old files hold as integers or booleans are left out."""
    wanted = model.hf.state_dict().keys()
    return {tensor.name: read_tensor(tensor) for tensor in stored if tensor.kind in TYPES or tensor.name in wanted}


def _filled(model: Wrapped, state: dict[str, Tensor], dtype: torch.dtype, seed: int, folder: Path) -> Any:
    """A module with these weights, under the names it has today."""
    given = {"config": model.hf.config, "state_dict": state, "dtype": dtype, "ignore_mismatched_sizes": True}
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module, info = type(model.hf).from_pretrained(None, **given, output_loading_info=True)
    except Exception as error:  # whatever the library's conversions raise
        raise CheckpointError(f"transformers cannot read the weights: {error}", where=str(folder)) from error
    _check_found(module, info, folder)
    trained = {name: parameter.requires_grad for name, parameter in model.hf.named_parameters()}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trained[name])  # sinusoids stay as they are, which the library forgets
        if dtype == torch.float16 and not bool(parameter.isfinite().all()):
            what = f"tensor {name} has values too large for {dtype}"
            raise CheckpointError(what, where=str(folder), fix="load it in bfloat16 or float32")
    return module


def _check_found(module: Any, info: Mapping[str, Any], folder: Path) -> None:
    """Only what stands outside of the backbone may be new or left aside; both are announced."""
    for name, theirs, ours in sorted(info["mismatched_keys"]):
        what = f"tensor {name} has the shape {tuple(theirs)}, the config needs {tuple(ours)}"
        raise CheckpointError(what, where=str(folder))
    backbone = f"{module.base_model_prefix}."
    head = {name for name in module.state_dict() if not name.startswith(backbone)}
    missing, unknown = set(info["missing_keys"]), set(info["unexpected_keys"])
    is_new = bool(missing) and missing <= head and not unknown & head
    aside = {name for name in unknown if not name.startswith(backbone)}
    for names, what in ((set() if is_new else missing, "missing"), (unknown - aside, "not part of the model")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"tensor {min(names)}{more}: {what}", where=str(folder))
    if is_new:
        log.warning("%s: the head is not in the files; it is new: %s", folder, ", ".join(sorted(missing)))
    if aside:
        log.info("%s: tensors of other heads are left aside: %s", folder, ", ".join(sorted(aside)))
