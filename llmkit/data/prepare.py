"""``prepare``: text in, token shards out, built once and found again as long as nothing that decides the tokens
changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.data import cache, sources
from llmkit.data.build import Build, TokenizerMaker, TokenizerReport
from llmkit.data.report import check_stored, summary_lines
from llmkit.data.sampler import check_weights
from llmkit.data.token_shards import TokenShards, Vocabulary
from llmkit.errors import DataError

if TYPE_CHECKING:
    from llmkit.interfaces import Tokenizer, TokenizerSpec
    from llmkit.settings import DataConfig

log = logging.getLogger("llmkit.data")


@dataclass(frozen=True)
class PreparedData:
    """An entry of the cache, open. ``train`` has one item a source; ``val`` is None when nothing is held out."""

    folder: Path
    tokenizer_folder: Path
    train: tuple[TokenShards, ...]
    val: TokenShards | None
    report: dict[str, Any]
    reused: bool
    reason: str


def prepare(
    data: DataConfig,
    spec: TokenizerSpec | None,
    *,
    tokenizer: Tokenizer | None,
    load: Callable[[Path], Tokenizer],
    report: TokenizerReport,
    progress: bool,
    sentences: bool = False,
    verify: bool = False,
) -> PreparedData:
    """Token shards of ``data.path``, from the cache or made now.

    ``tokenizer`` is used as it is; without one, ``spec`` opens or trains one. ``load`` and ``report`` belong to the
    tokenizers and must be importable by name, because other processes call ``load``. All ranks of a job may call this
    at once: one builds, the others wait. ``sentences`` also notes where sentences begin. ``verify`` reads every byte of
    a cached entry again. Raises DataError, ConfigError, CheckpointError.
    """
    check_weights(data.weights, len(sources.paths_of(data)))
    found = sources.find(data)
    maker = TokenizerMaker(tokenizer, spec, load, report)
    inputs = sources.inputs_of(data, found, maker.key(), sentences=sentences)
    identity = sources.identity_of(data)
    root, name = cache.cache_root(data.cache_dir), cache.entry_name(identity, inputs)
    prepared, damage = _reuse(root / name, verify=verify)
    if prepared is None:
        with cache.locked(root, name):
            prepared, damage = _reuse(root / name, verify=verify)
            if prepared is None:
                changes = damage or cache.why_built(root, name, identity, inputs)
                reason = f"rebuilt: {changes}" if changes else "built: these files were not prepared before"
                log.info("preparing %s (%s)", ", ".join(identity), reason)
                with cache.building(root, name) as folder:
                    cache.write_inputs(folder, identity, inputs)
                    Build(data, found, maker, folder, sentences=sentences).run(show_progress=progress)
                prepared = open_entry(root / name, reused=False, reason=reason)
    check_stored(prepared.report, data)
    log.info("prepared data %s: %s", prepared.folder.name, prepared.reason)
    for line in summary_lines(prepared.report):
        log.info("%s", line)
    return prepared


def _reuse(folder: Path, *, verify: bool) -> tuple[PreparedData | None, str]:
    """The entry when it is whole, else why it is not (empty when there is none)."""
    if not folder.exists():
        return None, ""
    try:
        return open_entry(folder, reused=True, reason="reused: inputs unchanged", verify=verify), ""
    except DataError as error:
        return None, error.what


def open_entry(folder: Path, *, reused: bool, reason: str, verify: bool = False) -> PreparedData:
    """Open an entry of the cache. Raises DataError when one of its files is not what was written."""
    manifest = cache.open_manifest(folder, verify=verify)
    vocabulary = Vocabulary(**{field.name: manifest["vocabulary"][field.name] for field in fields(Vocabulary)})
    val = [folder / name for name in manifest["val"]]
    return PreparedData(
        folder,
        folder / "tokenizer",
        tuple(TokenShards([folder / name for name in names], vocabulary) for names in manifest["train"]),
        TokenShards(val, vocabulary) if val else None,
        cache.read_json(folder / "report.json"),
        reused,
        reason,
    )
