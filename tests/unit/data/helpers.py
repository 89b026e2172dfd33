"""A tokenizer small enough to reason about, and settings for data tests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.data.prepare import PreparedData, prepare
from llmkit.settings import DataConfig


@dataclass(frozen=True)
class ByteTokenizer:
    """An id per byte, after ``<s>`` and ``</s>``."""

    vocab_size: int = 258
    bos_id: int | None = 0
    eos_id: int = 1
    pad_id: int = 1

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.vocab_size}{self.bos_id}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return [byte + 2 for byte in text.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - 2 for i in ids if i > 1).decode()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bytes.json").write_text(json.dumps([self.vocab_size, self.bos_id]))


@dataclass(frozen=True)
class ByteSpec:
    """Trains a ``ByteTokenizer`` and keeps the texts it saw in ``seen`` of the folder."""

    vocab_size: int = 258
    max_train_bytes: int = 1 << 20

    def open(self) -> None:
        return None

    def key(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size}

    def train(self, texts: Iterable[str], folder: Path) -> ByteTokenizer:
        tokenizer = ByteTokenizer(self.vocab_size)
        tokenizer.save(folder)
        (folder / "seen.json").write_text(json.dumps(list(texts)))
        return tokenizer


def load(folder: Path) -> ByteTokenizer:
    return ByteTokenizer(*json.loads((folder / "bytes.json").read_text()))


def figures(tokenizer: ByteTokenizer, texts: Iterable[str]) -> dict[str, Any]:
    """Stands in for the tokenizer report: how many texts it was given, and their bytes a token."""
    return {"n_documents": sum(1 for _ in texts), "bytes_per_token": 1.0}


def config(path: str | Path | list[str], cache: Path, **changes: Any) -> DataConfig:
    settings: dict[str, Any] = {
        "path": path if isinstance(path, list) else str(path),
        "weights": None,
        "val_path": None,
        "val_fraction": 0.0,
        "old_val_path": None,
        "text_field": "text",
        "max_document_bytes": 1 << 20,
        "max_line_bytes": 1 << 20,
        "max_bad_fraction": 0.0,
        "deduplicate": False,
        "seq_len": 16,
        "n_workers": 1,
        "cache_dir": str(cache),
    }
    return DataConfig(**settings | changes)


def run(data: DataConfig, spec: ByteSpec | None = None, **changes: Any) -> PreparedData:
    options: dict[str, Any] = {"tokenizer": None, "load": load, "report": figures, "progress": False}
    options |= changes
    return prepare(data, None if options["tokenizer"] else spec or ByteSpec(), **options)


def write_jsonl(path: Path, texts: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(shards: Any) -> list[str]:
    """The documents in token shards, decoded; checks the ``[bos] ids eos`` form."""
    ids = shards.window(0, shards.n_tokens).tolist()
    out, start = [], 0
    for place, token in enumerate(ids):
        if token == shards.eos_id:
            body = ids[start:place]
            if shards.bos_id is not None:
                assert body[0] == shards.bos_id
            out.append(ByteTokenizer().decode(body))
            start = place + 1
    assert start == len(ids), "the last document has no end"
    return out
