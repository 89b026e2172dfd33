"""Ids in, text out, as early as it is certain."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Protocol

CONTEXT_TOKENS = 8  # of the prompt, decoded with the first new tokens: how a token reads depends on those before it
INCOMPLETE = "\ufffd"  # what the bytes of an unfinished character decode to


class Vocabulary(Protocol):
    """Of a tokenizer, what it takes to read ids as they come."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """The text after a prompt, up to an end token, a stop text or a limit of tokens.

    Held back are the bytes of an unfinished character, and text that may turn out to be the beginning of a stop text.
    ``ends`` are the ids that end a text; left out: the tokenizer's end token.
    """

    def __init__(
        self,
        tokenizer: Vocabulary,
        prompt_ids: Sequence[int],
        stop: Sequence[str],
        limit: int,
        ends: Collection[int] | None = None,
    ) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._ends = {tokenizer.eos_id} if ends is None else ends
        self._ids = list(prompt_ids)
        self._shown = len(self._ids)  # ids before it are in the text that was given out
        self._context = max(0, self._shown - CONTEXT_TOKENS)  # where decoding starts
        self._held = ""
        self.n_tokens, self.limit = 0, limit
        self.ended = self.stopped = False  # stopped: by a stop text

    def fork(self) -> TextStream:
        """Another one that stands where this one stands."""
        other = copy.copy(self)
        other._ids = list(self._ids)
        return other

    def feed(self, token: int) -> str:
        """Text that became certain with one more id. Nothing comes after the end token, a stop text or the limit."""
        if self.ended:
            return ""
        self.n_tokens += 1
        is_end = token in self._ends
        self.ended = is_end or self.n_tokens == self.limit
        if is_end:
            return ""
        self._ids.append(token)
        return self._release(self._new_text())

    def finish(self) -> str:
        """What is still held back; bytes that never became a character show as U+FFFD."""
        text = "" if self.stopped else self._release(self._new_text(final=True))
        held, self._held = self._held, ""
        return text + held

    def _new_text(self, *, final: bool = False) -> str:
        """The text of the ids not given out yet; none while it ends within a character."""
        before = self._tokenizer.decode(self._ids[self._context : self._shown])
        text = self._tokenizer.decode(self._ids[self._context :])
        if len(text) <= len(before) or (text.endswith(INCOMPLETE) and not final):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def _release(self, text: str) -> str:
        """Add text; give out what cannot belong to a stop text, and all before one that is complete."""
        self._held += text
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            self.ended = self.stopped = True
            free, self._held = self._held[: min(places)], ""
            return free
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        free, self._held = self._held[:cut], self._held[cut:]
        return free


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
