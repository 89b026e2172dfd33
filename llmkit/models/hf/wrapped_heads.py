"""The task head of a model that transformers opens: files of its own, in the folder ``task_head`` beside the model's.

transformers reads the model without it; llmkit finds it again. Torch is imported inside the functions only.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmkit.errors import CheckpointError
from llmkit.models.head_config import HeadConfig
from llmkit.models.hf.family import Keys
from llmkit.models.hf.rows import Row, fill
from llmkit.models.hf.task_heads import ACTIVATION, MODULE, shape_of
from llmkit.models.hf.weight_files import WEIGHTS, kind_of, list_tensors, read_json, read_tensor, write_tensors

CONFIG = "config.json"

log = logging.getLogger("llmkit.models")


def save_wrapped_head(model: Any, folder: Path) -> None:
    """Write ``folder/task_head``; one that is there without a head in the model is deleted. Raises ``OSError``."""
    place, head = folder / MODULE, getattr(model, MODULE, None)
    for name in (CONFIG, WEIGHTS):
        (place / name).unlink(missing_ok=True)
    if head is None:
        if place.is_dir():
            place.rmdir()
        return
    place.mkdir(exist_ok=True)
    content = {**asdict(head.config), ACTIVATION: head.shape.activation}
    (place / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    state = {name: parameter.detach().cpu() for name, parameter in head.named_parameters()}
    layout = {name: (kind_of(tensor), tuple(tensor.shape)) for name, tensor in state.items()}
    write_tensors(place / WEIGHTS, layout, state.values())


def load_wrapped_head(model: Any, folder: Path) -> None:
    """Give ``model`` the head in ``folder``; nothing where there is none. Raises ``CheckpointError``."""
    place = folder / MODULE
    if not place.is_dir():
        return
    import torch

    from llmkit.models.heads import attach_head

    config = _read_config(Keys(read_json(place / CONFIG), str(place / CONFIG)), model)
    stored = {tensor.name: tensor for tensor in list_tensors(place)}
    out = stored.get("out.weight")
    if out is None or out.shape[:1] != (config.n_labels,):
        raise CheckpointError(f"tensor out.weight must have {config.n_labels} rows", where=str(place))
    state = dict(attach_head(model, config, seed=0).named_parameters())
    if stored.keys() != state.keys():
        name = min(stored.keys() ^ state.keys())
        raise CheckpointError(f"tensor {name}: missing, or not part of the head", where=str(place))
    with torch.no_grad():
        for name, tensor in stored.items():
            fill(Row(name, (name,)), read_tensor(tensor), state, tensor.where)
    log.info("the values of the head are those of %s", place)


def _read_config(keys: Keys, model: Any) -> HeadConfig:
    kind = keys.choice("kind", "class", {"class": "class", "span": "span"})
    labels = keys.raw.get("labels")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise keys.error("labels", f"must be a list of labels, got {labels!r}")
    keys.expect(ACTIVATION, shape_of(model.config, kind).activation)
    config = HeadConfig(kind, tuple(labels), keys.number_or_none("dropout"))
    if problems := config.problems():
        raise keys.error(*problems[0])
    return config
