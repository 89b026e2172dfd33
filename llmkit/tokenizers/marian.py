"""The tokenizer of published Marian models (``opus-mt``): a SentencePiece model for each side, one list of ids.

``source.spm`` cuts what is translated, ``target.spm`` the translation; ``vocab.json`` says which id a piece has. A text
may begin with a language code such as ``>>de<<``, which is one piece. Rules: ``MarianTokenizer`` of ``transformers``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import DataError
from llmkit.interfaces import TokenIds
from llmkit.safe_files import read_bytes
from llmkit.tokenizers import chat_template, spans, vocabulary
from llmkit.tokenizers.added_tokens import stated_tokens
from llmkit.tokenizers.bert_files import named
from llmkit.tokenizers.folder import MAP_FILE, MARIAN_FILE, read_json
from llmkit.tokenizers.hf_files import CONFIG_FILE, TEMPLATE_FILE, template_files, write_template_files
from llmkit.tokenizers.sentencepiece import opened

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

TARGET_FILE, VOCAB_FILE = "target.spm", "vocab.json"
_NAMES = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}  # where the files beside give no others
_KEPT_SETTINGS = ("source_lang", "target_lang", "model_max_length", "chat_template")
_MAX_IDS = 1 << 22
_CODE = re.compile(r">>.*?<<", re.DOTALL)


class MarianTokenizer:
    """Implements ``interfaces.Tokenizer`` for sources; ``encode_target`` is for what the model writes."""

    bos_id = bos_token_id = None

    def __init__(
        self,
        models: tuple[bytes, bytes],
        ids: Mapping[str, int],
        settings: Mapping[str, Any],
        side_files: Mapping[str, bytes],
        where: str = "tokenizer",
    ) -> None:
        """``models``: those of the source and the target. ``ids``: of their pieces. Raises ``DataError``."""
        self._models, self._ids, self._settings, self._side_files = models, dict(ids), settings, dict(side_files)
        self._source, self._target = (
            opened(model, f"{where}/{name}")[0] for model, name in zip(models, (MARIAN_FILE, TARGET_FILE), strict=True)
        )
        self.special_names = {role: named(settings, role) or usual for role, usual in _NAMES.items()}
        for name in self.special_names.values():
            if name not in ids:
                raise DataError(f"{name} is not in {VOCAB_FILE}", where=where, fix="copy the folder again")
        self.eos_id, self.unk_id, self.pad_id = (ids[self.special_names[role]] for role in _NAMES)
        self.vocab_size = max(ids.values()) + 1
        self._pieces = {index: piece for piece, index in ids.items()}
        self._known = {piece: index for piece, index in ids.items() if index not in (self.eos_id, self.pad_id)}
        content = [*models, json.dumps([sorted(ids.items()), self.special_names]).encode()]
        self.fingerprint = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in content)).hexdigest()

    @classmethod
    def load(cls, folder: Path) -> MarianTokenizer:
        """From the three files of a folder. Raises ``DataError`` for one that is missing or damaged and for a folder
        with a vocabulary for each side, ``CheckpointError`` as ``safe_files``."""
        settings = {**read_json(folder / MAP_FILE), **read_json(folder / CONFIG_FILE)}
        for name in (MARIAN_FILE, TARGET_FILE, VOCAB_FILE):
            if not (folder / name).is_file():
                what = f"a Marian tokenizer needs {MARIAN_FILE}, {TARGET_FILE} and {VOCAB_FILE}: {name} is missing"
                raise DataError(what, where=str(folder), fix="copy the folder again")
        if settings.get("separate_vocabs"):
            what = "this model has a vocabulary for each side, and llmkit reads Marian models with one for both"
            raise DataError(what, where=str(folder / CONFIG_FILE), fix="open it with transformers")
        models = read_bytes(folder / MARIAN_FILE), read_bytes(folder / TARGET_FILE)
        ids = _read_ids(folder / VOCAB_FILE)
        for token in stated_tokens(settings, read_json(folder / "added_tokens.json"), str(folder)):
            if ids.get(token["content"]) != token["id"]:
                what = f"the token {token['content']!r} was added, and a Marian vocabulary does not grow"
                raise DataError(what, where=str(folder), fix=f"give it the id {token['id']} in {VOCAB_FILE}")
        return cls(models, ids, settings, template_files(folder), str(folder))

    def encode(self, text: str) -> list[int]:
        return self._encoded(self._source, text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_target(self, text: str) -> list[int]:
        """Ids of ``text`` as the model writes it."""
        return self._encoded(self._target, text)

    def _encoded(self, processor: SentencePieceProcessor, text: str) -> list[int]:
        """A piece that the list of ids lacks is unknown. Raises ``DataError`` for a lone surrogate."""
        code, rest = _parted(text)
        pieces = processor.encode(_utf8(rest).decode(), out_type=str)
        return [self._known.get(piece, self.unk_id) for piece in [*code, *pieces]]

    def encode_spans(self, text: str, plain: Sequence[spans.Span] | None = None) -> spans.Spans:
        names = {name: self._ids[name] for name in self.special_names.values()}
        symbols = [] if plain is None else spans.named_symbols(text, plain, names)
        return spans.with_symbols(text, symbols, lambda start, stop: self._plain_spans(text[start:stop]))

    def _plain_spans(self, text: str) -> spans.Spans:
        from sentencepiece.sentencepiece_pb2 import SentencePieceText

        code, rest = _parted(text)
        start, data = len(text) - len(rest), _utf8(rest)
        pieces = SentencePieceText.FromString(self._source.encode(data, out_type="serialized_proto")).pieces
        names = [piece.piece for piece in pieces]
        _, offsets = self._source.Normalize(data, with_offsets=True)
        found = [(start + first, start + last) for first, last in spans.from_bytes(rest, names, offsets)]
        ids = [self._known.get(name, self.unk_id) for name in [*code, *names]]
        return ids, [(0, start)] * len(code) + found

    def decode(self, ids: Sequence[int]) -> str:
        """As the target's model joins pieces; special tokens and the unknown one are left out."""
        hidden = (self.eos_id, self.pad_id, self.unk_id)
        pieces = [self._pieces[int(i)] for i in ids if i in self._pieces and i not in hidden]
        text: str = self._target.decode_pieces(pieces)
        return text.replace(vocabulary.SPACE, " ").strip()

    @property
    def lossy(self) -> bool:
        """Spaces at the ends of a text go in any case."""
        return True

    @property
    def chat_template_files(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """(settings, files) in which a chat template may stand."""
        return dict(self._settings), self._side_files

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        return chat_template.render(self, messages, add_generation_prompt=add_generation_prompt)

    def with_chat_template(self, source: str) -> MarianTokenizer:
        """The same with ``source`` as its one chat template."""
        return MarianTokenizer(self._models, self._ids, self._settings, {TEMPLATE_FILE: source.encode()})

    def token_ids(self) -> TokenIds:
        return self._token_ids

    @cached_property
    def _token_ids(self) -> TokenIds:
        return vocabulary.build_token_ids(
            self._pieces,
            vocabulary.after_space(),
            {self.unk_id},
            vocabulary.find_roles(self._ids),
            vocab_size=self.vocab_size,
            bos_id=None,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
        )

    def save(self, folder: Path) -> None:
        """The three files, and a configuration under which ``transformers`` makes a ``MarianTokenizer`` of them."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, model in zip((MARIAN_FILE, TARGET_FILE), self._models, strict=True):
            (folder / name).write_bytes(model)
        kept = {name: self._settings[name] for name in _KEPT_SETTINGS if name in self._settings}
        fixed = {"tokenizer_class": "MarianTokenizer", "separate_vocabs": False, "clean_up_tokenization_spaces": False}
        _write(folder / VOCAB_FILE, self._ids)
        _write(folder / CONFIG_FILE, {**fixed, **kept, **self.special_names})
        write_template_files(self._side_files, folder)


def _parted(text: str) -> tuple[list[str], str]:
    """The language code that a text begins with, if it does, and the rest."""
    found = _CODE.match(text)
    return ([found[0]], text[found.end() :]) if found else ([], text)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError("a text holds half of a surrogate pair, which is no character") from error


def _read_ids(file: Path) -> dict[str, int]:
    content = read_json(file)
    ids = list(content.values())
    fit = all(type(index) is int and 0 <= index < _MAX_IDS for index in ids)
    if not content or not fit or len(set(ids)) < len(ids):
        what = f"it must give every piece an id of its own, a number from 0 to {_MAX_IDS - 1}"
        raise DataError(what, where=str(file), fix="copy the file again")
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
