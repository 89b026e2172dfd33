"""A vocabulary with more special tokens, such as the marks of a chat. The model's embeddings must grow with it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from llmkit.errors import ConfigError
from llmkit.interfaces import Tokenizer
from llmkit.tokenizers.hf_json import HFTokenizer
from llmkit.tokenizers.sentencepiece import SentencePieceTokenizer

log = logging.getLogger("llmkit.tokenizers")


def add_tokens(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """The tokenizer with ``names`` as special tokens: new ones on the next ids, in order; those it has stay.

    All other ids stay the same, and no text is ever made into a new one. A new name that is a usual name of a role,
    such as ``<pad>``, ``<mask>`` or ``<extra_id_0>``, takes that role where it was free. Raises ``ConfigError`` for an
    empty or blank name, for one given twice, for a piece of text, and for a tokenizer of another kind.
    """
    if not names:
        return tokenizer
    if not isinstance(tokenizer, HFTokenizer | SentencePieceTokenizer):
        raise ConfigError(
            f"a {type(tokenizer).__name__} takes no new tokens", where="add_tokens", fix="leave add_tokens out"
        )
    special = tokenizer.token_ids().special
    new = []
    for place, name in enumerate(names):
        index = tokenizer.id_of(name)
        if not name.strip() or name in names[:place]:
            what = f"{name!r} is given twice" if name.strip() else f"{name!r} is blank"
            raise ConfigError(what, where="add_tokens", fix="give every new token one name, once")
        if index is None:
            new.append(name)
        elif not special[index]:
            fix = f"choose a name that is no piece of the vocabulary, such as <|{name}|>"
            raise ConfigError(f"{name!r} is a piece of text in this vocabulary", where="add_tokens", fix=fix)
    there = [name for name in names if name not in new]
    log.info("add_tokens: %d added to the vocabulary; already in it: %s", len(new), ", ".join(there) or "none")
    return tokenizer.with_symbols(new) if new else tokenizer
