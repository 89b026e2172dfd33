"""A vocabulary with more special tokens, such as the marks of a chat. The model's embeddings must grow with it."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.errors import ConfigError
from llmkit.interfaces import Tokenizer
from llmkit.tokenizers.hf_json import HFTokenizer
from llmkit.tokenizers.sentencepiece import SentencePieceTokenizer


def add_tokens(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """The tokenizer with ``names`` as special tokens: new ones on the next ids, in order; those it has stay.

    All other ids stay the same, and no text is ever made into a new one. A new name that is a usual name of a role,
    such as ``<pad>``, ``<mask>`` or ``<extra_id_0>``, takes that role where it was free. Raises ``ConfigError`` for an
    empty or blank name, for one given twice, for a piece of text, and for a tokenizer of another kind.
    """
    if not isinstance(tokenizer, HFTokenizer | SentencePieceTokenizer):
        raise ConfigError(f"a {type(tokenizer).__name__} takes no new tokens", where="tokenizer")
    special = tokenizer.token_ids().special
    new = []
    for place, name in enumerate(names):
        index = tokenizer.id_of(name)
        if not name.strip() or name in names[:place]:
            raise ConfigError(f"{name!r} is blank or given twice", where="tokenizer", fix="give every new token a name")
        if index is None:
            new.append(name)
        elif not special[index]:
            fix = f"choose a name that is no piece of the vocabulary, such as <|{name}|>"
            raise ConfigError(f"{name!r} is a piece of text in this vocabulary", where="tokenizer", fix=fix)
    return tokenizer.with_symbols(new) if new else tokenizer
