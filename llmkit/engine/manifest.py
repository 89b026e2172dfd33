"""What a checkpoint folder holds, and the proof that it still does.

``manifest.json`` is written last. It lists every other file with its size and SHA-256, and carries a SHA-256 of itself,
so that a damaged manifest is told from one of a newer llmkit. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmkit.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
N_READERS, WORTH_THREADS_BYTES = 4, 50_000_000
OWN_HASH = "manifest_sha256"
LIBRARIES = ("torch", "numpy", "accelerate", "safetensors", "sentencepiece", "hydra-core", "omegaconf", "wandb")


class NewerFormatError(CheckpointError):
    """Written by a later llmkit. Never skipped in favour of an older checkpoint: that would throw work away."""


@dataclass(frozen=True)
class Manifest:
    """``files`` maps a relative path to ``{"bytes": size, "sha256": digest}``."""

    step: int
    best: bool
    facts: dict[str, Any]  # what the run says of itself: config hash, world size ...
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]
    format_version: int = FORMAT_VERSION

    @property
    def n_bytes(self) -> int:
        return sum(int(record["bytes"]) for record in self.files.values())

    def render(self) -> bytes:
        """The bytes of ``manifest.json``."""
        return _render(asdict(self))


def library_versions() -> dict[str, str]:
    """Versions of the installed packages that decide what a run computes."""
    from llmkit import __version__

    found = {"llmkit": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an environment without it is a fact like any other
            found[name] = "not installed"
    return found


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a plain configuration, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def record_of(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of one file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def records_of(paths: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """``record_of`` of each. Large files are hashed side by side: that runs outside the interpreter's lock."""
    if sum(path.stat().st_size for path in paths.values()) < WORTH_THREADS_BYTES:
        return {name: record_of(path) for name, path in paths.items()}
    with ThreadPoolExecutor(N_READERS) as pool:
        return dict(zip(paths, pool.map(record_of, paths.values()), strict=True))


def verify(folder: Path) -> Manifest:
    """The manifest of a checkpoint that is exactly as it was written.

    Errors: ``CheckpointError`` whose ``what`` is the reason in a few words; ``NewerFormatError``.
    """
    try:
        if folder.is_symlink():
            raise _damaged(folder, "is a link")
        manifest = _read(folder)
        _compare(folder, manifest)
    except OSError as error:
        raise _damaged(folder, f"{Path(error.filename or MANIFEST).name}: {error.strerror}") from error
    return manifest


def _read(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise _damaged(folder, f"{MANIFEST} is missing")
    if path.is_symlink():
        raise _damaged(folder, f"{MANIFEST} is a link")
    body = _parse(path.read_bytes())
    if body is None:
        raise _damaged(folder, f"{MANIFEST} does not match its own SHA-256")
    found = body.get("format_version")
    if isinstance(found, int) and found > FORMAT_VERSION:
        raise NewerFormatError(
            f"checkpoint format {found} is newer than this llmkit reads ({FORMAT_VERSION})",
            where=str(folder),
            fix="use the llmkit that wrote it, or a later one",
        )
    if body.keys() != {field.name for field in fields(Manifest)}:
        raise _damaged(folder, f"{MANIFEST} does not have the fields of format {FORMAT_VERSION}")
    return Manifest(**body)


def _parse(content: bytes) -> dict[str, Any] | None:
    """The manifest without its own hash; None when one byte is not as it was written."""
    try:
        body: dict[str, Any] = json.loads(content)
        body.pop(OWN_HASH)
        return body if _render(body) == content else None
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):  # not JSON, no object, no hash
        return None


def _compare(folder: Path, manifest: Manifest) -> None:
    """The cheap checks of all files come before the first hash."""
    if folder.name.startswith("step_") and folder.name != f"step_{manifest.step}":
        raise _damaged(folder, f"{MANIFEST} is of step {manifest.step}")
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not _is_folder(path)}
    del found[MANIFEST]
    for name in sorted(manifest.files.keys() - found.keys()):
        raise _damaged(folder, f"{name} is missing")
    for name in sorted(found.keys() - manifest.files.keys()):
        raise _damaged(folder, f"{name} is not listed in {MANIFEST}")
    for name, record in manifest.files.items():
        if found[name].is_symlink():
            raise _damaged(folder, f"{name} is a link")
        if (size := found[name].stat().st_size) != record["bytes"]:
            raise _damaged(folder, f"{name} has {size} bytes instead of {record['bytes']}")
    for name, record in records_of(found).items():
        if record != manifest.files[name]:
            raise _damaged(folder, f"{name} does not match its SHA-256")


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _render(body: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(_dump(body)).hexdigest()
    return _dump({**body, OWN_HASH: digest})


def _dump(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def _damaged(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(reason, where=str(folder), fix="restore the checkpoint from a copy, or take another one")
