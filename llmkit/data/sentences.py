"""Where sentences begin: in a text, by rules, and in its token ids.

The rules look at a mark (``. ! ? …``), at the word before it and at the character after it. They are made for English
and serve other languages as far as these write the same marks and put whitespace after them. A blank line always ends a
sentence, so headings stand alone; so does a line end before an item of a list, and a line end beside a line so long
that it must be a whole paragraph.

What quotation marks and brackets enclose is split like the rest: one that is never closed would otherwise swallow a
whole document. The work grows with the length of the text, whatever it holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from llmkit.interfaces import Tokenizer

VERSION = 3  # raise when the same text gives other sentences, or another split: a part of the key of prepared data
_LONG_LINE = 200  # characters; lines that were broken to fit a page are shorter
_LOOK_BACK = 16  # characters before a mark that may hold an abbreviation

_MARKS = ".!?…。！？"
_MARK = re.compile(  # begins with one set of characters, for which the search is fast
    rf"""[{_MARKS}\n](?:
        (?<=\n)\s*+  # a line end and what whitespace follows
      | (?<!\n)(?<![{_MARKS}]{{2}})[{_MARKS}]*+["'”’»)\]}}*_`]*+(?=\s)  # marks, what they close, then whitespace
    )""",
    re.VERBOSE,
)
_NEXT = re.compile(r"""\s*+["'“‘«(\[{*_`]*+([^\W\d_]{1,16}|\S?)""")
_ITEM = re.compile(r"(?:[-*+•–—]|\(?(?:\d{1,3}|[ivx]{1,4}|[a-z])[.)]|>>>)[ \t]")
_NUMBERING = re.compile(r"\d{1,3}|[ivxIVX]{1,4}|[A-Za-z]")
_DOTTED = re.compile(r"(?:[A-Za-z]{1,2}\.)+[A-Za-z]{1,2}")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Abbreviations after which a sentence goes on: always, before a number, or unless a usual first word follows.
_BEFORE_NAME = _words(
    "mr mrs ms messrs mme mlle dr prof rev hon gen gov sen rep pres capt cpt col maj lt sgt adm cmdr st mt ft "
    "vs v cf viz ca approx e.g i.e eg ie"
)
_BEFORE_NUMBER = _words(
    "no nos p pp fig figs vol vols ch chap sec secs art arts par eq eqs ver "
    "jan feb mar apr jun jul aug sep sept oct nov dec"
)
_MAY_END = _words("etc al inc ltd co corp bros jr sr esq dept est ave blvd rd")
_FIRST_WORDS = _words(
    "the this that these those there it its he his she her they their we our you your i my a an in on at by for from "
    "to of with without under over after before since until while when where why how who what which if as so but and "
    "or yet nor not no all any some each every many most more such both another other one two three however although "
    "though because thus therefore then now here let is are was were do does did has have had can may will once first "
    "second also"
)


def split_sentences(text: str) -> list[str]:
    """The sentences of ``text``, which are the text when joined.

    A sentence begins with the whitespace that parts it from the one before, and none is whitespace alone unless the
    whole text is.
    """
    if not text:
        return []
    return [text[start:stop] for start, stop in pairwise([0, *_cuts(text), len(text)])]


def _cuts(text: str) -> Iterator[int]:
    """Where a sentence ends and whitespace follows, in rising order."""
    last = line_start = 0
    for match in _MARK.finditer(text):
        if match[0][0] == "\n":
            cut = line_start + len(text[line_start : match.start()].rstrip())
            ends = _line_ends_sentence(text, cut - line_start, match)
            line_start = match.end()
        else:
            cut, ends = match.end(), _mark_ends_sentence(text, match)
        if ends and cut > last:
            yield cut
            last = cut


def _line_ends_sentence(text: str, line_length: int, gap: re.Match[str]) -> bool:
    """Whether a sentence ends with a line of ``line_length`` characters; ``gap`` is the line end and what follows."""
    if gap.end() == len(text):
        return False
    if line_length > _LONG_LINE or gap[0].count("\n") > 1 or _ITEM.match(text, gap.end()):
        return True
    return len(text) - gap.end() > _LONG_LINE and text.find("\n", gap.end(), gap.end() + _LONG_LINE + 1) < 0


def _mark_ends_sentence(text: str, mark: re.Match[str]) -> bool:
    """Whether a sentence ends at a mark that whitespace follows."""
    follows = _NEXT.match(text, mark.end())
    word_after = follows[1] if follows else ""
    if not word_after or word_after[0].islower():
        return False
    if mark[0][0] != "." or (len(mark[0]) > 1 and mark[0][1] in _MARKS):
        return True
    before = text[max(0, mark.start() - _LOOK_BACK) : mark.start()]
    word = before.split()[-1] if before.strip() else ""
    if word and _NUMBERING.fullmatch(word) and _begins_line(before[: -len(word)], at_start=mark.start() < _LOOK_BACK):
        return False
    return _word_ends_sentence(word.lstrip("\"'“‘«([{*_`"), word_after)


def _begins_line(before: str, *, at_start: bool) -> bool:
    """Whether nothing but blanks stands between a line's beginning and what follows ``before``."""
    before = before.rstrip(" \t")
    return before.endswith("\n") or (at_start and not before)


def _word_ends_sentence(word: str, word_after: str) -> bool:
    """Whether the full stop between two words ends a sentence."""
    small = word.casefold()
    if small in _BEFORE_NAME or (len(word) == 1 and word.isalpha() and word != "I"):
        return False
    if small in _BEFORE_NUMBER:
        return not word_after[0].isdigit()
    if small in _MAY_END or _DOTTED.fullmatch(word):
        return word_after.casefold() in _FIRST_WORDS
    return True


class Encoded(NamedTuple):
    """The ids of a document, and the places among them where its sentences begin (the first is 0)."""

    ids: list[int]
    starts: list[int]


def encode_with_sentences(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoded]:
    """Ids of the whole texts, just as without sentences, and where their sentences begin.

    The sentences are encoded one by one as well. Where that gives the ids of the whole, as it does for tokenizers that
    never join what whitespace parts, their lengths say where they begin. Elsewhere (SentencePiece may join a full stop
    with the line end after it) the two are laid side by side.
    """
    split = [split_sentences(text) for text in texts]
    pieces = iter(tokenizer.encode_batch(list(chain.from_iterable(split))))
    encoded = []
    for ids, sentences in zip(tokenizer.encode_batch(texts), split, strict=True):
        parts = [next(pieces) for _ in sentences]
        places = list(accumulate(map(len, parts), initial=0))[:-1]
        joined = list(chain.from_iterable(parts))
        if joined != ids:
            places = _carried_over(joined, ids, places)
        encoded.append(Encoded(ids, sorted({place for place in places if place < len(ids)})))
    return encoded


_AGREE, _REACH = 3, 32  # ids that must be equal for two sequences to be in step again, and how far that may be


def _carried_over(old: list[int], new: list[int], places: list[int]) -> list[int]:
    """``places`` in ``old`` as places in ``new``, which differs here and there; a place amid a difference moves to its
    end, and places after a difference too long to step over are left out."""
    found: list[int] = []
    at = shift = 0
    for place in places:
        while at < place:
            if at + shift < len(new) and old[at] == new[at + shift]:
                at += 1
                continue
            step = _step_over(old, new, at, at + shift)
            if step is None:
                return found
            at, shift = at + step[0], shift + step[1] - step[0]
        found.append(at + shift)
    return found


def _step_over(old: list[int], new: list[int], i: int, j: int) -> tuple[int, int] | None:
    """The shortest steps from ``i`` and ``j`` after which both sequences agree again."""
    for total in range(1, 2 * _REACH):
        for a in range(max(0, total - _REACH), min(total, _REACH) + 1):
            b = total - a
            ahead = old[i + a : i + a + _AGREE]
            if ahead == new[j + b : j + b + _AGREE] and (ahead or i + a == len(old)):
                return a, b
    return None
