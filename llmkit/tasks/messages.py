"""Conversations as files have them: ``role`` and ``content``, or ``from`` and ``value``, and who may speak when."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from llmkit.errors import BadExample
from llmkit.tasks.encoding import EMPTY_TARGET

Message = dict[str, str]  # role, which is system, user or assistant, and content

_ROLE_KEYS = ("role", "from", "speaker")
_CONTENT_KEYS = ("content", "value", "text")
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}


def read_messages(value: Any, *, answered: bool) -> list[Message]:
    """Turns in order: at most one of the system, then the user and the assistant by turns, the user first.

    A text is JSON of the same, as a table holds it; where no answer is needed also what the user says. White space
    around what the assistant says is left out, and so is an empty turn of the system. Raises ``BadExample`` for
    anything else, and where the assistant has to have spoken and has not.
    """
    turns = _decoded(value, answered)
    if not isinstance(turns, list | tuple) or not turns:
        raise BadExample("no messages")
    messages = [_message(turn) for turn in turns if not _is_empty_system(turn)]
    check_order([message["role"] for message in messages])
    if answered and all(message["role"] != "assistant" for message in messages):
        raise BadExample("no assistant turn")
    return messages


def _decoded(value: Any, answered: bool) -> Any:
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if isinstance(found, list):
        return found
    if answered or not value.strip():
        raise BadExample("messages are not a list")
    return [{"role": "user", "content": value}]


def _said(turn: Any) -> tuple[Any, Any]:
    """Who says it, and what; None for what is not there."""
    if not isinstance(turn, Mapping):
        return None, None
    role, content = (next((turn[key] for key in keys if key in turn), None) for keys in (_ROLE_KEYS, _CONTENT_KEYS))
    return role, content


def _is_empty_system(turn: Any) -> bool:
    role, content = _said(turn)
    is_system = isinstance(role, str) and _ROLES.get(role.lower()) == "system"
    return is_system and isinstance(content, str) and not content.strip()


def _message(turn: Any) -> Message:
    role, content = _said(turn)
    if not isinstance(role, str) or content is None:
        raise BadExample("message without role or content")
    if (known := _ROLES.get(role.strip().lower())) is None:
        raise BadExample("unknown role")
    text = _text(content)
    if known == "assistant":
        text = text.strip()
    if not text.strip():
        raise BadExample(EMPTY_TARGET if known == "assistant" else "empty turn")
    return {"role": known, "content": text}


def _text(content: Any) -> str:
    """A text, or a list of parts all of which are text."""
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list | tuple):
        raise BadExample("content is not text")
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise BadExample("content is not text")
    return "".join(map(str, texts))


def check_order(roles: Sequence[str]) -> None:
    """Raises ``BadExample`` where turns do not alternate."""
    said = roles[1:] if roles[0] == "system" else roles
    if "system" in said:
        raise BadExample("a system turn that is not the first")
    if not said or said[0] != "user":
        raise BadExample("the first turn is not the user's")
    if any(before == after for before, after in pairwise(said)):
        raise BadExample("two turns of one role in a row")


def later_beginnings(messages: Sequence[Message]) -> list[list[Message]]:
    """The conversation without its oldest exchange, without its oldest two ...; what the system says stays."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    starts = [place for place, message in enumerate(messages) if message["role"] == "user"]
    return [[*system, *messages[start:]] for start in starts[1:]]


def question_place(messages: Sequence[Message]) -> int:
    """Where the first thing that the user says stands."""
    return next(place for place, message in enumerate(messages) if message["role"] == "user")


def with_question_cut(messages: Sequence[Message], n_characters: int) -> list[Message]:
    """The conversation without the last ``n_characters`` of the first thing that the user says."""
    place = question_place(messages)
    text = messages[place]["content"]
    shorter = {**messages[place], "content": text[: len(text) - n_characters]}
    return [*messages[:place], shorter, *messages[place + 1 :]]
