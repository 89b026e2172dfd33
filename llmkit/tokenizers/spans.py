"""Which characters of a text its ids stand for.

Libraries say where a piece comes from, each in its own way, with some liberties. Here it becomes ``start:stop`` in
characters of the text as it was given, whatever normalisation it went through.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

from llmkit.tokenizers.vocabulary import SPACE

Span = tuple[int, int]  # start:stop
Spans = tuple[list[int], list[Span]]  # ids, and the characters of each
Symbol = tuple[int, int, int]  # start, stop and id of a special token that a text names

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_JOINERS = "\u200c\u200d\uff9e\uff9f"  # zero width, and the halfwidth voice marks, which Unicode counts as letters
_SPACE_MARKS = (SPACE, "\u0120")  # the second is that of byte-level tokenizers


def gaps(length: int, plain: Iterable[Span]) -> Iterator[Span]:
    """The parts of a text that no range of ``plain`` has a character of."""
    start = 0
    for first, last in sorted(plain):
        if first < last:
            if start < first:
                yield start, first
            start = max(start, last)
    if start < length:
        yield start, length


def touches(span: Span, plain: Iterable[Span]) -> bool:
    """Whether a character of ``span`` is in a range of ``plain``."""
    return any(max(span[0], start) < min(span[1], stop) for start, stop in plain)


def with_symbols(text: str, symbols: Iterable[Symbol], encode: Callable[[int, int], Spans]) -> Spans:
    """The ids of ``symbols``, which are in order, and between them what ``encode(start, stop)`` makes of the text."""
    ids: list[int] = []
    spans: list[Span] = []
    place = 0
    for start, stop, index in [*symbols, (len(text), len(text), -1)]:
        if place < start:
            part, where = encode(place, start)
            ids += part
            spans += [(place + first, place + last) for first, last in where]
        if index >= 0:
            ids.append(index)
            spans.append((max(place, start), stop))
        place = stop
    return ids, spans


def named_symbols(text: str, plain: Sequence[Span], symbols: dict[str, int]) -> list[Symbol]:
    """The names of ``symbols`` in ``text`` that touch no range of ``plain``, the longest where several begin."""
    if not symbols:
        return []
    pattern = re.compile("|".join(map(re.escape, sorted(symbols, key=len, reverse=True))))
    found = chain.from_iterable(pattern.finditer(text, *gap) for gap in gaps(len(text), plain))
    return [(*match.span(), symbols[match[0]]) for match in found]


def mended(text: str, pieces: Sequence[str], spans: Sequence[Span]) -> list[Span]:
    """Spans as the package ``tokenizers`` gives them, with two liberties taken back.

    A space that the tokenizer put there has the place of the first letter, and should have none. Each byte of an
    unknown run of characters has the place of the whole run, and should have that of its own character.
    """
    result = list(spans)
    place = 0
    while place < len(pieces):
        end = place + 1
        start, stop = spans[place]
        if stop - start > 1 and _BYTE.fullmatch(pieces[place]):
            while end < len(pieces) and spans[end] == (start, stop) and _BYTE.fullmatch(pieces[end]):
                end += 1
            result[place:end] = _shared_out(text, end - place, (start, stop))
        place = end
    return _without_added_spaces(text, pieces, result)


def _shared_out(text: str, n_bytes: int, span: Span) -> list[Span]:
    """The characters of a run that is spelt in bytes, byte by byte; all of it when it was changed before."""
    start, stop = span
    sizes = [len(letter.encode()) for letter in text[start:stop]]
    if sum(sizes) != n_bytes:
        return [span] * n_bytes
    return [(place, place + 1) for place, size in enumerate(sizes, start) for _ in range(size)]


def _without_added_spaces(text: str, pieces: Sequence[str], spans: list[Span]) -> list[Span]:
    before = 0
    for place, (piece, (start, stop)) in enumerate(zip(pieces, spans, strict=True)):
        own = text[start:stop]
        if piece in _SPACE_MARKS and piece != own and start >= before and not any(map(str.isspace, own)):
            spans[place] = start, start
        before = max(before, spans[place][1])
    return spans


def from_bytes(text: str, pieces: Sequence[str], offsets: Sequence[int]) -> list[Span]:
    """Spans of SentencePiece's pieces, which are the normalised text in parts.

    ``offsets``: where in the UTF-8 of ``text`` each byte of the normalised text comes from, and then its length. The
    bytes of one character, and the letters that one became, have all of it.
    """
    starts = accumulate((len(letter.encode()) for letter in text), initial=0)
    character = {byte: place for place, byte in enumerate(starts)}
    follows = dict(pairwise(sorted(set(offsets))))
    found, place = [], 0
    for piece in pieces:
        end = place + (1 if _BYTE.fullmatch(piece) else len(piece.encode()))
        found.append((character[offsets[place]], character[follows.get(offsets[end - 1], offsets[-1])]))
        place = end
    return _without_added_spaces(text, pieces, found)


def aligned(text: str, normalise: Callable[[str], str]) -> tuple[str, list[Span]] | None:
    """The normalised text, and where each of its characters comes from; None where that cannot be said."""
    parts = list(_clusters(text))
    changed = [normalise(part) for part in parts]
    if "".join(changed) != normalise(text):
        return None
    owners: list[Span] = []
    ends = pairwise(accumulate(map(len, parts), initial=0))
    for old, new, span in zip(parts, changed, ends, strict=True):
        owners += letters_of(span, len(new)) if old == new else [span] * len(new)
    return "".join(changed), owners


def _clusters(text: str) -> Iterator[str]:
    """Characters with all that may melt into them: accents, vowel signs, the parts of a Korean syllable."""
    start = 0
    for place in range(1, len(text) + 1):
        if place == len(text) or not _melts(text[place - 1], text[place]):
            yield text[start:place]
            start = place


def _melts(before: str, letter: str) -> bool:
    if unicodedata.category(before) == "Cc":
        return before + letter == "\r\n"
    return unicodedata.category(letter)[0] == "M" or letter in _JOINERS or "\u1160" <= letter <= "\u11ff"


def moved_back(spans: Iterable[Span], owners: Sequence[Span], length: int) -> list[Span]:
    """Spans in a normalised text as spans in the text of ``length`` characters that it was made from."""
    owners = [*owners, (length, length)]
    found = []
    for start, stop in spans:
        inside_one = start > 0 and owners[start] == owners[start - 1]
        empty = start == stop and not inside_one
        found.append((owners[start][0], owners[start][0] if empty else owners[max(start, stop - 1)][1]))
    return found


def letters_of(span: Span, n_letters: int) -> list[Span]:
    """The span of each letter of a name: its own where the text has the name as it is, else all of it."""
    start, stop = span
    if stop - start != n_letters:
        return [span] * n_letters
    return [(place, place + 1) for place in range(start, stop)]


def inside(node: Any) -> Any:
    """A ``tokenizer.json`` for a part of a text that is not its beginning, where some put no space before it."""
    if isinstance(node, dict):
        changed = {"prepend_scheme": "never"} if node.get("prepend_scheme") == "first" else {}
        return {**{name: inside(value) for name, value in node.items()}, **changed}
    return [inside(item) for item in node] if isinstance(node, list) else node
