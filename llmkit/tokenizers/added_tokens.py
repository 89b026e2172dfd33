"""Tokens put on top of a vocabulary: what the files beside it say of them, and how ``tokenizer.json`` says the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmkit.errors import DataError
from llmkit.tokenizers.bert_files import named

ADDED_FILE = "added_tokens.json"  # of older folders: name -> id
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_FIX = "let transformers write a tokenizer.json: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"

Entry = dict[str, Any]  # one of "added_tokens" in a tokenizer.json: id, content and the flags


def entry(index: int, name: str, *, special: bool = True, **flags: Any) -> Entry:
    """A token as ``tokenizer.json`` lists it. Ordinary ones are looked for in normalised text, as everywhere."""
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special, "special": special}
    return {"id": index, "content": name, **usual, **{name: bool(flags[name]) for name in _FLAGS if name in flags}}


def special_names(settings: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Names that the settings give to roles or list as special, with the flags that stand beside them."""
    found: dict[str, Mapping[str, Any]] = {}
    listed = [item for key in LISTS for item in _items(settings.get(key))]
    for value in [*(settings.get(role) for role in ROLES), *listed]:
        if (name := named({"token": value}, "token")) is not None:
            flags = value if isinstance(value, Mapping) else {}
            found[name] = {key: flags[key] for key in _FLAGS if key in flags and key != "special"}
    return found


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list) else ()


def stated_tokens(settings: Mapping[str, Any], old_file: Mapping[str, Any], where: str) -> list[Entry]:
    """The tokens whose ids ``added_tokens_decoder`` or, where there is none, ``added_tokens.json`` states, by id."""
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, Mapping):
        stated = [(index, value) for index, value in decoder.items() if named({"token": value}, "token")]
    else:
        special = special_names(settings)
        stated = [(index, {"content": name, "special": name in special}) for name, index in old_file.items()]
    try:
        entries = [_stated(int(index), value) for index, value in stated]
    except (TypeError, ValueError):
        raise DataError("an added token has no id that is a number", where=where) from None
    return sorted(entries, key=lambda item: int(item["id"]))


def _stated(index: int, value: Any) -> Entry:
    flags = {**value} if isinstance(value, Mapping) else {"content": value}
    return entry(index, flags.pop("content"), special=bool(flags.pop("special", False)), **flags)


def vocabulary_of(content: Mapping[str, Any]) -> dict[str, int]:
    """Every name of a ``tokenizer.json`` and its id, added tokens included."""
    vocab = content["model"]["vocab"]
    names = dict(vocab) if isinstance(vocab, Mapping) else {item[0]: index for index, item in enumerate(vocab)}
    return names | {item["content"]: item["id"] for item in content.get("added_tokens") or []}


def with_added(content: Mapping[str, Any], tokens: Iterable[Entry], where: str) -> dict[str, Any]:
    """The ``tokenizer.json`` with ``tokens``, the flags of those that it has already replaced by theirs.

    Raises ``DataError`` naming the token when its id is another one in the vocabulary, is taken, or leaves a gap.
    """
    vocabulary = vocabulary_of(content)
    taken = {index: name for name, index in vocabulary.items()}
    free = max(taken, default=-1) + 1
    added = {item["id"]: item for item in content.get("added_tokens") or []}
    for token in tokens:
        name, index = token["content"], token["id"]
        if vocabulary.setdefault(name, index) != index:
            raise DataError(f"token {name!r} has the ids {index} and {vocabulary[name]}", where=where, fix=_FIX)
        if taken.setdefault(index, name) != name:
            raise DataError(f"the tokens {taken[index]!r} and {name!r} share the id {index}", where=where, fix=_FIX)
        if index > free:
            raise DataError(f"token {name!r} has the id {index}, but {free} is the next one", where=where, fix=_FIX)
        free += index == free
        added[index] = token
    return {**content, "added_tokens": [added[index] for index in sorted(added)]}


def special_entries(settings: Mapping[str, Any], vocabulary: Mapping[str, int]) -> list[Entry]:
    """The special tokens that the settings name and the vocabulary has, as entries."""
    special = special_names(settings)
    return [entry(vocabulary[name], name, **flags) for name, flags in special.items() if name in vocabulary]
