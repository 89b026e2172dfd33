"""Strings on which tokenizers go wrong, and small tokenizers to try them on."""

from __future__ import annotations

import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Literal

from llmkit.data.readers.base import Document, chunks_of, read_chunk
from llmkit.tokenizers.hf_json import HFTokenizer
from llmkit.tokenizers.sentencepiece import SentencePieceSpec, SentencePieceTokenizer
from llmkit.tokenizers.wordpiece import WordPieceSpec
from tests.unit.data.readers_support import SETTINGS

ODD = [
    *("", "a", "\n", " ", "  ", "\t", "\n\n\n", "a  b", "  a", " a ", "\r\n", "\x00", "\x01\x1b[0m", "\x7f"),
    *("</s>", "<s>", "<unk>", "<pad>", "<|user|>", "<|endoftext|>", "a</s>b", "<0x0A>", "<0xFF><0x00>", "</ s>"),
    *("é", "e\u0301", "漢字かな交じり文", "😀", "👩‍👩‍👧", "🇩🇪", "\u00a0", "\u3000", "\u2028", "ﬁ", "①", "٣", "١٢٣"),
    *("\ufeff", "\u200b", "İ", "ß", "Ǆ", "𝔘𝔫𝔦", "\u2585", "\ufffd", "\U0010ffff", "עברית", "हिन्दी", "ไทย", "한국어"),
    *(
        "12345",
        "3.14159",
        "1e-05",
        "x" * 50,
        "ab" * 30,
        " " * 37,
        "\n" * 11,
        "=" * 81,
        "-" * 80,
        "\t" * 9,
        "....",
        "?!?!",
    ),
    *(
        "aaaaabbbbb",
        "nnnn",
        "$$$",
        "    def f(x):\n        return x\n",
        "| a | b |\n|---|---|\n",
        "http://a.b/c?d=e&f=g#h",
    ),
]
_LETTERS = "abcdefe \n\t.,:;()=_0123456789éß漢😀<s>/AB'\"-"


@cache
def documents() -> tuple[str, ...]:
    """Python's help topics."""
    (topics, *_) = chunks_of(["builtin:python_docs"], 1 << 20)
    return tuple(row.text for row in read_chunk(topics, SETTINGS) if isinstance(row, Document))


@cache
def strings() -> tuple[str, ...]:
    """More than 500: the odd ones, runs of one character beside another, random ones, and pieces of real text."""
    choose = random.Random(0)
    runs = [a * choose.randint(1, 30) + b * choose.randint(1, 20) for a in " \n=-ea." for b in " \n=-ta."]
    mixed = ["".join(choose.choices(_LETTERS, k=choose.randint(1, 60))) for _ in range(300)]
    real = [text[start : start + 400] for text in documents() for start in (0, 700, 3001)]
    return tuple([*ODD, *runs, *mixed, *filter(None, real)])


def spec(kind: Literal["bpe", "unigram"], vocab_size: int = 1024, **changes: Any) -> SentencePieceSpec:
    settings: dict[str, Any] = {
        "path": None,
        "character_coverage": 0.9999,
        "split_digits": True,
        "extra_symbols": ["<|user|>"],
        "n_sentinels": 0,
        "max_train_bytes": 1 << 20,
    }
    return SentencePieceSpec(kind=kind, vocab_size=vocab_size, **{**settings, **changes})


@cache
def trained(kind: Literal["bpe", "unigram"]) -> SentencePieceTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return spec(kind).train(documents(), Path(folder))


BERT_ODD = [
    *("[MASK]", "[CLS] a [SEP]", "[UNK]", "[PAD][MASK]", "[unused5]", "##ing", "a##b", "# #", "[mask]", "[ MASK ]"),
    *("É", "naïve café", "ÅNGSTRÖM", "a\u0301\u0302\u0303", "\u0301", "İstanbul", "ΣΑΣ", "ẞ", "한국어 한", "が", "ｶﾞ"),
    *("a\u0000b", "a\u200bb", "a\u00adb", "a\x07b", "\u202eabc", "a\ufffdb", "\ue000", "a\u2028b", "a\u3000b"),
    *("漢字abc漢字", "abc漢", "㐀𠀀豈", "。、「」", "don't", "U.S.A.", "a-b_c", "¿qué?", "…", "$5.00", "x²", "½"),
    *("y" * 100, "y" * 101, "z" * 5000, "é" * 101, "漢" * 300, "😀" * 120, "a." * 200, "<extra_id_0>", "<extra_id_9>"),
]
ADVERSARIAL = "[MASK] </s> <extra_id_0>[SEP]<mask><s><pad> [PAD]<|fim_prefix|>a<fim_middle>[CLS]<extra_id_99> <unk>"


def wordpiece_spec(vocab_size: int = 1024, **changes: Any) -> WordPieceSpec:
    settings: dict[str, Any] = {
        "path": None,
        "lowercase": True,
        "strip_accents": None,
        "character_coverage": 0.9999,
        "min_frequency": 2,
        "extra_symbols": ["<extra_id_0>"],
        "max_train_bytes": 1 << 20,
    }
    return WordPieceSpec(vocab_size=vocab_size, **{**settings, **changes})


@cache
def trained_wordpiece(lowercase: bool = True) -> HFTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return wordpiece_spec(lowercase=lowercase).train(documents(), Path(folder))


@cache
def trained_byte_level() -> HFTokenizer:
    """Byte-level BPE as GPT-2 and RoBERTa have it."""
    from tokenizers import ByteLevelBPETokenizer

    backend = ByteLevelBPETokenizer()
    symbols = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<extra_id_1>", "<extra_id_0>"]
    backend.train_from_iterator(documents()[:40], vocab_size=1024, show_progress=False, special_tokens=symbols)
    return HFTokenizer(backend.to_str(), {}, {}, "byte level")


@cache
def many_strings() -> tuple[str, ...]:
    """More than 2,000: all of the above, and runs of characters of every script, direction and class."""
    choose = random.Random(1)
    letters = "abcXYZ àéîõü αβγΔ Жзий אבגד ابتث हिन्दी ไทยก 漢字仮名 かなカナ 한국어 😀👍🏽👩‍🚀🇩🇪 0123456789 ١٢٣४५ ½²①Ⅷ ﬁﬀ e\u0301a\u0308\u0301"  # noqa: E501
    signs = ".,;:!? ()[]{}<>| '\"`´’“ +-*/=^~ $€£₽ \x00\x01\x1b\x7f \u200b\u200d\ufeff\u00ad\u202e"
    spaces = [" \t\n", "\r\n\x0b\x0c", "\u00a0\u2003\u3000\u2028\x85"]
    scripts = [*letters.split(" "), *signs.split(" "), *spaces]
    mixed = []
    for _ in range(1800):
        alphabet = "".join(choose.sample(scripts, choose.randint(1, 4))) + " " * choose.randint(0, 3)
        mixed.append("".join(choose.choices(alphabet, k=choose.randint(1, 40))))
    found = tuple(dict.fromkeys([*BERT_ODD, ADVERSARIAL, *strings(), *mixed]))
    assert len(found) >= 2000
    return found
