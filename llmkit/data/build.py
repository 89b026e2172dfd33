"""Builds one entry of the cache: scan the text, decide, train the tokenizer, write the token shards, report.

The decisions are taken here, in one process, from arrays in the order of the text; the other processes only read and
write. So the result does not depend on their number.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmkit.data import sources as settings_of_sources
from llmkit.data.cache import write_json, write_manifest
from llmkit.data.leaks import ValidationWindows
from llmkit.data.passes import (
    ChunkTokens,
    EncodeTask,
    ScanTask,
    changed,
    digest_of,
    documents_in,
    encode_chunk,
    scan_chunk,
)
from llmkit.data.progress import Meter
from llmkit.data.readers.base import Chunk, chunks_of, fingerprint
from llmkit.data.report import SourceReport, check_source, warnings_of
from llmkit.data.split import ValRule, belongs_to_val, choose_rule, n_shared, repeated, text_keys, wanted_bound
from llmkit.data.token_shards import Vocabulary
from llmkit.data.workers import Workers, n_cores
from llmkit.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmkit.data.sources import Source
    from llmkit.interfaces import Tokenizer, TokenizerSpec
    from llmkit.settings import DataConfig

_TRAIN_SAMPLE_BYTES = 64 << 20  # text for training a tokenizer that does not say how much it uses
_VAL_SAMPLE_BYTES = 1 << 20  # text on which the tokenizer's figures are measured

TokenizerReport = Callable[["Tokenizer", Iterable[str]], dict[str, Any]]


@dataclass(frozen=True)
class TokenizerMaker:
    """How this preparation comes by its tokenizer: given, opened or trained."""

    given: Tokenizer | None
    spec: TokenizerSpec | None
    load: Callable[[Path], Tokenizer]
    report: TokenizerReport

    def key(self) -> dict[str, Any]:
        """What decides its ids."""
        if self.given is not None:
            return {"fingerprint": self.given.fingerprint}
        assert self.spec is not None, "neither a tokenizer nor a way to make one"
        return self.spec.key()

    @property
    def sample_bytes(self) -> int:
        """About how much training text it asks for."""
        return 0 if self.spec is None else int(getattr(self.spec, "max_train_bytes", _TRAIN_SAMPLE_BYTES))

    def make(self, texts: Iterable[str], folder: Path) -> Tokenizer:
        """The tokenizer as it is read back from ``folder``."""
        tokenizer = self.spec.open() if self.spec is not None else self.given
        if tokenizer is not None:
            tokenizer.save(folder)
        elif self.spec is not None:
            self.spec.train(texts, folder)
        return self.load(folder)


@dataclass
class Piece:
    """A chunk, and where its documents stand in the array of all hashes."""

    chunk: Chunk
    source: int
    start: int = 0
    stop: int = 0
    n_texts: int = 0  # that begin here
    sample: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # places in the array
    goes_on: bool = False  # its first document is a later section of a text in the piece before
    ends_cut: bool = False  # its last document goes on in the next piece


class Build:
    """One preparation on its way from text to the shards, report and manifest in ``folder``."""

    def __init__(
        self, data: DataConfig, sources: list[Source], maker: TokenizerMaker, folder: Path, *, sentences: bool
    ) -> None:
        self.data, self.sources, self.maker, self.folder, self.sentences = data, sources, maker, folder, sentences
        self.work = folder / "work"
        chunk_bytes = settings_of_sources.CHUNK_BYTES
        self.pieces = [Piece(c, n) for n, source in enumerate(sources) for c in chunks_of(source.paths, chunk_bytes)]
        self.reports = [SourceReport(s.label, len(s.paths), s.n_ignored) for s in sources]
        self.has_val_path = sources[-1].is_val
        self.rule: ValRule = 0 if self.has_val_path else wanted_bound(data.val_fraction)
        self.whole_texts = sentences  # pairs of one text on both sides would be known by heart
        self.windows = ValidationWindows()
        self.keep: NDArray[np.bool_] | None = None
        self.keys: NDArray[np.uint64] = np.empty(0, np.uint64)  # what decides the side of each document, once known

    def run(self, *, show_progress: bool) -> None:
        """Fill the folder."""
        began = time.monotonic()
        self.work.mkdir()
        n_workers = max(1, min(self.data.n_workers or n_cores(), len(self.pieces)))
        with Workers(n_workers) as workers, Meter(show_progress) as meter:
            self._scan(workers, meter)
            self._decide(workers)
            tokenizer = self.maker.make(self._sample(is_val=False), self.folder / "tokenizer")
            tokens = self._encode(workers, meter, tokenizer)
            peak = workers.peak_memory_bytes()
        self._check_unchanged()
        report = self._report(tokens, n_special=1 if tokenizer.bos_id is None else 2)
        report["tokenizer"] = self._tokenizer_report(tokenizer)
        report["warnings"] = warnings_of(report)
        seconds = time.monotonic() - began
        n_bytes = sum(source.n_bytes for source in self.reports)
        report["speed"] = {
            "seconds": seconds,
            "megabytes_per_second": n_bytes / 1e6 / seconds,
            "n_workers": n_workers,
            "peak_memory_bytes": peak,
        }
        self._finish(tokenizer, report)

    # First pass

    def _scan(self, workers: Workers, meter: Meter) -> None:
        """Hashes of all documents into one file; counts into the reports."""
        meter.start("reading", len(self.pieces))
        paths: list[set[str]] = [set() for _ in self.sources]  # of files with documents
        n_documents = 0
        before, key = Piece(Chunk("", 0, 0, ""), 0), np.uint64(0)
        with (
            (self.work / "hashes").open("wb") as hashes,
            (self.work / "keys").open("wb") as keys,
            (self.work / "lengths").open("wb") as lengths,
        ):
            for piece, scan in zip(self.pieces, workers.map(scan_chunk, self._scan_tasks()), strict=True):
                piece.start, n_documents = n_documents, n_documents + scan.hashes.size
                piece.stop, piece.sample = n_documents, scan.sample + piece.start
                piece.goes_on = before.ends_cut and before.chunk.path == piece.chunk.path
                piece.ends_cut = bool(scan.cut[-1]) if scan.cut.size else piece.goes_on
                piece.n_texts = scan.hashes.size - int(scan.cut[:-1].sum()) - (piece.goes_on and scan.cut.size > 0)
                found = text_keys(scan.hashes, scan.cut, key if piece.goes_on else None)
                before, key = piece, found[-1] if found.size else key
                keys.write(found.tobytes())
                hashes.write(scan.hashes.tobytes())
                lengths.write(scan.lengths.tobytes())
                self.windows.merge(scan.windows)
                self.reports[piece.source].add(piece.chunk, scan)
                paths[piece.source] |= {piece.chunk.path} if scan.hashes.size else set()
                meter.advance(int(scan.lengths.sum()))
        for source, report, with_documents in zip(self.sources, self.reports, paths, strict=True):
            report.set_files_without_documents([name for name in source.paths if name not in with_documents])
            check_source(report, self.data, source.paths)
        self.hashes = np.memmap(self.work / "hashes", np.uint64, "r")
        self.keys = np.memmap(self.work / "keys", np.uint64, "r") if self.whole_texts else self.hashes
        self.lengths = np.memmap(self.work / "lengths", np.uint64, "r")

    def _scan_tasks(self) -> Iterator[ScanTask]:
        train_bytes = max(1, sum(source.n_bytes() for source in self.sources if not source.is_val))
        val_bytes = max(1.0, self.sources[-1].n_bytes() if self.has_val_path else train_bytes * self.data.val_fraction)
        for number, piece in enumerate(self.pieces):
            yield ScanTask(
                piece.chunk,
                self.data,
                self._rule_for(piece),
                self.whole_texts,
                self.keys[piece.start] if self.keys.size > piece.start and piece.goes_on else None,
                self.maker.sample_bytes / train_bytes,
                _VAL_SAMPLE_BYTES / val_bytes,
                self._sample_path(number),
            )

    def _sample_path(self, number: int) -> Path:
        return self.work / f"sample-{number}"

    def _is_val(self, piece: Piece) -> bool:
        return self.sources[piece.source].is_val

    # Decisions

    def _decide(self, workers: Workers) -> None:
        """Which documents are repeated, which are kept, and which are validation data."""
        n_train = max(piece.stop for piece in self.pieces if not self._is_val(piece))
        train = self.hashes[:n_train]
        again = repeated(train)
        for piece in self.pieces:
            n_again = int(again[piece.start : piece.stop].sum())
            self.reports[piece.source].n_repeated += n_again
            self.reports[piece.source].n_dropped += n_again if self.data.deduplicate else 0
        if self.data.deduplicate:
            self.keep = np.concatenate([~again, np.ones(self.hashes.size - n_train, bool)])
        if not self.has_val_path:
            self._split(workers, n_train)

    def _split(self, workers: Workers, n_train: int) -> None:
        """Settle the rule. Where the scan went by another, what depends on it is read again.

        A corpus that is a single text can only be split between its sections.
        """
        guess = (self.rule, self.whole_texts)
        if self.whole_texts and self.keys[:n_train].min() == self.keys[:n_train].max():
            self.whole_texts, self.keys = False, self.hashes
        n_texts = sum(piece.n_texts for piece in self.pieces if not self._is_val(piece)) if self.whole_texts else None
        rule = choose_rule(self.keys[:n_train], self.lengths[:n_train], self.data.val_fraction, n_texts)
        changed = not isinstance(rule, int) or (rule, self.whole_texts) != guess
        self.rule = rule
        if changed or any(self._misjudged(piece) for piece in self.pieces):
            self._scan_again(workers)

    def _misjudged(self, piece: Piece) -> bool:
        """Whether the scan, which did not know the text that a piece goes on with, put it on the wrong side."""
        first = slice(piece.start, min(piece.start + 1, piece.stop))
        is_val, guess = (belongs_to_val(hashes[first], self.rule).any() for hashes in (self.keys, self.hashes))
        return bool(self.whole_texts and piece.goes_on and is_val != guess)

    def _scan_again(self, workers: Workers) -> None:
        """Windows and sample of the pieces that hold validation documents."""
        self.windows = ValidationWindows()
        pairs = [(p, task) for p, task in zip(self.pieces, self._scan_tasks(), strict=True) if self._side(p).any()]
        scans = workers.map(scan_chunk, (task for _, task in pairs))
        for (piece, _), scan in zip(pairs, scans, strict=True):
            piece.sample = scan.sample + piece.start
            self.windows.merge(scan.windows)

    def _side(self, piece: Piece) -> NDArray[np.bool_]:
        """Which documents of a piece are validation data."""
        return belongs_to_val(self.keys[piece.start : piece.stop], self._rule_for(piece))

    def _rule_for(self, piece: Piece) -> ValRule:
        return None if self._is_val(piece) else self.rule

    def _sample(self, *, is_val: bool) -> Iterator[str]:
        """The sampled documents of one side, repeated ones left out where they are dropped."""
        for number, piece in enumerate(self.pieces):
            wanted = belongs_to_val(self.keys[piece.sample], self._rule_for(piece)) == is_val
            if self.keep is not None:
                wanted &= self.keep[piece.sample]
            for use, document in zip(wanted, documents_in(self._sample_path(number)), strict=True):
                if use:
                    yield document.text

    # Second pass

    def _encode(self, workers: Workers, meter: Meter, tokenizer: Tokenizer) -> list[ChunkTokens]:
        """The shards of every chunk."""
        meter.start("tokenising", len(self.pieces))
        vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
        table = self.windows.table()
        np.save(self.work / "windows.npy", table)
        self.seen = np.zeros(table.size, bool)
        tokens: list[ChunkTokens] = []
        for result in workers.map(encode_chunk, self._encode_tasks(vocabulary)):
            tokens.append(result)
            self.seen[result.windows_found] = True
            result.windows_found = result.windows_found[:0]  # a long list holds no long arrays
            meter.advance(sum(result.n_bytes.values()))
        return tokens

    def _encode_tasks(self, vocabulary: Vocabulary) -> Iterator[EncodeTask]:
        for number, piece in enumerate(self.pieces):
            here = slice(piece.start, piece.stop)
            yield EncodeTask(
                piece.chunk,
                self._sample_path(number) if piece.sample.size == piece.stop - piece.start else None,
                self.data,
                np.packbits(self._side(piece)).tobytes(),
                None if self.keep is None else np.packbits(self.keep[here]).tobytes(),
                digest_of(self.hashes[here]),
                self.maker.load,
                self.folder / "tokenizer",
                vocabulary,
                self.work / "windows.npy" if self.windows.n_documents else None,
                self.folder / f"train-{piece.source:02d}-{number:06d}.bin",
                self.folder / f"val-{number:06d}.bin",
                self.sentences,
                piece.goes_on,
            )

    # Results

    def _check_unchanged(self) -> None:
        """Raises DataError for a file that is not what it was at the start."""
        for source in self.sources:
            for path, mark in source.fingerprints.items():
                if fingerprint(path) != mark:
                    raise changed(path)

    def _report(self, tokens: list[ChunkTokens], n_special: int) -> dict[str, Any]:
        """Counts of what was read, written and leaked; ``n_special`` ids a document are none of its text."""
        for piece, result in zip(self.pieces, tokens, strict=True):
            self.reports[piece.source].n_tokens += sum(result.n_tokens.values())
        train, val = (_sums(tokens, split, sentences=self.sentences) for split in ("train", "val"))
        if train["n_tokens"] == train["n_documents"] * n_special:
            where = self.sources[0].paths[0]
            raise DataError("the tokenizer gave no ids for the training text", where=where, fix="use another tokenizer")
        return {
            "sources": [report.plain() for report in self.reports],
            "train": train,
            "val": val if val["n_documents"] else None,
            "leaks": self._leaks(),
        }

    def _leaks(self) -> dict[str, int]:
        """Validation documents that stand in the training text: as a whole, or nearly."""
        n_near, n_checked = self.windows.near_duplicates(self.seen)
        n_train = max(piece.stop for piece in self.pieces if not self._is_val(piece))
        n_exact = n_shared(self.hashes[n_train:], self.hashes[:n_train])
        if self.whole_texts and not self.has_val_path:  # a section may be one of another text as well
            kept = np.ones(n_train, bool) if self.keep is None else self.keep
            is_val = belongs_to_val(self.keys, self.rule)
            n_exact = n_shared(self.hashes[is_val & kept], self.hashes, kept & ~is_val)
        return {"n_exact": n_exact, "n_near": n_near, "n_checked": n_checked}

    def _tokenizer_report(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The tokenizer's figures on held-out text; on training text when nothing is held out."""
        has_val = self.windows.n_documents > 0
        texts = _up_to(self._sample(is_val=has_val), _VAL_SAMPLE_BYTES)
        measured_on = "validation" if has_val else "training"
        return {"vocab_size": tokenizer.vocab_size, "measured_on": measured_on, **self.maker.report(tokenizer, texts)}

    def _finish(self, tokenizer: Tokenizer, report: dict[str, Any]) -> None:
        """Report and manifest; nothing temporary stays."""
        del self.hashes, self.keys, self.lengths
        shutil.rmtree(self.work)
        write_json(self.folder / "report.json", report)
        n_sources = sum(not source.is_val for source in self.sources)
        names = [f"train-{number:02d}-*.bin" for number in range(n_sources)]
        write_manifest(
            self.folder,
            {
                "vocabulary": {
                    "vocab_size": tokenizer.vocab_size,
                    "bos_id": tokenizer.bos_id,
                    "eos_id": tokenizer.eos_id,
                },
                "train": [sorted(path.name for path in self.folder.glob(name)) for name in names],
                "val": sorted(path.name for path in self.folder.glob("val-*.bin")),
            },
        )


def _sums(tokens: list[ChunkTokens], split: str, *, sentences: bool) -> dict[str, int]:
    names = ("n_documents", "n_bytes", "n_tokens") + (("n_sentences",) if sentences else ())
    return {name: sum(getattr(result, name)[split] for result in tokens) for name in names}


def _up_to(texts: Iterable[str], n_bytes: int) -> Iterator[str]:
    for text in texts:
        yield text
        n_bytes -= len(text.encode())
        if n_bytes <= 0:
            return
