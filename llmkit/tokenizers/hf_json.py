"""Tokenizers of others, whatever their files, run as a ``tokenizer.json`` by ``tokenizers`` (extra ``hf``)."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import ConfigError, DataError, missing_extra
from llmkit.interfaces import TokenIds
from llmkit.safe_files import followed
from llmkit.tokenizers import chat_template
from llmkit.tokenizers import spans as places
from llmkit.tokenizers import vocabulary as vocabularies
from llmkit.tokenizers.added_tokens import entry, with_added
from llmkit.tokenizers.bert_files import input_names, named, with_ends
from llmkit.tokenizers.byte_pairs import BytePairs, byte_pairs
from llmkit.tokenizers.ends import ends_of
from llmkit.tokenizers.folder import MARIAN_FILE, read_source, written
from llmkit.tokenizers.hf_files import (
    CONFIG_FILE,
    FORMAT_KEY,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    WORDPIECE,
    write_template_files,
)
from llmkit.tokenizers.marian import MarianTokenizer

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

_LONG_BATCH = 1 << 18  # characters that repay the preparation of a second way to encode them
_HALF_CHARACTER = "a text holds half of a surrogate pair, which is no character"

# Where no file names the end of a text, a token of one of these names is it.
_KNOWN_NAMES = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "[CLS]"),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "[SEP]", "<|endoftext|>"),
    "pad_token": ("<pad>", "[PAD]", "<|pad|>"),
    "unk_token": ("<unk>", "[UNK]"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": vocabularies.MASK_NAMES,
}
_STAND_IN = {"bos_token": "cls_token", "eos_token": "sep_token"}  # BERT's words for the ends of a text
_KEPT_SETTINGS = (
    "do_lower_case",
    "strip_accents",
    "tokenize_chinese_chars",
    "model_input_names",
    "model_max_length",
    "chat_template",
    "padding_side",
    "extra_special_tokens",
    "additional_special_tokens",
)


@dataclass(frozen=True)
class HFTokenizerSpec:
    """Opens the tokenizer of others at ``path``: its folder, or a file of it.

    The files are ``tokenizer.json``, SentencePiece's ``tokenizer.model`` or ``spiece.model``, BERT's ``vocab.txt``,
    GPT-2's ``vocab.json`` with ``merges.txt``, or (a folder) Marian's ``source.spm``.
    """

    path: str | None

    def problems(self) -> list[tuple[str, str]]:
        return [] if self.path else [("path", "give the tokenizer.json or its folder")]

    def symbols(self) -> None:
        """Known once the file is open."""

    def open(self) -> HFTokenizer | MarianTokenizer:
        if not self.path:
            raise ConfigError("tokenizer=hf_json needs a path", where="tokenizer.path", fix="give a tokenizer.json")
        path = followed(Path(self.path).expanduser())
        return MarianTokenizer.load(path) if (path / MARIAN_FILE).is_file() else HFTokenizer.load(path)

    def train(self, texts: Iterable[str], folder: Path) -> HFTokenizer:
        """A ``tokenizer.json`` is never trained here."""
        fix = "use tokenizer=bpe, unigram or wordpiece to train one"
        raise ConfigError("tokenizer=hf_json cannot be trained", where="tokenizer", fix=fix)

    def key(self) -> dict[str, Any]:
        return {"hf_json": self.open().fingerprint}


class HFTokenizer:
    """Implements ``interfaces.Tokenizer`` on a ``tokenizer.json``."""

    def __init__(self, content: str, settings: dict[str, Any], side_files: dict[str, bytes], where: str) -> None:
        self._content, self._settings, self._side_files = content, settings, side_files
        self._backend = _backend(content, where)
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        self._names = {role: name for role in _KNOWN_NAMES if (name := _token(role, settings, vocabulary)) is not None}
        if "eos_token" not in self._names:
            fix = f"name it as eos_token in {CONFIG_FILE} beside the file"
            raise ConfigError("the tokenizer has no end-of-text token", where=where, fix=fix)
        ids = {role: vocabulary[name] for role, name in self._names.items()}
        self.eos_id: int = ids["eos_token"]
        self.bos_token_id: int | None = ids.get("bos_token")
        first, _ = ends_of(json.loads(content).get("post_processor"))
        self.bos_id: int | None = first if first in (self.bos_token_id, ids.get("cls_token")) else None
        self.unk_id: int | None = ids.get("unk_token")
        self.pad_id: int = ids.get("pad_token", self.eos_id)
        self._roles = vocabularies.find_roles(vocabulary, self._names.get("mask_token"))
        self._silent = self._spell_out_symbols()
        decided_by = f"{content}{self.bos_id}:{self.eos_id}:{self.pad_id}"
        self.fingerprint = hashlib.sha256(decided_by.encode()).hexdigest()

    @classmethod
    def load(cls, path: Path) -> HFTokenizer:
        """From one of the files named above or its folder; special and added tokens from the files beside it."""
        source = read_source(path)
        return cls(source.content, source.settings, source.side_files, source.where)

    @property
    def special_names(self) -> dict[str, str]:
        """Role -> token, such as ``eos_token`` -> ``</s>``: what chat templates may write."""
        return dict(self._names)

    @property
    def chat_template_files(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """(settings, files) in which a chat template may stand."""
        return self._settings, self._side_files

    def id_of(self, name: str) -> int | None:
        """The id of a piece or a special token."""
        index: int | None = self._backend.token_to_id(name)
        return index

    def with_symbols(self, names: Sequence[str]) -> HFTokenizer:
        """The same with ``names``, which its vocabulary must lack, as special tokens on the next ids."""
        old = json.loads(self._content)
        spaced = not vocabularies.word_rule(old)("a")  # words begin with their space, which a mask stands for as well
        taken = [spaced and vocabularies.stands_for_text(name) for name in names]
        new = [entry(self.vocab_size + i, name, lstrip=taken[i]) for i, name in enumerate(names)]
        content = written(with_added(old, new, "tokenizer"))
        return HFTokenizer(content, self._settings, self._side_files, "tokenizer")

    def encode_symbols(self, text: str) -> list[int]:
        """Ids of a text in which the names of special tokens are those tokens, as a rendered chat template has them."""
        return self.encode_spans(text, ())[0]

    def encode_spans(self, text: str, plain: Sequence[places.Span] | None = None) -> places.Spans:
        if plain is None:
            return self._plain_spans(text, self._backend)
        ids, spans = self._symbol_spans(text)
        marked = self._silent | self._marked.keys()
        named = (self._name_place(i, text, span) for i, span in zip(ids, spans, strict=True) if i in marked)
        if not any(places.touches(span, plain) for span in named):
            return ids, spans
        symbols = [symbol for gap in places.gaps(len(text), plain) for symbol in self._symbols_in(text, gap)]
        backends = (self._backend, self._backend_inside)
        return places.with_symbols(
            text, symbols, lambda start, stop: self._plain_spans(text[start:stop], backends[start > 0])
        )

    def _plain_spans(self, text: str, backend: Backend) -> places.Spans:
        """As ``encode``: names of special tokens are text."""
        ids, spans = self._located(text, backend)
        if self._silent.isdisjoint(ids):
            return ids, spans
        spelt = [self._spelt_at(i, span) for i, span in zip(ids, spans, strict=True)]
        return [i for part in spelt for i, _ in part], [span for part in spelt for _, span in part]

    def _spelt_at(self, index: int, span: places.Span) -> list[tuple[int, places.Span]]:
        if index not in self._silent:
            return [(index, span)]
        letters = self._spelling(index)
        where = places.letters_of(span, len(letters))
        return [(i, place) for part, place in zip(letters, where, strict=True) for i in part]

    def _symbol_spans(self, text: str) -> places.Spans:
        """Names of special tokens are those tokens, wherever they stand."""
        self._backend.encode_special_tokens = False
        try:
            return self._located(text, self._backend)
        finally:
            self._backend.encode_special_tokens = True

    def _located(self, text: str, backend: Backend) -> places.Spans:
        """``tokenizers`` loses its place where a table of SentencePiece's takes characters out of a text."""
        encoding = self._encoding(text, backend)
        ids: list[int] = encoding.ids
        if self._charsmap is None or (new := places.aligned(text, self._charsmap)) is None or new[0] == text:
            return ids, places.mended(text, encoding.tokens, encoding.offsets)
        again = self._encoding(new[0], backend)  # which the table leaves as it is
        source, owners = new if again.ids == ids else (text, None)
        chosen = encoding if owners is None else again
        spans = places.mended(source, chosen.tokens, chosen.offsets)
        return ids, spans if owners is None else places.moved_back(spans, owners, len(text))

    def _symbols_in(self, text: str, gap: places.Span) -> list[places.Symbol]:
        """Special tokens named in a part of ``text``, with the spaces around it that they take along."""
        first, last = gap
        found = []
        for index, (start, stop) in zip(*self._symbol_spans(text[first:last]), strict=True):
            token = self._marked.get(index)
            if token is None or (index == self.unk_id and token.content not in text[first + start : first + stop]):
                continue
            start, stop = first + start, first + stop
            while token.lstrip and start > 0 and text[start - 1].isspace():
                start -= 1
            while token.rstrip and stop < len(text) and text[stop].isspace():
                stop += 1
            found.append((start, stop, index))
        return found

    def _name_place(self, index: int, text: str, span: places.Span) -> places.Span:
        """Where in its span the name of a special token stands, without spaces around it."""
        name = str(self._backend.id_to_token(index))
        start = text.find(name, *span)
        if start < 0:
            return (span[0], span[0]) if index == self.unk_id else span  # characters that the vocabulary lacks
        return start, start + len(name)

    @cached_property
    def _marked(self) -> Mapping[int, AddedToken]:
        """The tokens that are found by their names in a text, by id."""
        return {index: token for index, token in self._backend.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def _charsmap(self) -> Callable[[str], str] | None:
        """The step that changes characters by such a table."""
        from tokenizers.normalizers import Precompiled

        table = vocabularies.charsmap(json.loads(self._content))
        return None if table is None else Precompiled(base64.b64decode(table)).normalize_str

    @cached_property
    def _backend_inside(self) -> Backend:
        """For a part of a text that is not its beginning."""
        content = places.inside(json.loads(self._backend.to_str()))
        return _backend(json.dumps(content), "tokenizer")

    def _encoding(self, text: str, backend: Backend) -> Any:
        try:
            return backend.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise DataError(_HALF_CHARACTER) from error

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        return chat_template.render(self, messages, add_generation_prompt=add_generation_prompt)

    def with_chat_template(self, source: str) -> HFTokenizer:
        """The same with ``source`` as its one chat template."""
        return HFTokenizer(self._content, self._settings, {TEMPLATE_FILE: source.encode()}, "tokenizer")

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Long batches of byte-level BPE by ``tiktoken`` where it gives the same ids."""
        pairs = self._byte_pairs if sum(map(len, texts)) >= _LONG_BATCH else None
        try:
            found = [None if pairs is None else pairs.encode(text) for text in texts]
            rest = [text for text, ids in zip(texts, found, strict=True) if ids is None]
            encodings = iter(self._backend.encode_batch_fast(rest, add_special_tokens=False))
        except (TypeError, UnicodeEncodeError) as error:
            raise DataError(_HALF_CHARACTER) from error
        return [self._spelt_out(next(encodings).ids) if ids is None else ids for ids in found]

    @cached_property
    def _byte_pairs(self) -> BytePairs | None:
        return byte_pairs(json.loads(self._content), self._backend, self._silent)

    def decode(self, ids: Sequence[int]) -> str:
        shown = [int(i) for i in ids if i not in self._silent and i != self.pad_id]
        text: str = self._backend.decode(shown, skip_special_tokens=True)
        return text

    def token_ids(self) -> TokenIds:
        return self._token_ids

    @cached_property
    def _token_ids(self) -> TokenIds:
        content = json.loads(self._content)
        pieces = {index: piece for piece, index in self._backend.get_vocab(with_added_tokens=True).items()}
        special = self._silent if self.unk_id is None else self._silent | {self.unk_id}
        if vocabularies.has_bert_rules(content):
            prefix = content["model"]["continuing_subword_prefix"]
            special |= set(vocabularies.unreachable(pieces, prefix, self._backend))
        begins_word = vocabularies.word_rule(content)
        vocabularies.warn_if_unknown(begins_word)
        return vocabularies.build_token_ids(
            pieces,
            begins_word,
            special,
            self._roles,
            vocab_size=self.vocab_size,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
        )

    @property
    def lossy(self) -> bool:
        """Whether text changes by design: case, accents, characters or spaces."""
        return vocabularies.is_lossy(json.loads(self._content))

    def _spell_out_symbols(self) -> frozenset[int]:
        """Ids of the special tokens; from here on the names of all of them are text when they stand in a text.

        Some files do not mark theirs as such. The unknown token is not among them, because text does have it.
        """
        from tokenizers import AddedToken

        added = self._backend.get_added_tokens_decoder()
        marked = [index for index, token in added.items() if token.special]
        named_ids = (self.bos_id, self.bos_token_id, self.eos_id, self.pad_id, *self._roles.ids)
        silent = frozenset(index for index in (*marked, *named_ids) if index is not None and index != self.unk_id)
        unmarked = [added[index].content for index in sorted(silent & added.keys() - set(marked))]
        self._backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in unmarked])
        return silent

    def _spelt_out(self, ids: list[int]) -> list[int]:
        """Without special ids, which some models make from their names, as Unigram does of any piece it has."""
        if self._silent.isdisjoint(ids):
            return ids
        spelt = {i: [part for letter in self._spelling(i) for part in letter] for i in self._silent.intersection(ids)}
        return [part for i in ids for part in spelt.get(i, (i,))]

    def _spelling(self, index: int) -> list[list[int]]:
        """The ids of the letters of a special token's name, letter by letter."""
        model = self._backend.model
        return [[piece.id for piece in model.tokenize(letter)] for letter in str(self._backend.id_to_token(index))]

    def save(self, folder: Path, *, kind: str | None = None, segments: bool = True) -> None:
        """``tokenizer.json`` as it was read, and a configuration under which ``transformers`` takes it as it is.

        A WordPiece vocabulary that llmkit trained is written for a model of ``kind``: without [SEP] for a decoder, and
        without segment ids where the model has none. (GPT-2's class there adds the embedding of any that it is given.)
        """
        folder.mkdir(parents=True, exist_ok=True)
        kept = {name: self._settings[name] for name in _KEPT_SETTINGS if name in self._settings}
        content = self._content
        if self._settings.get(FORMAT_KEY) == WORDPIECE:
            kept |= {FORMAT_KEY: WORDPIECE, "model_input_names": input_names(segments)}
            content = with_ends(content, kind or "encoder")
        (folder / TOKENIZER_FILE).write_text(content, encoding="utf-8", newline="")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # any other class builds rules of its own over the file's
            "clean_up_tokenization_spaces": False,
            **kept,
            **self._names,
        }
        text = json.dumps(config, ensure_ascii=False, indent=1) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        write_template_files(self._side_files, folder)


def _backend(content: str, where: str) -> Backend:
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError:
        raise missing_extra("tokenizers", "hf") from None
    try:
        backend = Backend.from_str(content)
    except Exception as error:  # the package raises nothing narrower
        raise DataError(f"no readable tokenizer.json: {str(error)[:200]}", where=where) from error
    backend.no_truncation()  # a length limit in the file would cut documents in silence
    backend.no_padding()
    if vocabularies.trims_spans(json.loads(content)):
        backend.post_processor = None  # nothing is put around a text here in any case
    backend.encode_special_tokens = True  # the names of special tokens in a text are text
    return backend


def _token(role: str, settings: dict[str, Any], vocabulary: dict[str, int]) -> str | None:
    """The token the settings name, else one that goes by a usual name."""
    given = [named(settings, key) for key in (role, _STAND_IN.get(role, role))]
    return next((name for name in (*given, *_KNOWN_NAMES[role]) if name in vocabulary), None)
