"""Opens what ``init`` names: a model, or an adapter with the model that it belongs to."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from llmkit.engine.init import is_adapter, resolve_init
from llmkit.errors import CheckpointError, ConfigError, SetupError
from llmkit.interfaces import ModelConfig, Tokenizer
from llmkit.models.adapters import merge
from llmkit.models.head_config import HeadConfig
from llmkit.models.heads import attach_head, detach_head, freeze_outputs, head_of, own_dropout
from llmkit.models.hf import load_config, load_model
from llmkit.models.hf.peft import load_adapter, save_adapter
from llmkit.models.hf.weight_files import ADAPTER_CONFIG, read_json
from llmkit.tokenizers.folder import tokenizer_file
from llmkit.tokenizers.load import load_tokenizer

log = logging.getLogger("llmkit.models")

WRITERS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # task types of adapters that were trained without a task head
HEAD_FILE = "task_head.json"  # beside an adapter: what its head answers


def open_config(folder: Path) -> ModelConfig:
    """The architecture; of an adapter that of its model."""
    return open_config(_base_of(folder)) if is_adapter(folder) else load_config(folder)


def open_model(folder: Path, *, head: HeadConfig | None = None, **options: Any) -> Any:
    """The model of a folder as ``load_model`` opens it; an adapter is merged into its model.

    ``head`` None takes the head that was saved; with ``head`` the model has this one, new where the saved one answers
    something else. Raises ``CheckpointError`` for an adapter whose model is gone.
    """
    if not is_adapter(folder):
        return load_model(folder, head=head, **options)
    base = _base_of(folder)
    model = open_model(base, head=_saved_head(folder), **options)
    if _adapter_keys(folder).get("task_type") in WRITERS:
        detach_head(model)  # the model may have had one before
    load_adapter(model, folder)  # with the rows of tokens that came with it
    if head_of(model) is not None:
        log.info("the values of the head are those of %s", folder)
    merge(model)
    model.requires_grad_(True)
    if head is not None:
        _want_head(model, head, options.get("seed", 0), folder)
    elif head_of(model) is not None:
        freeze_outputs(model)
    return model


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder; of an adapter without one that of its model."""
    if is_adapter(folder) and tokenizer_file(folder) is None:
        return open_tokenizer(_base_of(folder))
    return load_tokenizer(folder)


def _want_head(model: Any, head: HeadConfig, seed: int, folder: Path) -> None:
    """The head that the adapter was trained with, where it answers the same; else a new one."""
    old = head_of(model)
    if old is not None and old.config.answers_as(head):
        old.take(head.for_model(own_dropout(model)))
        freeze_outputs(model)
        return
    if old is not None:
        log.warning("%s: its head is left aside: it answers something else", folder)
    attach_head(model, head, seed)


def save_adapted(model: Any, folder: Path, base: str) -> None:
    """The adapter in the format of ``peft``, and what its head answers. ``base``: a model folder, or a hub id."""
    path = Path(base)
    save_adapter(model, folder, path.resolve() if path.exists() else base)
    if (head := getattr(model, "task_head", None)) is not None:
        facts = {"kind": head.config.kind, "labels": list(head.config.labels), "dropout": head.config.dropout}
        (folder / HEAD_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def check_base(folder: Path, init: Path | None) -> None:
    """Raise ``CheckpointError`` when the adapter in ``folder`` belongs to another model than that of ``init``."""
    base = _base_of(folder)
    if init is None or base.resolve() != init.resolve():
        what = f"the adapter was trained beside {base}, and init gives {init}"
        raise CheckpointError(what, where=str(folder), fix=f"init={base}, or another run.name")


def _adapter_keys(folder: Path) -> dict[str, Any]:
    return read_json(folder / ADAPTER_CONFIG)


def _base_of(folder: Path) -> Path:
    """The folder of the model that an adapter belongs to."""
    where, key = str(folder / ADAPTER_CONFIG), "base_model_name_or_path"
    base = _adapter_keys(folder).get(key)
    if not isinstance(base, str) or not base:
        raise CheckpointError("the adapter does not say which model it belongs to", where=where, fix=f"write its {key}")
    try:
        found = resolve_init(base)
    except (ConfigError, SetupError) as error:
        what = f"the model that the adapter belongs to is not there: {error.what}"
        raise CheckpointError(what, where=where, fix=f"bring {base} back, or correct {key}") from error
    if found.resolve() == folder.resolve():
        raise CheckpointError("the adapter names itself as its model", where=where, fix=f"correct {key}")
    return found


def _saved_head(folder: Path) -> HeadConfig | None:
    file = folder / HEAD_FILE
    if not file.is_file():
        return None
    facts = read_json(file)
    try:
        return HeadConfig(facts["kind"], tuple(facts["labels"]), facts["dropout"])
    except (KeyError, TypeError) as error:
        raise CheckpointError("it does not say what the head answers", where=str(file)) from error
