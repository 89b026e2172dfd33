"""The file operations behind checkpoints and run folders: nothing else there writes, syncs, renames or deletes.

Every operation announces itself to ``fail_point`` before it acts. Tests put a hook there to kill the process, to refuse
the write or to record what would survive a power cut.
"""

from __future__ import annotations

import fcntl
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

OS_ERROR_IN_TEXT = re.compile(r"\(os error (\d+)\)")  # how safetensors' writer reports a full disk


def _go_on(operation: str, *paths: Path) -> None:
    """The hook of a run that is not under test."""


fail_point: Callable[..., None] = _go_on


def make_folder(path: Path) -> None:
    """Create ``path`` and its missing parents so that they outlive a power cut."""
    if path.is_dir():
        return
    make_folder(path.parent)
    fail_point("mkdir", path)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def write(path: Path, data: bytes) -> None:
    """Write a small file and sync it."""
    write_with(path, lambda place: _write_bytes(place, data))
    sync(path)


def write_with(path: Path, writer: Callable[[Path], object]) -> None:
    """Let ``writer`` fill the file or folder ``path``; the caller syncs it."""
    fail_point("write", path)
    writer(path)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: a reader sees the old content or the new, never a part. Links are not followed."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        write(temporary, data)
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    fail_point("sync", path)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if sys.platform == "darwin":
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # fsync there stops at the drive's own cache
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename within one folder; the caller syncs the folder."""
    fail_point("rename", source, target)
    source.rename(target)


def remove_tree(path: Path) -> None:
    """Delete a file, a link or a whole folder. What is already gone is fine; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        for entry in sorted(path.iterdir()):
            remove_tree(entry)
        fail_point("rmdir", path)
        path.rmdir()
    else:
        fail_point("unlink", path)
        path.unlink(missing_ok=True)


def errno_of(error: BaseException) -> int | None:
    """The operating system's error number behind ``error``, or None where the system refused nothing."""
    if isinstance(error, OSError):
        return error.errno
    found = OS_ERROR_IN_TEXT.search(str(error))
    return int(found[1]) if found else None


def size_text(n_bytes: float) -> str:
    """``n_bytes`` for a reader, in decimal units: ``3.2 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
