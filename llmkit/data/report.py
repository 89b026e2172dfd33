"""What a preparation found: counts for the user, and the limits that turn a count into an error."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from llmkit.data.passes import N_EXAMPLES, ChunkScan
from llmkit.data.readers.base import Chunk, absolute_line, fields_found
from llmkit.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmkit.settings import DataConfig


@dataclass
class SourceReport:
    """Counts of one item of ``data.path`` (or of all of ``data.val_path``)."""

    path: str
    n_files: int
    n_ignored_files: int
    n_documents: int = 0  # that can be read, repeated ones included
    n_bytes: int = 0  # of their text
    n_tokens: int = 0  # written, after dropping repeated documents
    n_cut: int = 0  # ends of sections that are no end of a document
    n_repeated: int = 0  # documents that an earlier one equals
    n_dropped: int = 0  # of these, left out (data.deduplicate)
    bad_rows: Counter[str] = field(default_factory=Counter)
    bad_examples: list[str] = field(default_factory=list)  # file:line: reason
    n_files_without_documents: int = 0
    files_without_documents: list[str] = field(default_factory=list)  # the first of them

    def add(self, chunk: Chunk, scan: ChunkScan) -> None:
        """Count one chunk."""
        self.n_documents += scan.hashes.size
        self.n_bytes += int(scan.lengths.sum())
        self.n_cut += scan.n_cut
        self.bad_rows.update(scan.bad)
        for row in scan.bad_examples[: N_EXAMPLES - len(self.bad_examples)]:
            self.bad_examples.append(f"{chunk.path}:{absolute_line(chunk, row.line)}: {row.reason}")

    def set_files_without_documents(self, files: list[str]) -> None:
        self.n_files_without_documents = len(files)
        self.files_without_documents = files[:N_EXAMPLES]

    @property
    def n_bad(self) -> int:
        return sum(self.bad_rows.values())

    @property
    def bad_fraction(self) -> float:
        return self.n_bad / max(1, self.n_bad + self.n_documents)

    def plain(self) -> dict[str, Any]:
        return asdict(self) | {"bad_rows": dict(self.bad_rows)}


def check_source(source: SourceReport, data: DataConfig, files: list[str]) -> None:
    """Raise DataError for a source without documents, or with more bad rows than ``data.max_bad_fraction``."""
    if not source.n_documents:
        reasons = [f"no document in {source.path}", *_bad_lines(source)]
        raise DataError("\n".join(reasons), where=files[0], fix=_advice(source, data, files))
    check_bad_rows(source, data)


def check_bad_rows(source: SourceReport, data: DataConfig) -> None:
    """Raise DataError when too many rows cannot be used."""
    if source.bad_fraction <= data.max_bad_fraction:
        return
    n_rows = source.n_bad + source.n_documents
    what = f"{source.n_bad} of {n_rows} rows of {source.path} cannot be used ({source.bad_fraction:.2%})"
    raise DataError(
        "\n".join([what, *_bad_lines(source)]),
        where="data.path",
        fix=f"mend the file, or allow it: data.max_bad_fraction={_round_up(source.bad_fraction)}",
    )


def check_stored(report: dict[str, Any], data: DataConfig) -> None:
    """The limits of ``data`` on a report that may have been made under other limits."""
    for plain in report["sources"]:
        check_bad_rows(SourceReport(**plain | {"bad_rows": Counter(plain["bad_rows"])}), data)


def _round_up(fraction: float) -> str:
    """Three decimals, not below ``fraction``."""
    return f"{-(-fraction * 1000 // 1) / 1000:.3f}"


def _bad_lines(source: SourceReport) -> list[str]:
    counts = [f"  {n} {reason}" for reason, n in source.bad_rows.most_common()]
    return [*counts, *(f"  {example}" for example in source.bad_examples)]


def _advice(source: SourceReport, data: DataConfig, files: list[str]) -> str:
    if source.bad_rows["missing field"]:
        found = fields_found(files[0], data)
        return f"set data.text_field to one of {', '.join(found)} (now {data.text_field})"
    return "give files that hold text"


def warnings_of(report: dict[str, Any]) -> list[str]:
    """What the user should know before training."""
    return list(_warnings(report))


def _warnings(report: dict[str, Any]) -> Iterator[str]:
    for source in report["sources"]:
        bad = ", ".join(f"{n} {reason}" for reason, n in source["bad_rows"].items())
        if bad:
            yield f"{source['path']}: bad rows left out: {bad}; first: {source['bad_examples'][0]}"
        if source["n_repeated"] > source["n_dropped"]:
            yield f"{source['path']}: {source['n_repeated']} repeated documents kept (data.deduplicate=true drops them)"
        if source["files_without_documents"]:
            names = ", ".join(source["files_without_documents"])
            yield f"{source['path']}: {source['n_files_without_documents']} files without a document: {names}"
    leaks = report["leaks"]
    if leaks["n_exact"] or leaks["n_near"]:
        yield (
            f"validation text stands in the training text: {leaks['n_exact']} documents exactly, "
            f"{leaks['n_near']} nearly (of {leaks['n_checked']} long enough to tell)"
        )


def summary_lines(report: dict[str, Any]) -> list[str]:
    """The report in a few lines of text."""
    train, val = report["train"], report["val"]
    lines = [f"training text: {_split_line(train)}"]
    lines.append(f"validation text: {_split_line(val) if val else 'none'}")
    tokenizer = report["tokenizer"]
    lines.append(f"tokenizer: {tokenizer['vocab_size']} ids, {tokenizer['bytes_per_token']:.2f} bytes a token")
    return lines + [f"warning: {warning}" for warning in report["warnings"]]


def _split_line(split: dict[str, int]) -> str:
    line = f"{split['n_documents']:,} documents, {split['n_bytes'] / 1e6:,.1f} MB, {split['n_tokens']:,} tokens"
    return line + (f", {split['n_sentences']:,} sentences" if "n_sentences" in split else "")
