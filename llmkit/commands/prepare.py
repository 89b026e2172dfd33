"""``llmkit prepare``: train the tokenizer and write the token shards once, and say what was found."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Any

from llmkit.config.build import build
from llmkit.data.datasets import needs_sentences
from llmkit.data.prepare import PreparedData, prepare
from llmkit.engine.init import resolve_init
from llmkit.engine.stop import leave_on_signal
from llmkit.tokenizers.grow import add_tokens
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.report import tokenizer_report

if TYPE_CHECKING:
    from rich.table import Table

    from llmkit.config.schema import PrepareConfig, PretrainConfig


def run(cfg: PrepareConfig | PretrainConfig, args: argparse.Namespace) -> int:
    """Prepare ``cfg.data`` and print the report; a cached entry is read through and checked byte by byte."""
    from rich.console import Console

    init = None if cfg.init is None else resolve_init(cfg.init)
    with leave_on_signal():
        prepared = prepare(
            cfg.data,
            None if init else build(cfg.tokenizer),
            tokenizer=None if init is None else add_tokens(load_tokenizer(init), cfg.add_tokens),
            load=load_tokenizer,
            report=tokenizer_report,
            sentences=needs_sentences(build(cfg.objective)),
            progress=True,
            verify=True,
        )
    console = Console(highlight=False)
    for table in (*map(source_table, prepared.report["sources"]), splits_table(prepared.report)):
        console.print(table)
    for line in closing_lines(prepared, args.overrides):
        console.print(line, soft_wrap=True, markup=False)
    sys.stdout.flush()
    return 0


def source_table(source: dict[str, Any]) -> Table:
    """What was read from one source: a row a count."""
    from rich.text import Text

    table = _table(("read", source["path"]))
    table.add_row("files", f"{source['n_files']:,} ({source['n_ignored_files']:,} others ignored)")
    table.add_row("documents", f"{source['n_documents']:,}")
    table.add_row("megabytes", f"{source['n_bytes'] / 1e6:,.2f}")
    table.add_row("tokens", f"{source['n_tokens']:,}")
    table.add_row("bad rows", ", ".join(f"{n:,} {reason}" for reason, n in source["bad_rows"].items()) or "0")
    table.add_row("repeated", f"{source['n_repeated']:,} documents, {source['n_dropped']:,} of them dropped")
    table.add_row("cut", f"{source['n_cut']:,} ends of sections inside a document")
    for example in source["bad_examples"]:
        table.add_row("bad row", Text(example))
    return table


def splits_table(report: dict[str, Any]) -> Table:
    """What was written: training and validation text."""
    table = _table(("written", "documents", "megabytes", "tokens"))
    for name, split in (("training", report["train"]), ("validation", report["val"])):
        counts = split or {"n_documents": 0, "n_bytes": 0, "n_tokens": 0}
        numbers = (f"{counts['n_documents']:,}", f"{counts['n_bytes'] / 1e6:,.2f}", f"{counts['n_tokens']:,}")
        table.add_row(name, *numbers)
    return table


def _table(names: tuple[str, ...]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in names:
        table.add_column(
            Text(name), overflow="fold", justify="right" if len(names) > 2 and name != names[0] else "left"
        )
    return table


def closing_lines(prepared: PreparedData, overrides: list[str]) -> list[str]:
    """Tokenizer, warnings, speed, place and the next command."""
    report, folder = prepared.report, prepared.folder
    tokenizer, leaks, speed = report["tokenizer"], report["leaks"], report["speed"]
    lines = [
        f"tokenizer   {tokenizer['vocab_size']:,} ids; on {tokenizer['measured_on']} text: "
        f"{tokenizer['bytes_per_token']:.2f} bytes a token, {tokenizer['tokens_per_word']:.2f} tokens a word, "
        f"{tokenizer['unknown_fraction']:.4%} unknown, {tokenizer['round_trip_failures']} round-trip failures",
        f"leaks       {leaks['n_exact']} validation documents stand in the training text, "
        f"{leaks['n_near']} of {leaks['n_checked']} nearly do",
        f"speed       {speed['megabytes_per_second']:.1f} MB/s with {speed['n_workers']} worker(s), "
        f"peak memory {speed['peak_memory_bytes'] / 2**20:.0f} MiB",
        f"cache       {folder} ({prepared.reason})",
    ]
    lines += [f"warning     {warning}" for warning in report["warnings"]]
    return [*lines, "", f"next: {shlex.join(['llmkit', 'pretrain', *overrides])}"]
