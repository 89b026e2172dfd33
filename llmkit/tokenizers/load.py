"""Opens the tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path

from llmkit.errors import DataError
from llmkit.gguf_file import SUFFIX
from llmkit.interfaces import Tokenizer
from llmkit.tokenizers.folder import FILES, MARIAN_FILE, read_json, stands_alone, tokenizer_file
from llmkit.tokenizers.hf_files import CONFIG_FILE, FORMAT_KEY, SENTENCEPIECE
from llmkit.tokenizers.hf_json import HFTokenizer
from llmkit.tokenizers.marian import MarianTokenizer
from llmkit.tokenizers.sentencepiece import MODEL_FILE, SentencePieceTokenizer
from llmkit.tokenizers.sentencepiece_files import MODEL_FILES


def load_tokenizer(folder: Path) -> Tokenizer:
    """From ``tokenizer.model`` where llmkit trained it or nothing else is there, else from the files of others.

    ``folder`` may also be a ``.gguf`` file.
    """
    if folder.suffix == SUFFIX and folder.is_file():
        from llmkit.tokenizers.gguf import load_gguf_tokenizer

        return load_gguf_tokenizer(folder)
    if (folder / MODEL_FILE).is_file() and read_json(folder / CONFIG_FILE).get(FORMAT_KEY) == SENTENCEPIECE:
        return SentencePieceTokenizer.load(folder)
    file = tokenizer_file(folder)
    if file is None:
        fix = f"the folder must hold one of {', '.join(FILES)}"
        raise DataError("there is no tokenizer in the folder", where=str(folder), fix=fix)
    if file.name == MARIAN_FILE:
        return MarianTokenizer.load(folder)
    if file.name in MODEL_FILES and stands_alone(file):
        return SentencePieceTokenizer.load(file)
    return HFTokenizer.load(folder)
