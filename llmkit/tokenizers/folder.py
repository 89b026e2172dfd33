"""The tokenizer files of a folder that others made, whatever their kind, as one ``tokenizer.json`` and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.errors import ConfigError, DataError
from llmkit.safe_files import read_text
from llmkit.tokenizers import byte_level_files
from llmkit.tokenizers.added_tokens import ADDED_FILE, stated_tokens, with_added
from llmkit.tokenizers.bert_files import VOCAB_FILE, read_vocab_txt, with_ends
from llmkit.tokenizers.hf_files import (
    CONFIG_FILE,
    FORMAT_KEY,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    WORDPIECE,
    template_files,
)
from llmkit.tokenizers.sentencepiece_files import MODEL_FILES, read_sentencepiece, rules

MARIAN_FILE = "source.spm"  # with target.spm and vocab.json; what stands beside it has been made from them
# The first that is there is read
FILES = (MARIAN_FILE, TOKENIZER_FILE, *MODEL_FILES, VOCAB_FILE, byte_level_files.VOCAB_FILE)
MAP_FILE = "special_tokens_map.json"


@dataclass(frozen=True)
class Source:
    """What decides a tokenizer: the text of ``tokenizer.json``, the settings, and files that are kept beside it."""

    content: str
    settings: dict[str, Any]
    side_files: dict[str, bytes]  # by their path in the folder
    where: str


def tokenizer_file(folder: Path) -> Path | None:
    """The file of a folder that decides the ids, if there is one."""
    found = (folder / name for name in FILES if (folder / name).is_file())
    return next((file for file in found if file.name != byte_level_files.VOCAB_FILE or _has_merges(file)), None)


def stands_alone(file: Path) -> bool:
    """Whether nothing beside a SentencePiece model adds to it or changes its rules."""
    beside = (MAP_FILE, CONFIG_FILE, ADDED_FILE, TEMPLATE_FILE)
    model_type = str(read_json(file.with_name("config.json")).get("model_type"))
    return not any(file.with_name(name).is_file() for name in beside) and rules({}, model_type) == "None"


def _has_merges(file: Path) -> bool:
    return file.with_name(byte_level_files.MERGES_FILE).is_file()


def read_source(path: Path) -> Source:
    """From a tokenizer's file or its folder, with the settings beside it.

    Raises ``ConfigError`` where there is nothing to read, ``DataError`` for damaged files and rules llmkit has not.
    """
    file = (tokenizer_file(path) or path / TOKENIZER_FILE) if path.is_dir() else path
    settings = {**read_json(file.with_name(MAP_FILE)), **read_json(file.with_name(CONFIG_FILE))}
    model_type = str(read_json(file.with_name("config.json")).get("model_type"))
    old_file = read_json(file.with_name(ADDED_FILE))
    try:
        if file.name in MODEL_FILES:
            content, settings = read_sentencepiece(file, settings, model_type, old_file)
        elif file.name == VOCAB_FILE:
            content = read_vocab_txt(file, settings)
        elif file.name == byte_level_files.VOCAB_FILE:
            content, settings = byte_level_files.read_byte_level(file.parent, settings, model_type)
        else:
            text = read_text(file)
            return Source(
                _completed(text, settings, old_file, str(file)), settings, template_files(file.parent), str(file)
            )
    except (OSError, UnicodeDecodeError) as error:
        what = f"the tokenizer cannot be read: {error}"
        raise ConfigError(what, where=str(file), fix="give a tokenizer.json or its folder") from error
    content = with_added(content, stated_tokens(settings, old_file, str(file)), str(file))
    return Source(written(content), settings, template_files(file.parent), str(file))


def written(content: Mapping[str, Any]) -> str:
    """As a file of a saved tokenizer."""
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _completed(text: str, settings: Mapping[str, Any], old_file: Mapping[str, Any], where: str) -> str:
    """A ``tokenizer.json`` with the added tokens that only the files beside it know; unchanged if there are none.

    One that llmkit trained and saved for a decoder is again as it was trained.
    """
    tokens = stated_tokens(settings, old_file, where)
    trained_here = settings.get(FORMAT_KEY) == WORDPIECE
    if not tokens and not trained_here:
        return text
    try:
        text = with_ends(text, "encoder") if trained_here else text
        content = json.loads(text)
        known = {(item["id"], item["content"]): item for item in content.get("added_tokens") or []}
        decides = isinstance(settings.get("added_tokens_decoder"), Mapping)
        new = [token for token in tokens if (token["id"], token["content"]) not in known]
        changed = [token for token in tokens if decides and token != known.get((token["id"], token["content"]), token)]
        return written(with_added(content, [*changed, *new], where)) if changed or new else text
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"no readable tokenizer.json: {str(error)[:200]}", where=where) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; nothing where it is absent. Raises ``DataError`` when it is damaged, ``CheckpointError`` as
    ``safe_files``."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"no readable JSON: {error}", where=str(path)) from error
    return content if isinstance(content, dict) else {}
