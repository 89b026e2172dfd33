"""Takes secrets out of whatever llmkit writes: logs, config dumps, the recorded command line, tracker files.

Three sources of knowledge: the values of environment variables with a telling name, config keys with a telling name,
and the shapes in which tokens and URLs with credentials come. Imports nothing of llmkit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

MASK = "***"

# TOKEN, but not TOKENIZER or MAX_TOKENS; a name that ends like a place holds a path, not the secret.
_SECRET_VARIABLE = re.compile(r"KEY|TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|CREDENTIAL", re.IGNORECASE)
_PLACE = re.compile(r"(FILE|PATH|DIR|HOME|SOCK|URL|HOST)$", re.IGNORECASE)
_SECRET_KEY = re.compile(
    r"^token$|(^|[._-])(api_?key|access_?key(_id)?|private_?key|secret(_?key)?|client_secret|passw(or)?d|passphrase|credentials?"
    r"|authorization|(api|auth|access|bearer|hub|hf|wandb|github|git|refresh|session)_?token)$",
    re.IGNORECASE,
)
_SHORTEST_SECRET = 6  # shorter values ("1", "true") would mask ordinary words

_NAME = (
    r"[\w.-]{0,40}(?:api_?key|access_?key|private_?key|secret|passw(?:or)?d|passphrase"
    r"|(?:auth|access|api|hub|hf)_?token)"
)
_SHAPES: tuple[tuple[re.Pattern[str], str], ...] = (
    # user:password@host, and token@host
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@'\"]+@", re.IGNORECASE), rf"\1{MASK}@"),
    # https://host/?token=..., --api-key=..., password: ...
    (re.compile(rf"(?<!\w)({_NAME}\w*['\"]?\s*[=:]\s*['\"]?)[^\s'\"&,;}}]+", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"([?&](?:token|sig|signature|key)=)[^\s'\"&]+", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"(?<!\w)(Bearer|Basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1 {MASK}"),
    # Hugging Face, OpenAI and its like, GitHub, GitLab, AWS, Slack, Google, W&B, JSON web tokens
    (
        re.compile(
            r"(?<![\w-])(?:hf_\w{16,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
            r"|(?:AKIA|ASIA)[A-Z0-9]{16}|xox[abprs]-[\w-]{10,}|AIza[\w-]{30,}|wandb_v\d_\w{16,}"
            r"|eyJ[\w-]{6,}\.[\w-]{6,}\.[\w-]+)"
        ),
        MASK,
    ),
)


def redact(value: Any) -> Any:
    """A copy of plain data (mappings, sequences, strings, numbers) without secrets. Other types pass through."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, Mapping):
        return {key: _redact_entry(str(key), entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redact(entry) for entry in value]
    return value


def redact_text(text: str) -> str:
    """``text`` without secrets."""
    for secret in _known_secrets(tuple(sorted(_secret_variables().items()))):
        text = text.replace(secret, MASK)
    for pattern, replacement in _SHAPES:
        text = pattern.sub(replacement, text)
    return text


def _redact_entry(key: str, entry: Any) -> Any:
    if _SECRET_KEY.search(key) and entry is not None and not isinstance(entry, bool):
        return MASK
    return redact(entry)


def _secret_variables() -> dict[str, str]:
    named = (name for name in os.environ if _SECRET_VARIABLE.search(name) and not _PLACE.search(name))
    return {name: os.environ[name] for name in named}


@lru_cache(maxsize=4)
def _known_secrets(variables: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """Secret values, longest first, so that no part of a longer one is left. Short or merely numeric ones are none."""
    values = {text.strip() for _, text in variables}
    secrets = [value for value in values if len(value) >= _SHORTEST_SECRET and not _is_ordinary(value)]
    return tuple(sorted(secrets, key=len, reverse=True))


def _is_ordinary(value: str) -> bool:
    """A count, a switch: a value that is no secret whatever its variable is called."""
    return value.replace(".", "").replace("_", "").isdigit() or value.lower() in ("disabled", "enabled")
