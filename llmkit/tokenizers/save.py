"""Puts a tokenizer beside a model."""

from __future__ import annotations

from pathlib import Path

from llmkit.interfaces import Tokenizer
from llmkit.tokenizers.hf_json import HFTokenizer
from llmkit.tokenizers.sentencepiece import SentencePieceTokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, kind: str, *, segments: bool = True) -> None:
    """Into the folder of a model of ``kind`` (``interfaces.ModelConfig.kind``).

    Where llmkit trained the tokenizer, ``transformers`` will make of a text what the model was trained on: a whole row
    for an encoder or an encoder-decoder, a row without its end for a decoder. ``segments``: whether the model tells the
    first text of a pair from the second. Tokenizers of others stay as they are.
    """
    if isinstance(tokenizer, HFTokenizer):
        tokenizer.save(folder, kind=kind, segments=segments)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer.save(folder, kind=kind)
    else:
        tokenizer.save(folder)
