"""WordPiece, BERT's tokenizer, trained by the ``tokenizers`` package (extra ``hf``) and saved as ``tokenizer.json``.

Text is cleaned, lower-cased and split as BERT does it, so case, accents and the number of spaces do not come back. The
trainer of BERT was never published; this one joins the most frequent pair of pieces again and again.
"""

from __future__ import annotations

import json
import logging
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmkit.errors import ConfigError, DataError, missing_extra
from llmkit.safe_files import followed
from llmkit.settings import Range
from llmkit.tokenizers.bert_files import MAX_WORD_CHARACTERS, PREFIX, SPECIAL_SYMBOLS, bert_json, bert_settings
from llmkit.tokenizers.hf_files import FORMAT_KEY, WORDPIECE
from llmkit.tokenizers.hf_json import HFTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

logger = logging.getLogger("llmkit.tokenizers")

_MIN_VOCAB_SIZE = len(SPECIAL_SYMBOLS) + 2  # and one character, at the beginning of a word and inside it
_LONG = re.compile(rf"\S{{{MAX_WORD_CHARACTERS + 1},}}")


@dataclass(frozen=True)
class WordPieceSpec:
    """Trains a WordPiece vocabulary on the training text, or opens the one at ``path``."""

    vocab_size: Annotated[int, Range(_MIN_VOCAB_SIZE, 2**20)]
    path: str | None
    lowercase: bool
    strip_accents: bool | None
    character_coverage: Annotated[float, Range(0.9, 1)]
    min_frequency: Annotated[int, Range(1)]
    extra_symbols: list[str]
    max_train_bytes: Annotated[int, Range(1024)]

    def problems(self) -> list[tuple[str, str]]:
        """Extra symbols that cannot be one."""
        found = [
            ("extra_symbols", f"{symbol!r} is reserved or given twice")
            for place, symbol in enumerate(self.extra_symbols)
            if symbol in SPECIAL_SYMBOLS or symbol in self.extra_symbols[:place]
        ]
        found += [
            ("extra_symbols", f"{symbol!r} could be a word of the text: put it in brackets, such as <{symbol}>")
            for symbol in self.extra_symbols
            if len(symbol) < 2 or not any(map(_is_punctuation, symbol))
        ]
        if self.vocab_size < _MIN_VOCAB_SIZE + len(self.extra_symbols):
            found.append(("extra_symbols", "the symbols leave no room for characters: raise vocab_size"))
        return found

    def symbols(self) -> list[str] | None:
        return [*SPECIAL_SYMBOLS, *self.extra_symbols] if self.path is None else None

    def open(self) -> HFTokenizer | None:
        """The tokenizer at ``path``: ``tokenizer.json``, ``vocab.txt`` or a folder that holds one of them."""
        return None if self.path is None else HFTokenizer.load(followed(Path(self.path).expanduser()))

    def key(self) -> dict[str, Any]:
        if (tokenizer := self.open()) is not None:
            return {"hf_json": tokenizer.fingerprint}
        return {**asdict(self), "trainer": _trainer_version()}

    def train(self, texts: Iterable[str], folder: Path) -> HFTokenizer:
        """Train on the first ``max_train_bytes`` of ``texts``; the same texts give the same file.

        Raises ``ConfigError`` when the text cannot fill ``vocab_size`` or has more characters than it holds, with the
        size that would do.
        """
        settings = bert_settings(lowercase=self.lowercase, strip_accents=self.strip_accents)
        pieces = self._learn(texts, settings)
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        content = json.dumps(bert_json(vocabulary, settings, self.extra_symbols), ensure_ascii=False, indent=1) + "\n"
        tokenizer = HFTokenizer(content, {**settings, FORMAT_KEY: WORDPIECE}, {}, str(folder))
        tokenizer.save(folder)
        return tokenizer

    def _learn(self, texts: Iterable[str], settings: dict[str, Any]) -> list[str]:
        """The pieces in the order of their ids: symbols, characters, and what the trainer joins."""
        rules = _rules(settings)
        sample = list(_prepared(texts, rules, self.max_train_bytes))
        counts: Counter[str] = Counter()
        for text in sample:
            counts.update(text)
        alphabet = _alphabet(counts, self.character_coverage)
        if not alphabet:
            raise DataError("there is no text to train a tokenizer on", where="data.path")
        inside = [f"{PREFIX}{character}" for character in alphabet if _can_stand_inside(character, rules)]
        first = [*SPECIAL_SYMBOLS, *self.extra_symbols, *alphabet, *inside]
        if len(first) > self.vocab_size:
            what = f"a vocabulary of {self.vocab_size} does not hold the characters of the text"
            fix = f"set tokenizer.vocab_size to at least {len(first)}, or lower tokenizer.character_coverage"
            raise ConfigError(what, where="tokenizer.vocab_size", fix=fix)
        rare = dict.fromkeys((ord(character) for character in counts.keys() - set(alphabet)), " ")
        return self._join((text.translate(rare) for text in sample), first, alphabet)

    def _join(self, sample: Iterator[str], first: list[str], alphabet: list[str]) -> list[str]:
        """``first`` and the pieces made of them.

        The trainer takes the older of two equally frequent pairs, and gives ids to ``##`` characters in the order of a
        hash map. All of ``first`` are handed to it as symbols, because their order it keeps.
        """
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        learner = Tokenizer(models.WordPiece(unk_token=SPECIAL_SYMBOLS[1]))
        learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=self.vocab_size,
            min_frequency=self.min_frequency,
            show_progress=False,
            special_tokens=first,
            limit_alphabet=len(alphabet),
            initial_alphabet=alphabet,
            continuing_subword_prefix=PREFIX,
        )
        learner.train_from_iterator(sample, trainer)
        vocabulary: dict[str, int] = learner.get_vocab(with_added_tokens=False)
        if len(vocabulary) < self.vocab_size:
            what = f"the text is too small for a vocabulary of {self.vocab_size}"
            fix = f"set tokenizer.vocab_size to at most {len(vocabulary)}, or give more text"
            raise ConfigError(what, where="tokenizer.vocab_size", fix=fix)
        return sorted(vocabulary, key=vocabulary.__getitem__)


