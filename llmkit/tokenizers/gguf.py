"""The tokenizer in a GGUF file, rebuilt as a ``tokenizer.json``; ``gguf_fields`` is the other way.

Byte-level BPE is ``gpt2`` there, SentencePiece's BPE ``llama``. Keys:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.errors import DataError
from llmkit.gguf_file import SCORES, TOKENS, TYPES, UNUSED, GGUFFile, read_gguf
from llmkit.tokenizers.added_tokens import entry
from llmkit.tokenizers.ends import template
from llmkit.tokenizers.folder import written
from llmkit.tokenizers.gguf_fields import (
    ADD_BOS,
    ADD_EOS,
    ADD_SPACE,
    BYTE,
    CHAT,
    CONTROL,
    KIND,
    MERGES,
    NAMED_CHATS,
    NORMAL,
    PRE,
    ROLE_KEYS,
    UNKNOWN,
    USER_DEFINED,
    gguf_fields,
)
from llmkit.tokenizers.gguf_splits import BEGIN_FIRST, SPLITS, WHOLE_WORDS, kind_named
from llmkit.tokenizers.hf_files import ModelProto, tokenizer_json
from llmkit.tokenizers.hf_json import HFTokenizer
from llmkit.tokenizers.vocabulary import SPACE

__all__ = ["gguf_fields", "load_gguf_tokenizer"]

_FILLER = re.compile(r"\[PAD\d+\]")  # llama.cpp's names for embedding rows without a token


def load_gguf_tokenizer(path: Path) -> HFTokenizer:
    """The tokenizer of the file at ``path``, its chat template with it.

    Raises ``CheckpointError`` for a damaged file, ``DataError`` for a kind of tokenizer that llmkit does not rebuild.
    """
    file = read_gguf(path)
    pieces = _pieces(file)
    roles = _roles(file, pieces)
    kind = file.text(KIND)
    if kind == "gpt2":
        content = _byte_level(file, pieces, roles)
    elif kind == "llama":
        content = _sentencepiece(file, pieces, roles)
    else:
        raise DataError(
            f"the tokenizer is of the kind {kind!r}; llmkit rebuilds gpt2 and llama",
            where=f"{path}:{KIND}",
            fix="use the model's Hugging Face folder",
        )
    names = {role: pieces[index][0] for role, index in roles.items()}
    return HFTokenizer(written(content), {**names, **_chat_templates(file)}, {}, str(path))


Pieces = list[tuple[str, float, int]]  # text, score, type


def _pieces(file: GGUFFile) -> Pieces:
    """Without those at the end that only fill up the embedding."""
    tokens = file.texts(TOKENS)
    scores = file.numbers(SCORES, len(tokens)) or [0.0] * len(tokens)
    types = file.numbers(TYPES, len(tokens)) or [NORMAL] * len(tokens)
    pieces = [(token, float(score), int(kind)) for token, score, kind in zip(tokens, scores, types, strict=True)]
    while pieces and pieces[-1][2] == UNUSED and _FILLER.fullmatch(pieces[-1][0]):
        pieces.pop()
    if len({token for token, _, _ in pieces}) < len(pieces) or not pieces:
        raise file.error(TOKENS, "must hold every piece once" if pieces else "is missing")
    return pieces


def _roles(file: GGUFFile, pieces: Pieces) -> dict[str, int]:
    found = {role: file.index(key, len(pieces)) for role, key in ROLE_KEYS.items()}
    return {role: index for role, index in found.items() if index is not None}


def _chat_templates(file: GGUFFile) -> dict[str, Any]:
    """As ``tokenizer_config.json`` has them: a text, or a list where some have names."""
    named = {name: file.text(f"{CHAT}.{name}") for name in file.texts(NAMED_CHATS)}
    usual = file.text(CHAT)
    if not named:
        return {} if usual is None else {"chat_template": usual}
    all_of_them = {**({} if usual is None else {"default": usual}), **named}
    return {"chat_template": [{"name": name, "template": text} for name, text in all_of_them.items() if text]}


def _byte_level(file: GGUFFile, pieces: Pieces, roles: Mapping[str, int]) -> dict[str, Any]:
    kind = kind_named(file.text(PRE))
    if kind is None:
        raise DataError(
            f"text is cut before its merges in a way that llmkit does not know: {file.text(PRE)!r}",
            where=f"{file.path}:{PRE}",
            fix=f"use the model's Hugging Face folder; known here: {', '.join(SPLITS)}",
        )
    merges = [merge.split(" ") for merge in file.texts(MERGES)]
    vocabulary = {token: index for index, (token, _, _) in enumerate(pieces)}
    if not all(len(pair) == 2 and all(part in vocabulary for part in (*pair, "".join(pair))) for pair in merges):
        raise file.error(MERGES, "must be pairs of pieces that make a piece")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(pieces, (CONTROL, USER_DEFINED)),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": SPLITS[kind]},
        "post_processor": _ends(file, pieces, roles, bos_first=kind in BEGIN_FIRST),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": kind in WHOLE_WORDS,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _sentencepiece(file: GGUFFile, pieces: Pieces, roles: Mapping[str, int]) -> dict[str, Any]:
    """The space before a text is put there as ``transformers`` does it: not before one that begins with a space."""
    if SCORES not in file.metadata:
        raise file.error(SCORES, "is missing: they decide what is merged")
    prefix = file.flag(ADD_SPACE, True)
    model = ModelProto(
        kind="BPE",
        pieces=pieces,
        dummy_prefix=prefix,
        convertible=True,
        byte_fallback=any(kind == BYTE for _, _, kind in pieces),
        ids={role.removesuffix("_token"): index for role, index in roles.items()},
        complete=True,
        lossy=False,
        space_after=False,
    )
    content = tokenizer_json(model)
    content["added_tokens"] = _added(pieces, (UNKNOWN, CONTROL, USER_DEFINED))
    content["post_processor"] = _ends(file, pieces, roles, bos_first=True)
    if prefix:
        metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
        content |= {"normalizer": None, "pre_tokenizer": metaspace}
    return content


def _added(pieces: Pieces, kinds: tuple[int, ...]) -> list[dict[str, Any]]:
    """Those that are whole wherever they stand, looked for in the text as it is."""
    return [
        entry(index, token, special=kind != USER_DEFINED, normalized=False)
        for index, (token, _, kind) in enumerate(pieces)
        if kind in kinds
    ]


def _ends(file: GGUFFile, pieces: Pieces, roles: Mapping[str, int], *, bos_first: bool) -> dict[str, Any] | None:
    """What the users of the ``tokenizer.json`` get around a text."""
    wanted = {"bos_token": file.flag(ADD_BOS, bos_first), "eos_token": file.flag(ADD_EOS, False)}
    before, after = (
        [(pieces[roles[role]][0], roles[role])] if added and role in roles else [] for role, added in wanted.items()
    )
    return template(before, after)
