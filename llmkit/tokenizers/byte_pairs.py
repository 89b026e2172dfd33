"""Byte-level BPE through ``tiktoken``, several times as fast as ``tokenizers``, where it gives the same ids.

``tokenizers`` joins the pairs that its list names, in the order of the list; ``tiktoken`` joins any two pieces that
make a third, the one with the lowest id first. The two agree if the ids of the list's results never fall and each
result, encoded on its own, is itself. For let two pieces stand side by side in some text: every join inside of them was
the best of the whole text, so also of their part alone, which therefore comes to the same two pieces when it is encoded
by itself. If they make a third, that encoding goes on to it, so the list has their pair; and as it goes one way only,
no other pair of the list that makes the same piece ever occurs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiktoken import Encoding
    from tokenizers import Tokenizer as Backend

_WORDS = r" ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
_SHORT_FORMS = "'(?:[sdmt]|ll|ve|re)"
_GPT2 = rf"{_SHORT_FORMS}|{_WORDS}|\s++$|\s+(?!\S)|\s"
# Digits are taken out first, so that spaces before one are the end of a text of their own.
_AFTER_DIGITS = rf"{_SHORT_FORMS}|{_WORDS}|\s++$|\s+(?![^\s\p{{N}}])|\s"
# The expressions of GPT-4, Llama 3 and Qwen 2. Of another one it is not known that every character falls into a word.
_SPLITS = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}", r"\p{N}{1,3}")
]
_PLAIN = {"dropout": (None, 0), "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, "")}
# Words and gaps that are not long: on others tiktoken is slow, or stops.
_SHORT_RUNS = re.compile(r"\s{0,499}(?:\S{1,1999}+(?:\s{1,499}+|\Z))*+\Z")
# Planes of rare scripts, in which versions of Unicode differ.
_RARE = re.compile("[\U00010000-\U0001efff\U0001fb00-\U0001ffff\U0002a6e0-\U0010ffff]")


class BytePairs:
    """A ``tokenizer.json`` as ``tiktoken`` runs it."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding

    def encode(self, text: str) -> list[int] | None:
        """The ids of ``text``, or None where ``tokenizers`` is the better choice. Raises UnicodeEncodeError."""
        if not _SHORT_RUNS.match(text) or (not text.isascii() and _RARE.search(text)):
            return None
        text.encode()  # tiktoken would replace half a character in silence
        ids: list[int] = self._encoding.encode_ordinary(text)
        return ids


def byte_pairs(content: Mapping[str, Any], backend: Backend, silent: Iterable[int]) -> BytePairs | None:
    """The tokenizer that ``content`` and ``backend`` are; ``silent`` are ids that no text has.

    None where the ids would not be proven equal, and where ``tiktoken`` (extra ``tiktoken``) is not installed.
    """
    pattern = _pattern(content)
    if pattern is None or not _is_plain(content):
        return None
    try:
        from tiktoken import Encoding
    except ImportError:
        return None
    ranks = _ranks(content, backend)
    if ranks is None or not set(silent).isdisjoint(ranks.values()):
        return None
    return BytePairs(Encoding("llmkit", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}))


def _is_plain(content: Mapping[str, Any]) -> bool:
    """Whether nothing but the words and the pairs decides the ids."""
    model, added = content["model"], content.get("added_tokens") or ()
    settings = all(model.get(name) in usual for name, usual in _PLAIN.items()) and not model.get("byte_fallback")
    return settings and not content.get("normalizer") and all(token.get("special") for token in added)


def _pattern(content: Mapping[str, Any]) -> str | None:
    """What the pre-tokenizer calls a word, as an expression of tiktoken's."""
    step = content.get("pre_tokenizer") or {}
    steps = list(step.get("pretokenizers", ())) if step.get("type") == "Sequence" else [step]
    if content["model"].get("type") != "BPE" or not steps or steps[-1].get("type") != "ByteLevel":
        return None
    *before, last = steps
    if last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        if not before:
            return _GPT2
        first = before[0]
        if len(before) == 1 and first.get("type") == "Digits":
            digits = r"\p{N}" if first.get("individual_digits") else r"\p{N}++"
            return f"{digits}|{_AFTER_DIGITS}"
        return None
    if len(before) != 1 or before[0].get("type") != "Split":
        return None
    split = before[0]
    pattern = split.get("pattern", {}).get("Regex")
    whole = split.get("behavior") == "Isolated" and not split.get("invert")
    return pattern if whole and pattern in _SPLITS else None


def _ranks(content: Mapping[str, Any], backend: Backend) -> dict[bytes, int] | None:
    """The ids of the bytes and of what the pairs make, if those meet the conditions above.

    Of a model that takes words it knows without joining them, all pieces have to be among these: ``tiktoken`` does it
    too, and the conditions are those of the model without that rule.
    """
    model = content["model"]
    vocabulary: dict[str, int] = model["vocab"]
    byte_of = _bytes_of_characters()
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    made = ["".join(pair) for pair in pairs]
    if not (byte_of.keys() | set(made)) <= vocabulary.keys():
        return None
    ids = [vocabulary[piece] for piece in made]
    reached = {*byte_of, *made}
    joining = backend
    if model.get("ignore_merges"):
        if reached != vocabulary.keys():
            return None
        joining = type(backend).from_str(json.dumps({**content, "model": {**model, "ignore_merges": False}}))
    if ids != sorted(ids):
        return None
    if any([token.id for token in joining.model.tokenize(piece)] != [vocabulary[piece]] for piece in reached):
        return None
    return {bytes(map(byte_of.__getitem__, piece)): vocabulary[piece] for piece in reached}


def _bytes_of_characters() -> dict[str, int]:
    """The characters that byte-level vocabularies are written in: printable ones of Latin-1 stand for themselves, the
    other bytes, in order, for those from U+0100 on (GPT-2).
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != 0x20]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
