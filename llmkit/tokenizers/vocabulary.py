"""What objectives must know of a vocabulary: special roles by name, ids that no text has, and where words begin."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.interfaces import TokenIds

logger = logging.getLogger("llmkit.tokenizers")

SPACE = "\u2581"  # stands for a space inside the pieces of SentencePiece
MASK_NAMES = ("[MASK]", "<mask>")
_SENTINEL = re.compile(r"<extra_id_(\d+)>")
_INFILL_NAMES = (  # prefix, suffix, middle, in the order in which such a text is written
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("[PREFIX]", "[SUFFIX]", "[MIDDLE]"),
)
_SPACE_BYTES = (9, 10, 11, 12, 13, 32)
_SPACE_BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in _SPACE_BYTES)
_BYTE_LEVEL_SPACES = frozenset(chr(256 + byte) for byte in _SPACE_BYTES)  # GPT-2 writes bytes 0 to 32 so
_LOSSY_STEPS = (
    *("BertNormalizer", "Lowercase", "StripAccents", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Strip"),
    *("BertPreTokenizer", "Whitespace", "WhitespaceSplit"),
)

BeginsWord = Callable[[str], bool]  # of a piece


@dataclass(frozen=True)
class Roles:
    """The ids that some objectives need; see ``TokenIds``."""

    mask_id: int | None
    sentinel_ids: tuple[int, ...]
    infill_ids: tuple[int, int, int] | None

    @property
    def ids(self) -> frozenset[int]:
        mask_ids = () if self.mask_id is None else (self.mask_id,)
        return frozenset((*mask_ids, *self.sentinel_ids, *(self.infill_ids or ())))


def find_roles(vocabulary: Mapping[str, int], mask_name: str | None = None) -> Roles:
    """By the names of the pieces; ``mask_name`` is the name that the tokenizer's own files give."""
    mask_names = MASK_NAMES if mask_name is None else (mask_name, *MASK_NAMES)
    mask_ids = [vocabulary[name] for name in mask_names if name in vocabulary]
    numbered = [(int(found[1]), vocabulary[name]) for name in vocabulary if (found := _SENTINEL.fullmatch(name))]
    infill = [names for names in _INFILL_NAMES if all(name in vocabulary for name in names)]
    prefix, suffix, middle = infill[0] if infill else ("", "", "")
    return Roles(
        mask_id=mask_ids[0] if mask_ids else None,
        sentinel_ids=tuple(index for _, index in sorted(numbered)),
        infill_ids=(vocabulary[prefix], vocabulary[suffix], vocabulary[middle]) if infill else None,
    )


def stands_for_text(name: str) -> bool:
    """Whether a symbol of this name replaces words of a text, as masks and sentinels do."""
    return name in MASK_NAMES or _SENTINEL.fullmatch(name) is not None


def build_token_ids(
    pieces: Mapping[int, str],
    begins_word: BeginsWord,
    special: Collection[int],
    roles: Roles,
    *,
    vocab_size: int,
    bos_id: int | None,
    eos_id: int,
    pad_id: int,
) -> TokenIds:
    """``TokenIds`` with read-only arrays. Ids without a piece are special, and special ids begin a word."""
    import numpy

    is_special = numpy.ones(vocab_size, numpy.bool_)
    is_special[list(pieces)] = False
    is_special[[*special, *roles.ids, eos_id, pad_id, *(() if bos_id is None else (bos_id,))]] = True
    starts = is_special.copy()
    starts[[index for index, piece in pieces.items() if begins_word(piece)]] = True
    for array in (is_special, starts):
        array.setflags(write=False)
    return TokenIds(
        vocab_size=vocab_size,
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=pad_id,
        mask_id=roles.mask_id,
        sentinel_ids=roles.sentinel_ids,
        infill_ids=roles.infill_ids,
        special=is_special,
        word_starts=starts,
    )


