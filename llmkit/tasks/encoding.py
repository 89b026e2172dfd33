"""From texts to ids: prompts with an answer behind them, tokenised as one text.

The answer follows its prompt after one space, which belongs to the answer, or at once where the prompt ends a line. A
prompt and an answer that were tokenised apart would give ids that the model never meets in running text; so both are
one text, and an id that stands for characters of both is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from string import Formatter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import BadExample
from llmkit.interfaces import Tokenizer

TOO_LONG = "too long"
MERGED = "prompt and answer merge"
EMPTY_TARGET = "empty target"

Ids = NDArray[np.int64]
Spans = Sequence[tuple[int, int]]


class Prompt(NamedTuple):
    """A filled template; ``text[start:stop]`` is the part that may lose its end to make a row fit."""

    text: str
    start: int
    stop: int

    def until(self, place: int) -> Prompt:
        """Without the characters of that part from ``place`` on. Raises ``BadExample`` where nothing of it is left."""
        kept = self.text[self.start : place].rstrip()
        if not kept:
            raise BadExample(TOO_LONG)
        return Prompt(self.text[: self.start] + kept + self.text[self.stop :], self.start, self.start + len(kept))


class Fitted(NamedTuple):
    """Ids of a prompt and what follows it, and how many ids of the prompt were left out to make them fit."""

    ids: list[int]
    spans: Spans
    prompt: Prompt
    n_cut: int


# -- templates ------------------------------------------------------------------------------------------------------


def fill(template: str, values: Mapping[str, str], long: str) -> Prompt:
    """``template`` with ``{role}`` replaced; a line all of whose roles are empty is left out.

    ``long`` is the role whose text may be shortened.
    """
    text, start, stop = "", 0, 0
    for line in template.splitlines(keepends=True):
        parts = [(before, name) for before, name, _, _ in Formatter().parse(line)]
        names = [name for _, name in parts if name is not None]
        if names and not any(values[name] for name in names):
            continue
        for before, name in parts:
            text += before
            if name == long:
                start, stop = len(text), len(text) + len(values[name])
            text += "" if name is None else values[name]
    return Prompt(text, start, stop)


def template_problems(
    field: str, template: str, roles: Sequence[str], needed: Collection[str]
) -> list[tuple[str, str]]:
    """(field, message) for a template that names a role it does not have, lacks one it needs, or ends in a space."""
    try:
        lines = template.splitlines(keepends=True)
        names = [name for line in lines for _, name, _, _ in Formatter().parse(line) if name is not None]
    except ValueError as error:
        return [(field, f"braces do not match ({error}); write {{{{ for a brace")]
    known = ", ".join(f"{{{role}}}" for role in roles)
    found = [(field, f"there is no {{{name}}}; there are {known}") for name in names if name not in roles]
    found += [(field, f"must hold {{{role}}} once") for role in needed if names.count(role) != 1]
    if template != template.rstrip(" \t"):
        found.append((field, "must not end in a space: the space before the answer belongs to the answer"))
    return found


# -- ids ------------------------------------------------------------------------------------------------------------


def fit(prompt: Prompt, after: str, tokenizer: Tokenizer, room: int, *, cut: bool) -> Fitted:
    """``prompt.text + after`` as at most ``room`` ids; with ``cut`` the prompt may be shortened, else it raises."""
    n_whole: int | None = None
    while True:
        ids, spans = tokenizer.encode_spans(prompt.text + after)
        n_whole = len(ids) if n_whole is None else n_whole
        excess = len(ids) - room
        if excess <= 0:
            return Fitted(ids, spans, prompt, n_whole - len(ids))
        places = [start for start, stop in spans if start < prompt.stop and stop > prompt.start]
        if not cut or len(places) < excess:
            raise BadExample(TOO_LONG)
        prompt = prompt.until(places[-excess])


def fit_alone(prompt: Prompt, tokenizer: Tokenizer, room: int, *, cut: bool) -> Fitted:
    """``fit`` with nothing behind the prompt, and without ``spans``: they take time, and only a cut needs them."""
    ids = tokenizer.encode(prompt.text)
    return Fitted(ids, (), prompt, 0) if len(ids) <= room else fit(prompt, "", tokenizer, room, cut=cut)


def fit_answered(prompt: Prompt, answer: str, tokenizer: Tokenizer, room: int, *, cut: bool) -> tuple[Fitted, int]:
    """(ids of the prompt and the answer as one text, the place where the answer begins in them).

    Raises ``BadExample`` where they do not fit, and where they merge: an id stands for characters of both, or the
    prompt alone, which is what the model is given when it has to answer, has other ids than here.
    """
    fitted = fit(prompt, seam(prompt.text) + answer, tokenizer, room, cut=cut)
    end = len(fitted.prompt.text)
    begins = (i for i, (start, stop) in enumerate(fitted.spans) if stop > end or start == end)
    first = next(begins, len(fitted.ids))
    if first == len(fitted.ids):
        raise BadExample(EMPTY_TARGET)  # no character of it is in the vocabulary
    if any(start < end for start, _ in fitted.spans[first:]):
        raise BadExample(MERGED)
    if fitted.ids[:first] != tokenizer.encode(fitted.prompt.text):
        raise BadExample(MERGED)
    return fitted, first


def seam(prompt: str) -> str:
    """What stands between a prompt and its answer."""
    return "" if prompt.endswith("\n") else " "


def begin(tokenizer: Tokenizer) -> list[int]:
    """The id before every document, where the vocabulary has one."""
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def encode_target(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of what an encoder-decoder writes; some tokenizers cut it by rules other than those of the source."""
    own = getattr(tokenizer, "encode_target", tokenizer.encode)
    ids: list[int] = own(text)
    return ids


def as_document(prompt: Prompt, tokenizer: Tokenizer, max_len: int, *, cut: bool) -> tuple[Ids, int]:
    """``[bos] ids eos``, which encoders read and heads classify, and how many ids were left out."""
    first = begin(tokenizer)
    fitted = fit_alone(prompt, tokenizer, max_len - len(first) - 1, cut=cut)
    return to_array([*first, *fitted.ids, tokenizer.eos_id]), fitted.n_cut


def to_array(ids: Sequence[int]) -> Ids:
    return np.array(ids, dtype=np.int64)


# -- what stands in a record ----------------------------------------------------------------------------------------


def text_of(fields: Mapping[str, Any], role: str, *, empty: str | None = None) -> str:
    """The text of a role without outer white space. Raises ``BadExample`` where it is absent, no text, or ``empty``."""
    value = fields.get(role)
    if value is None:
        raise BadExample(f"missing {role}")
    if not isinstance(value, str):
        raise BadExample(f"{role} is not text")
    if not (text := value.strip()):
        raise BadExample(empty or f"empty {role}")
    return text


def texts_of(fields: Mapping[str, Any], role: str) -> list[str]:
    """A text or a list of texts, each without outer white space, empty ones left out."""
    value = fields.get(role)
    if value is None:
        raise BadExample(f"missing {role}")
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise BadExample(f"{role} is not text")
    if not (texts := [text for item in items if (text := item.strip())]):
        raise BadExample(EMPTY_TARGET)
    return texts
