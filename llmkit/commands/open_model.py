"""Opens what ``init`` names: a model, or an adapter with the model that it belongs to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmkit.engine.init import ADAPTER_CONFIG, is_adapter, resolve_init
from llmkit.errors import CheckpointError
from llmkit.interfaces import ModelConfig
from llmkit.models.adapters import merge
from llmkit.models.head_config import HeadConfig
from llmkit.models.hf import load_config, load_model
from llmkit.models.hf.peft import load_adapter, save_adapter

HEAD_FILE = "task_head.json"  # beside an adapter: what its head answers


def open_config(folder: Path) -> ModelConfig:
    """The architecture; of an adapter that of its model."""
    return load_config(_base_of(folder) if is_adapter(folder) else folder)


def open_model(folder: Path, *, head: HeadConfig | None = None, **options: Any) -> Any:
    """The model of a folder as ``load_model`` opens it; an adapter is merged into its model.

    ``head`` None takes the head that was saved. Raises ``CheckpointError`` for an adapter whose model is gone.
    """
    if not is_adapter(folder):
        return load_model(folder, head=head, **options)
    model = load_model(_base_of(folder), head=_saved_head(folder), **options)
    load_adapter(model, folder)
    merge(model)
    model.requires_grad_(True)
    return model


def save_adapted(model: Any, folder: Path, base: str) -> None:
    """The adapter in the format of ``peft``, and what its head answers. ``base``: a model folder, or a hub id."""
    path = Path(base)
    save_adapter(model, folder, path.resolve() if path.exists() else base)
    if (head := getattr(model, "task_head", None)) is not None:
        facts = {"kind": head.config.kind, "labels": list(head.config.labels), "dropout": head.config.dropout}
        (folder / HEAD_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _base_of(folder: Path) -> Path:
    keys = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = keys.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError("the adapter does not say which model it belongs to", where=str(folder / ADAPTER_CONFIG))
    return resolve_init(base)


def _saved_head(folder: Path) -> HeadConfig | None:
    file = folder / HEAD_FILE
    if not file.is_file():
        return None
    facts = json.loads(file.read_text(encoding="utf-8"))
    return HeadConfig(facts["kind"], tuple(facts["labels"]), facts["dropout"])