def after_space(mark: str = SPACE) -> BeginsWord:
    """SentencePiece: a word begins with a piece that begins with the mark, other whitespace or a byte of it.

    Where a line end is the last part of a piece, the first word of the next line goes on with it.
    """
    return lambda piece: piece[:1] == mark or piece[:1].isspace() or piece in _SPACE_BYTE_PIECES


def after_space_byte(piece: str) -> bool:
    """Byte-level BPE: a word begins with a piece whose first byte is whitespace."""
    return piece[:1] in _BYTE_LEVEL_SPACES or piece[:1].isspace()


def without_prefix(prefix: str) -> BeginsWord:
    """WordPiece: pieces inside a word carry a prefix; punctuation, split off before, is a word of its own."""
    return lambda piece: not piece.startswith(prefix)


def always(piece: str) -> bool:
    """Every piece is a word."""
    return True


def unknown(piece: str) -> bool:
    """Every piece passes for a word, because the pieces do not say where words begin."""
    return True


def warn_if_unknown(begins_word: BeginsWord) -> None:
    if begins_word is unknown:
        logger.warning("the pieces of this tokenizer do not say where words begin: whole words will be single pieces")


def word_rule(content: Mapping[str, Any]) -> BeginsWord:
    """The rule of a ``tokenizer.json``, by its model, and by what its text passes through before and after it."""
    model = content["model"]
    kind = model.get("type", "")
    if prefix := model.get("continuing_subword_prefix"):
        return without_prefix(str(prefix))
    if kind == "WordLevel":
        return always
    if model.get("end_of_word_suffix"):
        return unknown
    steps = list(_steps([content.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]))
    if any(step["type"] == "ByteLevel" for step in steps):
        return after_space_byte
    marks = [mark for step in steps if (mark := _space_mark(step))]
    return after_space(marks[0]) if marks else unknown


def _space_mark(step: Mapping[str, Any]) -> str:
    """The character that stands for a space, if the step puts one there or takes it away."""
    if step["type"] == "Metaspace":
        return str(step.get("replacement") or SPACE)
    if step["type"] == "Replace":
        pattern = step.get("pattern")
        both = (pattern.get("String") if isinstance(pattern, Mapping) else None, step.get("content"))
        other = [text for text in both if text != " "]
        return str(other[0]) if len(other) == 1 and other[0] else ""
    return ""


def _steps(node: Any) -> Iterator[Mapping[str, Any]]:
    """Every step named in a part of a ``tokenizer.json``, however deep."""
    if isinstance(node, Mapping):
        if "type" in node:
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _steps(item)


def is_lossy(content: Mapping[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` changes case, accents, characters or spaces by design."""
    parts = [content.get("normalizer"), content.get("pre_tokenizer")]
    return any(step["type"] in _LOSSY_STEPS for step in _steps(parts))


def charsmap(content: Mapping[str, Any]) -> str | None:
    """The table by which a ``tokenizer.json`` changes characters as SentencePiece does, in base64."""
    tables = [
        step["precompiled_charsmap"] for step in _steps(content.get("normalizer")) if step["type"] == "Precompiled"
    ]
    return str(tables[0]) if tables else None


def trims_spans(content: Mapping[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` leaves the space out of the characters that a word's first id stands for."""
    return any(step.get("trim_offsets") for step in _steps(content.get("post_processor")))


def has_bert_rules(content: Mapping[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` prepares text as BERT does."""
    kinds = [(content.get(part) or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
    return kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"]


def unreachable(pieces: Mapping[int, str], prefix: str, backend: Any) -> Iterator[int]:
    """Ids that BERT's rules never give: ``[unused5]``, capitals when all text is lower case, ``##`` and a comma."""
    for index, piece in pieces.items():
        word = f"a{piece.removeprefix(prefix)}" if piece.startswith(prefix) else piece
        words = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(word))
        if [text for text, _ in words] != [word]:
            yield index
