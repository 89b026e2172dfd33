"""``generation_config.json``: the tokens that end a text, and how the model's authors sample.

A model carries what its folder says: ``end_ids`` end what it writes, ``sampling`` is only written back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.errors import CheckpointError
from llmkit.models.hf.weight_files import read_json

GENERATION_FILE = "generation_config.json"
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
_EOS = "eos_token_id"


def take_generation(model: Any, folder: Path) -> None:
    """Sets ``end_ids`` and ``sampling`` of ``model``. The end tokens of ``config.json`` count where the other file has
    none. Raises ``CheckpointError`` for end tokens that are no ids."""
    file = folder / GENERATION_FILE
    settings = read_json(file) if file.is_file() else {}
    found = settings.get(_EOS)
    where = file if found is not None else folder / "config.json"
    found = read_json(where).get(_EOS) if found is None else found
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if any(type(index) is not int for index in ids):
        what = f"{_EOS} must be an id or a list of ids, got {found!r:.100}"
        raise CheckpointError(what, where=str(where), fix="correct it")
    model.end_ids = tuple(ids)
    model.sampling = {name: settings[name] for name in SAMPLING if isinstance(settings.get(name), int | float)}


def generation_settings(model: Any, ids: Mapping[str, int | None]) -> dict[str, Any]:
    """The content of the file: the special ids, every end token of ``model``, and how its authors sample."""
    ends = [*getattr(model, "end_ids", ())]
    if (eos_id := ids[_EOS]) is not None and eos_id not in ends:
        ends.append(eos_id)
    known: dict[str, Any] = {name: index for name, index in ids.items() if index is not None}
    if ends:
        known[_EOS] = ends if len(ends) > 1 else ends[0]
    return {**known, **getattr(model, "sampling", {})}
