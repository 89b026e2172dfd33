"""Reads files of a model folder, which may come from anyone: nothing outside of it is opened, nothing huge is read."""

from __future__ import annotations

from pathlib import Path

from llmkit.errors import CheckpointError

MAX_BYTES = 50_000_000  # of a JSON file or a vocabulary; the index of a model with 60,000 tensors has 6 million


def inside(path: Path, folder: Path | None = None) -> Path:
    """``path``, if it is a plain file in ``folder``, or a link of a hub cache, ``snapshots/<revision>/<name>`` to
    ``blobs``. Null: in the folder that holds it. Raises ``CheckpointError`` for links to elsewhere and for devices,
    ``OSError`` for what is not there.
    """
    path.stat()  # raises for what is not there and for links in a circle
    folder, target = (folder or path.parent).resolve(), path.resolve()
    in_blobs = target.parent.name == "blobs"
    of_cache = folder.parent.name == "snapshots" and target.parent.parent == folder.parent.parent
    of_any_cache = target.parent.parent.name.startswith("models--")
    if not target.is_relative_to(folder) and not (in_blobs and (of_cache or of_any_cache)):
        raise CheckpointError(
            f"{path.name} is a link that leaves the folder",
            where=str(path),
            fix="copy the file into the folder if you trust it",
        )
    if not target.is_file():
        raise CheckpointError(f"{path.name} is not a plain file", where=str(path))
    return path


def followed(path: Path) -> Path:
    """A path that the user named himself: a link to a file elsewhere is that file, with the files beside it there. One
    of a hub cache stays, because the files beside it are links as well. All else is ``path``."""
    if not path.is_file():
        return path
    try:
        return inside(path)
    except CheckpointError:
        return path.resolve()


def read_bytes(path: Path, folder: Path | None = None, *, max_bytes: int = MAX_BYTES) -> bytes:
    """What a file of the folder holds, as ``inside``. Raises ``CheckpointError`` too for more than ``max_bytes``."""
    if inside(path, folder).stat().st_size > max_bytes:
        raise CheckpointError(f"{path.name} has more than {max_bytes} bytes", where=str(path))
    return path.read_bytes()


def read_text(path: Path) -> str:
    """As ``read_bytes``, of UTF-8 with any line ends. Raises ``UnicodeDecodeError`` for what is none."""
    return read_bytes(path).decode().replace("\r\n", "\n").replace("\r", "\n")
