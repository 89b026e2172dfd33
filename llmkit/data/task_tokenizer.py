"""A tokenizer for a model that begins with random weights: trained on the rows of the task, later from the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.data import cache
from llmkit.errors import ConfigError

if TYPE_CHECKING:
    from llmkit.interfaces import Tokenizer, TokenizerSpec
    from llmkit.task_interface import Question


def task_tokenizer(
    specs: Sequence[TokenizerSpec], questions: Sequence[Question], load: Callable[[Path], Tokenizer]
) -> Tokenizer:
    """The tokenizer that the first of ``specs`` opens, or trains on all texts of ``questions``; the next one where
    they are too small for it. All ranks may ask at once. Raises ConfigError where they are too small for the last.
    """
    if (opened := specs[0].open()) is not None:
        return opened
    texts = list(dict.fromkeys(text for question in questions for text in _texts(question.fields)))
    for number, spec in enumerate(specs, 1):
        try:
            return _trained(spec, texts, load)
        except ConfigError:
            if number == len(specs):
                raise
    raise AssertionError("there is at least one specification")


def _trained(spec: TokenizerSpec, texts: Sequence[str], load: Callable[[Path], Tokenizer]) -> Tokenizer:
    """From the cache, or trained now."""
    inputs = {"tokenizer": spec.key(), "texts": hashlib.sha256("\0".join(texts).encode()).hexdigest()}
    root, name = cache.cache_root(None), cache.entry_name(["task_tokenizer"], inputs)
    with cache.locked(root, name):
        if not (root / name).exists():
            with cache.building(root, name) as folder:
                cache.write_inputs(folder, ["task_tokenizer"], inputs)
                spec.train(texts, folder / "tokenizer")
    return load(root / name / "tokenizer")


def _texts(value: Any) -> Iterator[str]:
    """Every text in a record, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
