"""Tokenizers that others made, read from ``tokenizer.json`` by the ``tokenizers`` package (extra ``hf``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import ConfigError, DataError, missing_extra
from llmkit.tokenizers.hf_files import CONFIG_FILE, TOKENIZER_FILE

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# Where no file names the end of a text, a token of one of these names is it.
_KNOWN_NAMES = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>"),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "pad_token": ("<pad>", "[PAD]", "<|pad|>"),
    "unk_token": ("<unk>", "[UNK]"),
}
_KEPT_SETTINGS = (
    "model_max_length",
    "chat_template",
    "padding_side",
    "extra_special_tokens",
    "additional_special_tokens",
)
_SIDE_FILES = ("chat_template.jinja",)


@dataclass(frozen=True)
class HFTokenizerSpec:
    """Opens the ``tokenizer.json`` at ``path`` (the file, or its folder)."""

    path: str | None

    def problems(self) -> list[tuple[str, str]]:
        return [] if self.path else [("path", "give the tokenizer.json or its folder")]

    def open(self) -> HFTokenizer:
        if not self.path:
            raise ConfigError("tokenizer=hf_json needs a path", where="tokenizer.path", fix="give a tokenizer.json")
        return HFTokenizer.load(Path(self.path).expanduser())

    def train(self, texts: Iterable[str], folder: Path) -> HFTokenizer:
        """A ``tokenizer.json`` is never trained here."""
        fix = "use tokenizer=bpe or tokenizer=unigram to train one"
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
        self.bos_id: int | None = ids.get("bos_token")
        self.unk_id: int | None = ids.get("unk_token")
        self.pad_id: int = ids.get("pad_token", self.eos_id)
        decided_by = f"{content}{self.bos_id}:{self.eos_id}:{self.pad_id}"
        self.fingerprint = hashlib.sha256(decided_by.encode()).hexdigest()

    @classmethod
    def load(cls, path: Path) -> HFTokenizer:
        """From ``tokenizer.json`` or its folder; special tokens from the files beside it."""
        file = path / TOKENIZER_FILE if path.is_dir() else path
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            what = f"the tokenizer cannot be read: {error}"
            raise ConfigError(what, where=str(file), fix="give a tokenizer.json or its folder") from error
        settings = {**_json(file.with_name("special_tokens_map.json")), **_json(file.with_name(CONFIG_FILE))}
        beside = (file.with_name(name) for name in _SIDE_FILES)
        side_files = {side.name: side.read_bytes() for side in beside if side.is_file()}
        return cls(content, settings, side_files, str(file))

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise DataError("a text holds half of a surrogate pair, which is no character") from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        silent = {self.bos_id, self.eos_id, self.pad_id}  # some files do not mark their special tokens as such
        text: str = self._backend.decode([int(i) for i in ids if i not in silent], skip_special_tokens=True)
        return text

    def save(self, folder: Path) -> None:
        """``tokenizer.json`` as it was read, and a configuration under which ``transformers`` takes it as it is."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER_FILE).write_text(self._content, encoding="utf-8", newline="")
        kept = {name: self._settings[name] for name in _KEPT_SETTINGS if name in self._settings}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # any other class builds rules of its own over the file's
            "clean_up_tokenization_spaces": False,
            **kept,
            **self._names,
        }
        text = json.dumps(config, ensure_ascii=False, indent=1) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        for name, data in self._side_files.items():
            (folder / name).write_bytes(data)


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
    backend.encode_special_tokens = True  # the names of special tokens in a text are text
    return backend


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"no readable JSON: {error}", where=str(path)) from error
    return content if isinstance(content, dict) else {}


def _token(role: str, settings: dict[str, Any], vocabulary: dict[str, int]) -> str | None:
    """The token the settings name, else one that goes by a usual name."""
    named = settings.get(role)
    name = named.get("content") if isinstance(named, dict) else named
    candidates = (name, *_KNOWN_NAMES[role]) if isinstance(name, str) else _KNOWN_NAMES[role]
    return next((candidate for candidate in candidates if candidate in vocabulary), None)
