"""``metrics.jsonl``: the record of a run that everything else mirrors. One JSON object a line, the newest last."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.errors import CheckpointError, DataError

# JSON has no such numbers; as strings they survive every reader.
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsFile:
    """Appends rows to ``path``, each with one write to the file descriptor, so that a kill can tear the last line only.

    Opening drops a torn last line. Errors: ``CheckpointError`` when the disk refuses a row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.truncate(self.offset())

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row. Floats are written so that they read back bit for bit."""
        data = memoryview(encode_row(row))
        start = self.offset()
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            self.truncate(start)  # half a row would spoil the next one
            raise CheckpointError(
                f"cannot write the metrics: {error.strerror}",
                where=str(self.path),
                fix="free disk space and start the same command again",
            ) from error

    def offset(self) -> int:
        """Size in bytes; a checkpoint stores it, and a resumed run cuts the file back to it."""
        return os.fstat(self._fd).st_size

    def truncate(self, offset: int) -> None:
        """Forget what lies after ``offset``, and the unfinished line before it if there is one."""
        end = min(offset, self.offset())
        while end > 0:
            start = max(0, end - 4096)
            newline = os.pread(self._fd, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        os.ftruncate(self._fd, end)
        os.lseek(self._fd, end, os.SEEK_SET)

    def sync(self) -> None:
        """Return when the rows are on the disk: called before a checkpoint that stores ``offset`` is published."""
        os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def encode_row(row: Mapping[str, Any]) -> bytes:
    """One line of valid JSON with its newline; NaN and infinities become the strings that ``read_metrics`` knows."""
    plain = {name: _plain(value) for name, value in row.items()}
    return (json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n").encode()


def decode_row(line: bytes | str) -> dict[str, Any]:
    """The row of one line. Errors: ``ValueError``."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return {name: _NONFINITE.get(value, value) if isinstance(value, str) else value for name, value in row.items()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows; a torn last line is left out. Errors: ``DataError`` for a broken line before the last."""
    lines = path.read_bytes().split(b"\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(decode_row(line))
        except ValueError as error:
            raise DataError(f"not a row of metrics: {error}", where=f"{path}:{number}") from error
    return rows


def _plain(value: Any) -> Any:
    """A JSON value: numbers of numpy and torch become Python's."""
    if isinstance(value, str | bool | int | None):
        return value
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, float) and not math.isfinite(number):
        return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    return number
