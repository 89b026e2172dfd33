"""BERT's vocabulary as a ``tokenizer.json``: from WordPiece training, and from the ``vocab.txt`` of older folders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from llmkit.errors import DataError
from llmkit.safe_files import read_text
from llmkit.tokenizers.ends import around, pair_template

VOCAB_FILE = "vocab.txt"  # one piece a line; the line number is the id
SPECIAL_SYMBOLS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PREFIX = "##"  # of a piece that goes on with a word
MAX_WORD_CHARACTERS = 100  # a longer word is unknown as a whole
_ROLES = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_SYMBOLS, strict=True))
_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer")


def bert_settings(*, lowercase: bool, strip_accents: bool | None) -> dict[str, Any]:
    """What BERT's ``tokenizer_config.json`` says; ``strip_accents`` None means "as ``lowercase``"."""
    return {
        **_ROLES,
        "do_lower_case": lowercase,
        "strip_accents": strip_accents,
        "tokenize_chinese_chars": True,
        "model_input_names": input_names(segments=True),
    }


def input_names(segments: bool) -> list[str]:
    """What ``transformers`` makes of a text by default."""
    return ["input_ids", *(["token_type_ids"] if segments else []), "attention_mask"]


def bert_json(
    vocabulary: Mapping[str, int], settings: Mapping[str, Any], extra_symbols: Iterable[str] = ()
) -> dict[str, Any]:
    """The content of ``tokenizer.json``; ``settings`` as in ``bert_settings``, each with BERT's own default.

    Its users get ``[CLS] text [SEP]`` and ``[CLS] text [SEP] text [SEP]`` with segments 0 and 1.
    """
    names = {role: named(settings, role) or usual for role, usual in _ROLES.items()}
    cls, sep = names["cls_token"], names["sep_token"]
    symbols = sorted({*names.values(), *extra_symbols} & vocabulary.keys(), key=vocabulary.__getitem__)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocabulary[symbol], "content": symbol, **flags} for symbol in symbols],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": settings.get("tokenize_chinese_chars", True),
            "strip_accents": settings.get("strip_accents"),
            "lowercase": settings.get("do_lower_case", True),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": pair_template([(cls, vocabulary[cls])], [(sep, vocabulary[sep])]),
        "decoder": {"type": "WordPiece", "prefix": PREFIX, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": names["unk_token"],
            "continuing_subword_prefix": PREFIX,
            "max_input_chars_per_word": MAX_WORD_CHARACTERS,
            "vocab": dict(vocabulary),
        },
    }


def with_ends(text: str, kind: str) -> str:
    """A ``tokenizer.json`` from training here with the ends for a model of ``kind``; others' ends stay as they are."""
    content = json.loads(text)
    cls, sep = [(name, content["model"]["vocab"][name]) for name in SPECIAL_SYMBOLS[2:4]]
    new, known = around(cls, sep, kind), [around(cls, sep, other) for other in ("decoder", "encoder")]
    if content["post_processor"] == new or content["post_processor"] not in known:
        return text
    return json.dumps({**content, "post_processor": new}, ensure_ascii=False, indent=1) + "\n"


def read_vocab_txt(file: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``tokenizer.json`` that a BERT folder without one would have. Raises ``DataError`` for other kinds of it."""
    vocabulary = {line.rstrip("\n"): index for index, line in enumerate(StringIO(read_text(file)))}
    needed = [named(settings, role) or usual for role, usual in _ROLES.items() if role != "mask_token"]
    absent = [name for name in needed if name not in vocabulary]
    kind = str(settings.get("tokenizer_class") or _CLASSES[0]).removesuffix("Fast")
    if absent or kind not in _CLASSES or settings.get("do_basic_tokenize") is False:
        reason = f"{absent[0]} is not in it" if absent else f"tokenizer_config.json asks for other rules ({kind})"
        fix = "let transformers write a tokenizer.json: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        raise DataError(f"this vocab.txt is not BERT's: {reason}", where=str(file), fix=fix)
    return bert_json(vocabulary, settings)


def named(settings: Mapping[str, Any], role: str) -> str | None:
    """The token that a ``tokenizer_config.json`` gives a role such as ``mask_token``."""
    value = settings.get(role)
    name = value.get("content") if isinstance(value, Mapping) else value
    return name if isinstance(name, str) else None
