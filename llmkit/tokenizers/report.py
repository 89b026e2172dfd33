"""How well a tokenizer fits a text."""

from __future__ import annotations

from collections.abc import Iterable

from llmkit.interfaces import Tokenizer


def tokenizer_report(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, float | int]:
    """Figures over held-out ``texts``.

    ``bytes_per_token``: UTF-8 bytes per token. ``tokens_per_word``: the fertility, over words between whitespace.
    ``unknown_fraction``: share of tokens that stand for text the vocabulary has not. ``round_trip_failures``: documents
    that ``decode(encode(text))`` does not give back, to the last character. ``lossy``: 1 for a tokenizer that changes
    text by design (lower case, accents, spaces); its failures are to be expected. Without any text all others are 0.
    """
    unknown = getattr(tokenizer, "unk_id", None)
    n_bytes = n_tokens = n_words = n_unknown = failures = n_documents = 0
    for text in texts:
        ids = tokenizer.encode(text)
        n_documents += 1
        n_bytes += len(text.encode())
        n_words += len(text.split())
        n_tokens += len(ids)
        n_unknown += 0 if unknown is None else ids.count(unknown)
        failures += tokenizer.decode(ids) != text
    return {
        "bytes_per_token": n_bytes / max(n_tokens, 1),
        "tokens_per_word": n_tokens / max(n_words, 1),
        "unknown_fraction": n_unknown / max(n_tokens, 1),
        "round_trip_failures": failures,
        "lossy": int(getattr(tokenizer, "lossy", False)),
        "n_documents": n_documents,
    }
