"""How the kinds of byte-level BPE named in GGUF files cut a text before their merges, as steps of ``tokenizer.json``.

Kinds and expressions: ``tokenizer_pre`` in src/llama-vocab.cpp of https://github.com/ggml-org/llama.cpp. Where it has a
regular expression of the ``tokenizers`` package's own, that step stands here instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Step = dict[str, Any]

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"


def _bytes(use_regex: bool) -> Step:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _cut(pattern: str) -> list[Step]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _bytes(use_regex=False)]


SPLITS: dict[str, list[Step]] = {
    "gpt-2": [_bytes(use_regex=True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _bytes(use_regex=True)],
    "llama-bpe": _cut(rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"),
    "qwen2": _cut(rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"),
    "tekken": _cut(rf"{_LOWER}|{_UPPER}|\p{{N}}|{_REST_WITH_SLASH}"),
    "gpt-4o": _cut(rf"{_LOWER}{_ENDINGS}?|{_UPPER}{_ENDINGS}?|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}"),
}
_OTHER_NAMES = {
    **dict.fromkeys(("phi-2", "mpt", "olmo"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3"), "llama-bpe"),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez"), "qwen2"),
    "llama4": "gpt-4o",
}
WHOLE_WORDS = ("llama-bpe", "tekken")  # a word that is a piece is taken whole, whatever the merges
BEGIN_FIRST = ("llama-bpe", "tekken")  # the begin symbol stands before a text where the file says nothing


def kind_named(name: str | None) -> str | None:
    """The kind of a file's ``tokenizer.ggml.pre``; None for one that is not known here."""
    known = _OTHER_NAMES.get(name or "", name)
    return known if known in SPLITS else None


def kind_of(pre_tokenizer: Mapping[str, Any] | None) -> str | None:
    """The kind that cuts a text as a ``pre_tokenizer`` of ``tokenizer.json`` does; None where there is none."""
    steps = _plain_steps(pre_tokenizer)
    return next((kind for kind, known in SPLITS.items() if [_comparable(step) for step in known] == steps), None)


def _plain_steps(node: Mapping[str, Any] | None) -> list[Step]:
    steps = [] if node is None else node.get("pretokenizers", [node])
    return [_comparable(step) for step in steps]


def _comparable(step: Mapping[str, Any]) -> Step:
    """Without what changes offsets only."""
    return {key: value for key, value in step.items() if key != "trim_offsets"}
