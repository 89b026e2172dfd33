"""Megabytes a second from text to ids: llmkit beside the libraries of the same vocabularies.

    python -m tests.bench.tokenising --megabytes 8 --rounds 3

The text is the standard library's source and documentation in documents of about 4 kB; every vocabulary is trained on
all of it. llmkit encodes batches of a mebibyte as its preparation does: in this process, and in two worker processes,
which keep the ids to themselves as those of preparation do. The libraries use their own threads. All ways take turns;
best and median of the rounds. Ids are compared document by document where a library reads the same vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from llmkit.config.build import build
from llmkit.config.compose import compose
from llmkit.data.passes import BATCH_BYTES
from llmkit.data.workers import Workers
from llmkit.tokenizers.load import load_tokenizer
from tests.bench.corpus import embedded

DOCUMENT = 4000  # characters
VOCAB_SIZE = 8192
Way = Callable[[], Any]


def documents(megabytes: float) -> list[str]:
    found, left = [], int(megabytes * 1e6)
    for text in embedded("python_source", "python_docs"):
        found += [text[i : i + DOCUMENT] for i in range(0, len(text), DOCUMENT)]
        left -= len(text.encode())
        if left <= 0:
            break
    return found


def batched(texts: Sequence[str]) -> Iterator[list[str]]:
    size = BATCH_BYTES // DOCUMENT
    return (list(texts[i : i + size]) for i in range(0, len(texts), size))


_load = lru_cache(maxsize=1)(load_tokenizer)


def count_ids(texts: list[str], folder: Path) -> int:
    """What a worker does with a batch; the ids themselves are not sent back."""
    return sum(map(len, _load(folder).encode_batch(texts)))


def train(kind: str, texts: list[str], folder: Path) -> None:
    """Into ``folder``, as llmkit opens it."""
    if kind == "byte-level BPE":
        from tokenizers import ByteLevelBPETokenizer

        backend = ByteLevelBPETokenizer()
        end = ["<|endoftext|>"]
        backend.train_from_iterator(texts, vocab_size=VOCAB_SIZE, show_progress=False, special_tokens=end)
        folder.mkdir()
        backend.save(str(folder / "tokenizer.json"))
        return
    words = [f"tokenizer={kind.lower()}", f"tokenizer.vocab_size={VOCAB_SIZE}"]
    build(compose("prepare", ["data=python_docs", *words], None).plain["tokenizer"]).train(texts, folder)


def ways(kind: str, texts: list[str], folder: Path, workers: Workers) -> dict[str, Way]:
    ours = load_tokenizer(folder)
    found: dict[str, Way] = {
        "llmkit, 1 process": lambda: [ids for part in batched(texts) for ids in ours.encode_batch(part)],
        "llmkit, 2 processes": lambda: sum(workers.map(partial(count_ids, folder=folder), batched(texts))),
    }
    if kind in ("BPE", "Unigram"):
        from sentencepiece import SentencePieceProcessor

        library = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        for n in (1, 2):
            found[f"sentencepiece, {n} threads"] = partial(library.encode, texts, num_threads=n)
        return found
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.encode_special_tokens = True
    encode = partial(backend.encode_batch_fast, texts, add_special_tokens=False)
    for n in (1, 2):
        found[f"tokenizers, {n} threads"] = partial(_in_threads, encode, n)
    if kind == "byte-level BPE":
        from llmkit.tokenizers.byte_pairs import byte_pairs

        pairs = byte_pairs(json.loads((folder / "tokenizer.json").read_text()), backend, ())
        assert pairs is not None, "tiktoken cannot run this vocabulary"
        for n in (1, 2):
            found[f"tiktoken, {n} threads"] = partial(pairs._encoding.encode_ordinary_batch, texts, num_threads=n)
    return found


def _in_threads(encode: Callable[[], list[Any]], n: int) -> list[list[int]]:
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if n > 1 else "false"
    return [encoding.ids for encoding in encode()]


def compare(kind: str, texts: list[str], root: Path, rounds: int) -> None:
    folder = root / kind.replace(" ", "_")
    started = time.perf_counter()
    train(kind, texts, folder)
    n_bytes = sum(len(text.encode()) for text in texts)
    print(json.dumps({"vocabulary": kind, "train_mb_s": round(n_bytes / 1e6 / (time.perf_counter() - started), 2)}))
    with Workers(2) as workers:
        found = ways(kind, texts, folder, workers)
        known = found["llmkit, 1 process"]()
        seconds: dict[str, list[float]] = {name: [] for name in found}
        for turn in range(rounds + 1):
            for name, way in found.items():
                started = time.perf_counter()
                ids = way()
                if turn:
                    seconds[name].append(time.perf_counter() - started)
                elif isinstance(ids, int):
                    assert ids == sum(map(len, known)), name
                else:
                    unlike = sum(a != b for a, b in zip(ids, known, strict=True))
                    print(json.dumps({"vocabulary": kind, "way": name, "documents_unlike": unlike}), flush=True)
    for name, found_seconds in seconds.items():
        best, median = (round(n_bytes / 1e6 / s, 2) for s in (min(found_seconds), statistics.median(found_seconds)))
        print(json.dumps({"vocabulary": kind, "way": name, "mb_s_best": best, "mb_s_median": median}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["BPE", "Unigram", "WordPiece", "byte-level BPE"]
    parser.add_argument("kinds", nargs="*", default=kinds, help=f"of {kinds}")
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    texts = documents(args.megabytes)
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds:
            compare(kind, texts, Path(folder), args.rounds)


if __name__ == "__main__":
    main()