def _rules(settings: dict[str, Any]) -> Backend:
    """BERT's normalisation and splitting, without a vocabulary worth the name."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise missing_extra("tokenizers", "hf") from None
    vocabulary = {symbol: index for index, symbol in enumerate(SPECIAL_SYMBOLS)}
    return Tokenizer.from_str(json.dumps(bert_json(vocabulary, settings)))


def _trainer_version() -> str | None:
    """Of the package that trains; the configuration can be checked without it."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    try:
        return f"tokenizers {version('tokenizers')}"
    except PackageNotFoundError:
        return None


def _prepared(texts: Iterable[str], rules: Backend, max_bytes: int) -> Iterator[str]:
    """The texts as BERT normalises them, without the words that are too long to be known."""

    def short_words(run: re.Match[str]) -> str:
        words: Sequence[tuple[str, Any]] = rules.pre_tokenizer.pre_tokenize_str(run[0])
        return " ".join(word for word, _ in words if len(word) <= MAX_WORD_CHARACTERS)

    left = max_bytes
    for text in texts:
        left -= len(text.encode())
        yield _LONG.sub(short_words, rules.normalizer.normalize_str(text))
        if left <= 0:
            logger.info("tokenizer trained on the first %d bytes of the text", max_bytes - left)
            return


def _alphabet(counts: Counter[str], coverage: float) -> list[str]:
    """The most frequent characters that make up a share of ``coverage`` of the text, in the order of their code."""
    by_count = sorted((-count, character) for character, count in counts.items() if not character.isspace())
    needed = -coverage * sum(count for count, _ in by_count)
    kept = []
    for count, character in by_count:
        if needed <= 0:
            break
        kept.append(character)
        needed += count
    return sorted(kept)


def _can_stand_inside(character: str, rules: Backend) -> bool:
    """Not punctuation nor an ideograph, which are words of their own."""
    word = rules.normalizer.normalize_str(f"a{character}a")
    return len(rules.pre_tokenizer.pre_tokenize_str(word)) == 1


def _is_punctuation(character: str) -> bool:
    """As BERT splits it off: ASCII signs, and what Unicode calls punctuation."""
    return character in string.punctuation or unicodedata.category(character).startswith("P")
