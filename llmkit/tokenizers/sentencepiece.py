"""SentencePiece tokenizers: BPE or Unigram with byte fallback, so that every string has ids and no text is unknown.

The training flags are those whose models convert exactly to ``tokenizer.json``: no normalisation, no space put before a
text, all whitespace kept. The one thing that does not survive is U+2581, which SentencePiece uses for a space.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from llmkit.errors import ConfigError, DataError
from llmkit.interfaces import TokenIds
from llmkit.safe_files import followed, read_bytes
from llmkit.settings import Range
from llmkit.tokenizers import spans, vocabulary
from llmkit.tokenizers.hf_files import (
    BEGINS_KEY,
    CONFIG_FILE,
    FORMAT_KEY,
    SENTENCEPIECE,
    TEMPLATE_FILE,
    ModelProto,
    template_files,
    with_coarse_scores,
    with_control_pieces,
    write_hf_files,
    write_template_files,
)

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

logger = logging.getLogger("llmkit.tokenizers")

MODEL_FILE = "tokenizer.model"
CONTROL_SYMBOLS = ("<unk>", "<s>", "</s>", "<pad>")  # ids 0 to 3
_MIN_VOCAB_SIZE = len(CONTROL_SYMBOLS) + 256 + 1  # and one byte piece for each byte value, and one character
_TRAIN_THREADS = 4  # the counts of Unigram are added in an order that depends on it: never the number of cores
# The trainer drops, in silence, sentences longer than its limit and those with U+2585
_SENTENCE = re.compile(r"[^\u2585]{1,2000}(?=[\s\u2585]|\Z)|[^\u2585]{1,2000}")
_MAX_SENTENCE_BYTES = 16384
# Unigram adds up scores in fp32, which is exact over so few characters; and BPE is fastest on strings of this length
_SEGMENT = re.compile(r"(?s).{1000,}?[^ ](?= )|.+")


@dataclass(frozen=True)
class SentencePieceSpec:
    """Trains a SentencePiece model on the training text, or opens the one at ``path``."""

    kind: Literal["bpe", "unigram"]
    vocab_size: Annotated[int, Range(_MIN_VOCAB_SIZE, 2**20)]
    path: str | None
    character_coverage: Annotated[float, Range(0.9, 1)]
    split_digits: bool
    extra_symbols: list[str]
    n_sentinels: Annotated[int, Range(0, 1000)]
    max_train_bytes: Annotated[int, Range(1024)]

    def problems(self) -> list[tuple[str, str]]:
        """Extra symbols that cannot be one."""
        symbols = [*self.sentinels, *self.extra_symbols]
        found = [
            ("extra_symbols", f"{symbol!r} is empty, reserved or given twice")
            for place, symbol in enumerate(symbols)
            if not symbol or symbol in CONTROL_SYMBOLS or symbol in symbols[:place]
        ]
        if self.vocab_size < _MIN_VOCAB_SIZE + len(symbols):
            found.append(("extra_symbols", "the symbols leave no room for characters: raise vocab_size"))
        return found

    @property
    def sentinels(self) -> list[str]:
        """The symbols that stand for spans taken out of a text (T5)."""
        return [f"<extra_id_{number}>" for number in range(self.n_sentinels)]

    def symbols(self) -> list[str] | None:
        return [*self.extra_symbols, *self.sentinels] if self.path is None else None

    def open(self) -> SentencePieceTokenizer | None:
        """The model at ``path`` (the file, or a folder that holds ``tokenizer.model``)."""
        return None if self.path is None else SentencePieceTokenizer.load(followed(Path(self.path).expanduser()))

    def key(self) -> dict[str, Any]:
        from importlib.metadata import version  # slow to import, and the config check imports this module

        if (tokenizer := self.open()) is not None:
            return {"sentencepiece": tokenizer.fingerprint}
        return {**asdict(self), "trainer": version("sentencepiece")}

    def train(self, texts: Iterable[str], folder: Path) -> SentencePieceTokenizer:
        """Train on the first ``max_train_bytes`` of ``texts``; the same texts give the same model.

        Raises ``ConfigError`` when the text is too small for ``vocab_size``, with the largest size it allows.
        """
        from sentencepiece import SentencePieceTrainer

        model = io.BytesIO()
        try:
            SentencePieceTrainer.train(
                sentence_iterator=_sentences(texts, self.max_train_bytes),
                model_writer=model,
                model_type=self.kind,
                vocab_size=self.vocab_size,
                character_coverage=self.character_coverage,
                split_digits=self.split_digits,
                control_symbols=[*self.extra_symbols, *self.sentinels],
                required_chars=self._symbol_characters(),
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=3,
                max_sentence_length=_MAX_SENTENCE_BYTES,
                num_threads=_TRAIN_THREADS,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise self._training_error(str(error)) from error
        coarse = with_coarse_scores(model.getvalue()) if self.kind == "unigram" else model.getvalue()
        tokenizer = SentencePieceTokenizer(coarse)
        tokenizer.save(folder)
        return tokenizer

    def _symbol_characters(self) -> str:
        """Characters Unigram must know so that a symbol's name in a text is spelled out, by ``tokenizer.json`` too."""
        symbols = (*CONTROL_SYMBOLS, *self.extra_symbols, *self.sentinels, "<0x0123456789ABCDEF>")
        return "".join(sorted(set("".join(symbols)))) if self.kind == "unigram" else ""

    def _training_error(self, message: str) -> ConfigError | DataError:
        if high := re.search(r"too high.*<= (\d+)", message):
            what = f"the text is too small for a vocabulary of {self.vocab_size}"
            fix = f"set tokenizer.vocab_size to at most {high[1]}, or give more text"
            return ConfigError(what, where="tokenizer.vocab_size", fix=fix)
        if low := re.search(r"required_chars\. \d+ vs (\d+)", message):
            what = f"a vocabulary of {self.vocab_size} does not hold the characters of the text"
            fix = f"set tokenizer.vocab_size to at least {low[1]}, or lower tokenizer.character_coverage"
            return ConfigError(what, where="tokenizer.vocab_size", fix=fix)
        if "sentences_.empty" in message:
            return DataError("there is no text to train a tokenizer on", where="data.path")
        return DataError(f"the tokenizer cannot be trained: {message[:300]}", where="tokenizer")


