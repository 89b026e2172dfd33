"""The cache of prepared data: one folder an entry, named by what decides its tokens.

    <cache>/<name>-<key>/  inputs.json report.json tokenizer/ train-00-000000.bin ... val-000000.bin ... manifest.json
    <cache>/.locks/<name>-<key>
    <cache>/.tmp-<name>-<key>-*  an entry being built, or left behind by a process that was killed

An entry is built in a temporary folder under a lock and published by one rename, so it is whole or not there. The
manifest lists size, modification time and SHA-256 of every file. Opening an entry checks every size, and the SHA-256
of each file whose modification time is not the one written down; ``verify`` checks them all.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmkit.data.readers.base import BUILTIN_PREFIX
from llmkit.errors import CheckpointError, DataError

log = logging.getLogger("llmkit.data")

FORMAT = 1
_N_CHANGES = 3
_MANIFEST, _INPUTS, _SEAL = "manifest.json", "inputs.json", "manifest_sha256"


def cache_root(cache_dir: str | None) -> Path:
    """``data.cache_dir``, else ``$LLMKIT_CACHE``, else ``$XDG_CACHE_HOME/llmkit``, else ``~/.cache/llmkit``."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    if own := os.environ.get("LLMKIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llmkit"


def entry_name(paths: list[str], inputs: Mapping[str, Any]) -> str:
    """A readable name and 12 hex digits of the SHA-256 of ``inputs``."""
    stem = Path(paths[0].rstrip("/").rpartition(":")[2]).name.partition(".")[0]
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:40].strip("_") or "data"
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]
    return f"{name}-{key}"


@contextmanager
def locked(root: Path, name: str) -> Iterator[None]:
    """Holds the lock of one entry, waiting while another process does. It ends with the process, however that ends."""
    try:
        (root / ".locks").mkdir(parents=True, exist_ok=True)
        file = (root / ".locks" / name).open("w")
    except OSError as error:
        raise cannot_write(root, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that prepares the same data")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def building(root: Path, name: str) -> Iterator[Path]:
    """A temporary folder that becomes the entry ``name`` when the block ends well. The caller holds the lock."""
    try:
        _remove_stale(root, name)
        folder = Path(tempfile.mkdtemp(prefix=f".tmp-{name}-", dir=root))
        folder.chmod(0o777 & ~_umask())
        try:
            yield folder
            _publish(folder, root / name)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        raise cannot_write(root, error) from error


def _umask() -> int:
    """The process's mask; there is no way to read it but to set it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _remove_stale(root: Path, name: str) -> None:
    """Deletes what killed processes left: of this entry, whose lock we hold, and of entries that nobody holds."""
    for folder in root.glob(".tmp-*"):
        entry = folder.name.removeprefix(".tmp-").rpartition("-")[0]
        if entry == name:
            shutil.rmtree(folder, ignore_errors=True)
            continue
        with (root / ".locks" / entry).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, target: Path) -> None:
    """Syncs every file, then makes the folder the entry by one rename; a damaged entry is moved away first."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".tmp-{target.name}-", dir=target.parent))
        target.rename(old / "damaged")
        folder.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Raises DataError for a file that is missing or no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path.name} of prepared data cannot be read: {error}", where=str(path)) from error


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """List every file of an entry, last of all."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST)
    rows = {str(path.relative_to(folder)): _file_facts(path) for path in files}
    write_json(folder / _MANIFEST, sealed({"format": FORMAT, **facts, "files": rows}))


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a SHA-256 of itself."""
    return manifest | {_SEAL: hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()}


def _file_facts(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_manifest(folder: Path, *, verify: bool) -> dict[str, Any]:
    """The manifest of an entry whose files all fit it. Raises DataError naming the first that does not."""
    manifest = read_json(folder / _MANIFEST)
    if not isinstance(manifest, dict) or manifest != sealed({k: v for k, v in manifest.items() if k != _SEAL}):
        raise DataError(f"{_MANIFEST} is damaged", where=str(folder))
    if manifest["format"] != FORMAT:
        raise DataError(f"prepared data is in format {manifest['format']}, not {FORMAT}", where=str(folder))
    for name, facts in manifest["files"].items():
        try:
            _check_file(folder / name, facts, verify=verify)
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror}", where=str(folder / name)) from error
    return manifest


def _check_file(path: Path, facts: Mapping[str, Any], *, verify: bool) -> None:
    stat = path.stat()
    if stat.st_size != facts["size"]:
        raise DataError(f"{path.name} has {stat.st_size} bytes instead of {facts['size']}", where=str(path))
    if (verify or stat.st_mtime_ns != facts["mtime_ns"]) and _sha256(path) != facts["sha256"]:
        raise DataError(f"the content of {path.name} is damaged", where=str(path))


def write_inputs(folder: Path, paths: list[str], inputs: Mapping[str, Any]) -> None:
    """Keep what an entry was made from: ``why_built`` compares it with the next."""
    write_json(folder / _INPUTS, {"paths": paths, "inputs": inputs})


def why_built(root: Path, name: str, paths: list[str], inputs: Mapping[str, Any]) -> str:
    """What differs from the newest entry made from the same paths; empty when there is none."""
    before = _newest_inputs(root, name, paths)
    if before is None:
        return ""
    old, new = _flat(before), _flat(inputs)
    changes = [_change(key, old, new) for key in {**old, **new} if old.get(key) != new.get(key)]
    more = [f"and {len(changes) - _N_CHANGES} more"] if len(changes) > _N_CHANGES else []
    return ", ".join(changes[:_N_CHANGES] + more)


def _newest_inputs(root: Path, name: str, paths: list[str]) -> dict[str, Any] | None:
    found: list[tuple[int, dict[str, Any]]] = []
    for path in root.glob(f"{name.rpartition('-')[0]}-*/{_INPUTS}"):
        try:
            stored = read_json(path)
            if stored.get("paths") == paths:
                found.append((path.stat().st_mtime_ns, stored["inputs"]))
        except (DataError, OSError, AttributeError, KeyError) as error:
            log.debug("ignored for the comparison: %s: %s", path, error)
    return max(found, key=lambda one: one[0])[1] if found else None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flat(inner, f"{prefix}\n{key}" if prefix else str(key)))
    return flat


def _change(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    section, *path = key.split("\n")
    if section == "files":
        unread = (
            "is not named this time" if path[-1].startswith(BUILTIN_PREFIX) or Path(path[-1]).exists() else "is gone"
        )
        return f"{path[-1]} {'is new' if key not in old else unread if key not in new else 'changed'}"
    return f"{'.'.join([section, *path])} {old.get(key)} -> {new.get(key)}"


def cannot_write(root: Path, error: OSError) -> CheckpointError:
    """The error for a cache folder that refused a write."""
    what = f"prepared data cannot be written: {error.strerror or error}"
    if error.errno == errno.ENOSPC:
        what += f" ({shutil.disk_usage(root).free / 2**20:.0f} MiB free)"
    return CheckpointError(what, where=str(root), fix="set data.cache_dir (or $LLMKIT_CACHE) to a folder with room")
