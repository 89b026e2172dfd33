"""GPT-2's ``vocab.json`` and ``merges.txt`` as a ``tokenizer.json``, with the rules of GPT-2 or of RoBERTa and BART."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.errors import DataError
from llmkit.safe_files import read_bytes, read_text
from llmkit.tokenizers.added_tokens import special_entries, with_added
from llmkit.tokenizers.bert_files import named
from llmkit.tokenizers.ends import template

VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
_END = "<|endoftext|>"
_GPT2 = {"bos_token": _END, "eos_token": _END, "unk_token": _END}
_ROBERTA = {
    **{"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>", "unk_token": "<unk>"},
    **{"pad_token": "<pad>", "mask_token": "<mask>"},
}
_ROLES = {  # of tokenizer_class, without "Fast"
    **dict.fromkeys(("GPT2Tokenizer", "GPTNeoXTokenizer"), _GPT2),
    **dict.fromkeys(("RobertaTokenizer", "BartTokenizer", "LongformerTokenizer", "LEDTokenizer"), _ROBERTA),
}
_GENERAL = ("PreTrainedTokenizer", "TokenizersBackend", "None")  # classes that say nothing of the rules
_OF_MODEL_TYPE = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "opt", "gpt_neox", "codegen"), "GPT2Tokenizer"),
    **dict.fromkeys(("roberta", "bart", "longformer", "led"), "RobertaTokenizer"),
}


def read_byte_level(
    folder: Path, settings: Mapping[str, Any], model_type: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(``tokenizer.json``, the settings with the class's usual names of special tokens) of a folder.

    Raises ``DataError`` for damaged files and for classes with other rules.
    """
    vocabulary = _vocabulary(folder / VOCAB_FILE)
    roles = _roles(settings, model_type, vocabulary, folder)
    known = {role: name for role, name in roles.items() if name in vocabulary}
    complete = {**known, **{key: value for key, value in settings.items() if value is not None}}
    prefix = bool(settings.get("add_prefix_space", False))
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": True},
        "post_processor": _around(complete, vocabulary, roles is _ROBERTA, prefix),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(folder / MERGES_FILE),
        },
    }
    return with_added(content, special_entries(complete, vocabulary), str(folder / VOCAB_FILE)), complete


def _vocabulary(file: Path) -> dict[str, int]:
    try:
        content = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"no readable JSON: {error}", where=str(file)) from error
    if not isinstance(content, dict) or not content or any(type(index) is not int for index in content.values()):
        raise DataError("it must hold an id for every piece", where=str(file))
    if sorted(content.values()) != list(range(len(content))):
        raise DataError("the ids must be 0, 1, 2 ... without gaps", where=str(file))
    return content


def _merges(file: Path) -> list[list[str]]:
    """Pairs in order of rank; ``#version`` lines are left out. Only line feeds end a line: pieces may hold others."""
    try:
        lines = read_bytes(file).decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the merges cannot be read: {error}", where=str(file)) from error
    merges = []
    for number, line in enumerate(lines, 1):
        pair = line.removesuffix("\r").split(" ")
        if line.strip() and not line.startswith("#version"):
            if len(pair) != 2 or not all(pair):
                raise DataError("a merge is two pieces with a space between them", where=f"{file}:{number}")
            merges.append(pair)
    return merges


def _roles(settings: Mapping[str, Any], model_type: str, vocabulary: Mapping[str, int], folder: Path) -> dict[str, str]:
    kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
    if kind in _GENERAL:
        by_names = "RobertaTokenizer" if {"<s>", "</s>", "<mask>"} <= vocabulary.keys() else "GPT2Tokenizer"
        kind = _OF_MODEL_TYPE.get(model_type, by_names)
    if kind not in _ROLES:
        what = f"these {VOCAB_FILE} and {MERGES_FILE} go by other rules than GPT-2's ({kind})"
        fix = "let transformers write a tokenizer.json: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        raise DataError(what, where=str(folder), fix=fix)
    return _ROLES[kind]


def _around(
    settings: Mapping[str, Any], vocabulary: Mapping[str, int], roberta: bool, prefix: bool
) -> dict[str, Any] | None:
    """What the users of the ``tokenizer.json`` get around a text."""
    if roberta:
        sep, cls = (named(settings, role) or _ROBERTA[role] for role in ("sep_token", "cls_token"))
        if sep in vocabulary and cls in vocabulary:
            ends = {"sep": [sep, vocabulary[sep]], "cls": [cls, vocabulary[cls]]}
            return {"type": "RobertaProcessing", **ends, "trim_offsets": True, "add_prefix_space": prefix}
    bos = named(settings, "bos_token")
    if settings.get("add_bos_token") and bos in vocabulary:
        return template([(str(bos), vocabulary[str(bos)])], [])
    return None
