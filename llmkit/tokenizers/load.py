"""Opens the tokenizer of a model folder."""

from __future__ import annotations

import json
from pathlib import Path

from llmkit.errors import DataError
from llmkit.interfaces import Tokenizer
from llmkit.tokenizers.bert_files import VOCAB_FILE
from llmkit.tokenizers.hf_files import CONFIG_FILE, FORMAT_KEY, TOKENIZER_FILE
from llmkit.tokenizers.hf_json import HFTokenizer
from llmkit.tokenizers.sentencepiece import MODEL_FILE, SentencePieceTokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """From ``tokenizer.model`` where llmkit trained it or nothing else is there, else from the files of others."""
    has_model = (folder / MODEL_FILE).is_file()
    has_json = any((folder / name).is_file() for name in (TOKENIZER_FILE, VOCAB_FILE))
    if has_model and (_says_sentencepiece(folder) or not has_json):
        return SentencePieceTokenizer.load(folder)
    if has_json:
        return HFTokenizer.load(folder)
    fix = f"the folder must hold {MODEL_FILE}, {TOKENIZER_FILE} or BERT's {VOCAB_FILE}"
    raise DataError("there is no tokenizer in the folder", where=str(folder), fix=fix)


def _says_sentencepiece(folder: Path) -> bool:
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise DataError(f"no readable JSON: {error}", where=str(folder / CONFIG_FILE)) from error
    return isinstance(content, dict) and content.get(FORMAT_KEY) == "sentencepiece"