def _sentences(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Pieces of the texts, cut before whitespace. Line ends stay inside the pieces: only so are they learned."""
    left = max_bytes
    for text in texts:
        left -= len(text.encode())
        yield from _SENTENCE.findall(text)
        if left <= 0:
            logger.info("tokenizer trained on the first %d bytes of the text", max_bytes - left)
            return


class SentencePieceTokenizer:
    """Implements ``interfaces.Tokenizer`` on a serialised SentencePiece model."""

    def __init__(
        self,
        model: bytes,
        where: str = "tokenizer",
        templates: Mapping[str, bytes] | None = None,
        *,
        begins: bool = True,
    ) -> None:
        """``begins``: documents begin with the begin symbol, where the model has one."""
        self._model, self._templates, self._begins = model, templates or {}, begins
        self._processor, self._proto = opened(model, where)
        self._words_apart = self._proto.words_apart
        self.vocab_size = int(self._processor.vocab_size())
        if self._processor.eos_id() < 0:
            fix = "train it with an eos_id, or train a new one with tokenizer.path=null"
            raise ConfigError("the tokenizer has no end-of-text symbol", where=where, fix=fix)
        self.eos_id = int(self._processor.eos_id())
        self.bos_token_id = _id_or_none(self._processor.bos_id())
        self.bos_id = self.bos_token_id if begins else None
        self.unk_id = _id_or_none(self._processor.unk_id())
        pad_id = _id_or_none(self._processor.pad_id())
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.fingerprint = hashlib.sha256(model + (b"" if begins else b"no begin symbol")).hexdigest()

    @classmethod
    def load(cls, path: Path) -> SentencePieceTokenizer:
        """From ``tokenizer.model`` or the folder that holds it; a chat template beside it is kept.

        Of others' models the begin symbol stands before a text where the settings beside it say so.
        """
        from llmkit.tokenizers.folder import read_json  # which reads models of others, with this module

        file = path / MODEL_FILE if path.is_dir() else path
        settings = read_json(file.with_name(CONFIG_FILE))
        begins = bool(settings.get(BEGINS_KEY, settings.get(FORMAT_KEY) == SENTENCEPIECE))
        try:
            return cls(read_bytes(file), str(file), template_files(file.parent), begins=begins)
        except OSError as error:
            what = f"the tokenizer cannot be read: {error.strerror}"
            raise ConfigError(what, where=str(file), fix="give a tokenizer.model or its folder") from error

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """In one thread, because preparation spreads over processes. Raises ``DataError`` for a lone surrogate."""
        split = [self._segments(text) for text in texts]
        ids = iter(self._processor.encode(list(chain.from_iterable(split)), num_threads=1))
        return [list(chain.from_iterable(islice(ids, len(part)))) for part in split]

    def _segments(self, text: str) -> list[bytes]:
        """Parts of a text that can be encoded one by one."""
        try:
            return [part.encode() for part in (_SEGMENT.findall(text) if self._words_apart else [text])]
        except UnicodeEncodeError as error:
            raise DataError("a text holds half of a surrogate pair, which is no character") from error

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([int(i) for i in ids])
        return text

    @property
    def special_names(self) -> dict[str, str]:
        """Role -> symbol, such as ``eos_token`` -> ``</s>``: what chat templates may write."""
        return {f"{name}_token": self._proto.symbol(name) for name in self._proto.ids}

    @property
    def chat_template_files(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """(settings, files) in which a chat template may stand."""
        return {}, dict(self._templates)

    def encode_symbols(self, text: str) -> list[int]:
        """Ids of a text in which the names of symbols are those symbols, as a rendered chat template has them."""
        return self.encode_spans(text, ())[0]

    def encode_spans(self, text: str, plain: Sequence[spans.Span] | None = None) -> spans.Spans:
        symbols = [] if plain is None else spans.named_symbols(text, plain, self._symbols)
        return spans.with_symbols(text, symbols, lambda start, stop: self._plain_spans(text[start:stop]))

    def _plain_spans(self, text: str) -> spans.Spans:
        from sentencepiece.sentencepiece_pb2 import SentencePieceText

        ids: list[int] = []
        found: list[spans.Span] = []
        place = 0
        for segment in self._segments(text):
            part = segment.decode()
            reply = self._processor.encode(segment, out_type="serialized_proto")
            pieces = SentencePieceText.FromString(reply).pieces
            _, offsets = self._processor.Normalize(segment, with_offsets=True)
            ids += [piece.id for piece in pieces]
            where = spans.from_bytes(part, [piece.piece for piece in pieces], offsets)
            found += [(place + start, place + stop) for start, stop in where]
            place += len(part)
        return ids, found

    @cached_property
    def _symbols(self) -> dict[str, int]:
        return {self._proto.pieces[index][0]: index for index in self._proto.silent_ids if index != self.unk_id}

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        from llmkit.tokenizers import chat_template  # which reads models of others, with this module

        return chat_template.render(self, messages, add_generation_prompt=add_generation_prompt)

    def with_chat_template(self, source: str) -> SentencePieceTokenizer:
        """The same with ``source`` as its one chat template."""
        templates = {TEMPLATE_FILE: source.encode()}
        return SentencePieceTokenizer(self._model, templates=templates, begins=self._begins)

    def id_of(self, name: str) -> int | None:
        """The id of a piece or a symbol."""
        return next((index for index, (piece, _, _) in enumerate(self._proto.pieces) if piece == name), None)

    def with_symbols(self, names: Sequence[str]) -> SentencePieceTokenizer:
        """The same with ``names``, which its vocabulary must lack, as control symbols on the next ids."""
        model = with_control_pieces(self._model, names)
        return SentencePieceTokenizer(model, templates=self._templates, begins=self._begins)

    def token_ids(self) -> TokenIds:
        return self._token_ids

    @cached_property
    def _token_ids(self) -> TokenIds:
        pieces = {index: piece for index, (piece, _, _) in enumerate(self._proto.pieces)}
        begins_word = vocabulary.unknown if self._proto.space_after else vocabulary.after_space()
        vocabulary.warn_if_unknown(begins_word)
        return vocabulary.build_token_ids(
            pieces,
            begins_word,
            self._proto.silent_ids,
            vocabulary.find_roles({piece: index for index, piece in pieces.items()}),
            vocab_size=self.vocab_size,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
        )

    @property
    def lossy(self) -> bool:
        """Whether text changes by design, as it does in models that normalise it."""
        return self._proto.lossy

    def save(self, folder: Path, *, kind: str | None = None) -> None:
        """``tokenizer.model``, and what ``transformers`` reads, for a model of ``kind`` where that is known."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self._model)
        write_hf_files(self._proto, folder, kind, begins=self._begins)
        write_template_files(self._templates, folder)


def opened(model: bytes, where: str) -> tuple[SentencePieceProcessor, ModelProto]:
    """The library's own object and what it was made from. Raises ``DataError`` for a damaged model."""
    from sentencepiece import SentencePieceProcessor

    damaged = DataError("this is no SentencePiece model", where=where, fix="copy the file again")
    if not model:  # which the library takes for "load it later"
        raise damaged
    try:
        processor = SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise damaged from error
    proto = ModelProto.parse(model)
    if not proto.complete:
        raise damaged
    return processor, proto


def _id_or_none(index: int) -> int | None:
    return int(index) if index >= 0 else None
