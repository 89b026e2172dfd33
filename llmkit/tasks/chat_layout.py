"""Where the turns of a conversation stand in the text that a chat template makes of it.

A template is a program: it may trim what is said, put one turn inside another, or leave a turn out. So the same roles
are rendered once with marks instead of contents; between the marks stands what the template writes itself, and what
stands between those pieces in the real text is what people wrote. Where that does not fit, because a template looks
into the contents, they are searched for in order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from llmkit.errors import BadExample, DataError
from llmkit.interfaces import Tokenizer
from llmkit.tasks.messages import Message

_MARK = re.compile(r"zqx(\d+)xqz")  # letters and digits, so that nothing that a template does to texts changes it
_THOUGHT_ENDS = "</think>"  # templates may leave out what stands before it


class Turn(NamedTuple):
    """Characters ``start:stop`` of the rendered text are what was said; an answer is generated from ``seam`` on."""

    message: int
    seam: int
    start: int
    stop: int


class Layout(NamedTuple):
    """A rendered conversation and its turns, in the order of the text; turns that the template leaves out are not."""

    text: str
    turns: list[Turn]

    @property
    def plain(self) -> list[tuple[int, int]]:
        """What people wrote, in which names of special tokens are text."""
        return [(turn.start, turn.stop) for turn in self.turns]


class Slot(NamedTuple):
    """What a template writes before a content; the last ``lead`` characters of it are generated with the answer."""

    before: str
    message: int
    lead: int


class Skeleton(NamedTuple):
    slots: tuple[Slot, ...]
    after: str


def layout(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool) -> Layout:
    """Raises ``BadExample`` where the template refuses the conversation, or an answer cannot be found in it."""
    text = rendered(tokenizer, messages, add_generation_prompt)
    roles = tuple(message["role"] for message in messages)
    turns = matched(text, messages, skeleton(tokenizer, roles, add_generation_prompt))
    return Layout(text, searched(tokenizer, text, messages) if turns is None else turns)


def rendered(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    try:
        return tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt)
    except DataError as error:
        raise BadExample(error.what[:200]) from error


_known: WeakKeyDictionary[Any, dict[tuple[tuple[str, ...], bool], Skeleton]] = WeakKeyDictionary()


def skeleton(tokenizer: Tokenizer, roles: tuple[str, ...], add_generation_prompt: bool) -> Skeleton:
    """What the template writes around the contents of these roles."""
    known = _known.setdefault(tokenizer, {})
    if (roles, add_generation_prompt) not in known:
        known[roles, add_generation_prompt] = _skeleton(tokenizer, roles, add_generation_prompt)
    return known[roles, add_generation_prompt]


def _skeleton(tokenizer: Tokenizer, roles: tuple[str, ...], add_generation_prompt: bool) -> Skeleton:
    marked = [{"role": role, "content": f"zqx{place}xqz"} for place, role in enumerate(roles)]
    text = rendered(tokenizer, marked, add_generation_prompt)
    slots, place = [], 0
    for found in _MARK.finditer(text):
        message = int(found[1])
        before = text[place : found.start()]
        lead = 0 if roles[message] != "assistant" else _lead(tokenizer, marked[:message], text[: found.start()], before)
        slots.append(Slot(before, message, lead))
        place = found.end()
    return Skeleton(tuple(slots), text[place:])


def _lead(tokenizer: Tokenizer, before_it: Sequence[Message], until: str, before: str) -> int:
    """Characters that stand between the end of the generation prompt and the answer."""
    prompt = _prompt(tokenizer, before_it)
    if prompt is not None and until.startswith(prompt) and len(until) - len(prompt) <= len(before):
        return len(until) - len(prompt)
    return len(before) - len(before.rstrip(" "))


def _prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> str | None:
    try:
        return rendered(tokenizer, messages, add_generation_prompt=True)
    except BadExample:  # a template may take whole exchanges only
        return None


def matched(text: str, messages: Sequence[Message], bones: Skeleton) -> list[Turn] | None:
    """The turns of ``text`` where it is the skeleton with the contents between, as they are or trimmed."""
    turns: list[Turn] = []
    place = 0
    written = [*(slot.before for slot in bones.slots), bones.after]
    for slot, follower in zip(bones.slots, written[1:], strict=True):
        start = place + len(slot.before)
        content = messages[slot.message]["content"]
        stops = (start + len(said) for said in _variants(content) if text.startswith(said + follower, start))
        stop = next(stops, None)
        if stop is None or not text.startswith(slot.before, place):
            return None
        turns.append(Turn(slot.message, start - slot.lead, start, stop))
        place = stop
    return turns if text[place:] == bones.after else None


def _variants(content: str) -> tuple[str, ...]:
    return content, content.strip(), content.lstrip(), content.rstrip()


def searched(tokenizer: Tokenizer, text: str, messages: Sequence[Message]) -> list[Turn]:
    """The contents in order, each after the one before it; an answer also after the prompt that leads to it."""
    turns: list[Turn] = []
    place = 0
    for number, message in enumerate(messages):
        answer = message["role"] == "assistant"
        prompt = _prompt(tokenizer, messages[:number]) if answer else None
        known = prompt is not None and text.startswith(prompt)
        if known and prompt is not None:
            place = max(place, len(prompt))
        *_, thought = message["content"].rpartition(_THOUGHT_ENDS)
        wanted = (said for said in (*_variants(message["content"]), thought.strip()) if said)
        found = next(((start, len(said)) for said in wanted if (start := text.find(said, place)) >= 0), None)
        if found is not None:
            start, length = found
            seam = place if known else start - _spaces_before(text, place, start)
            turns.append(Turn(number, seam, start, start + length))
            place = start + length
        elif answer:
            raise BadExample("the chat template changes what the assistant says")
    return turns


def _spaces_before(text: str, first: int, start: int) -> int:
    between = text[first:start]
    return len(between) - len(between.rstrip(" "))
