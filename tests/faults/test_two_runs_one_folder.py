"""One folder, one run: of many started together exactly one wins, and a dead holder holds nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from llmkit.engine.run_folder import LOCK, RunFolder
from llmkit.errors import ConfigError

N_RUNS = 20


def test_of_many_started_together_one_wins(tmp_path: Path) -> None:
    gate, start = os.pipe()
    hold, release = os.pipe()
    results, report = os.pipe()
    children = []
    for _ in range(N_RUNS):
        child = os.fork()
        if child == 0:
            os.close(start), os.close(release), os.close(results)
            os.read(gate, 1)
            os._exit(_contend(tmp_path, hold, report))
        children.append(child)
    os.close(gate), os.close(report), os.close(hold), os.close(start)
    messages = b""
    while messages.count(b"\n") < N_RUNS:
        messages += os.read(results, 65536)
    os.close(release)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(codes) == [0] + [2] * (N_RUNS - 1)
    rows = [json.loads(line) for line in messages.splitlines()]
    winner = children[codes.index(0)]
    losers = [row for row in rows if row["pid"] != winner]
    assert all(f"process {winner} on {socket.gethostname()}" in row["what"] for row in losers)
    assert max(row["seconds"] for row in losers) < 2


def _contend(root: Path, hold: int, report: int) -> int:
    started = time.monotonic()
    row = {"pid": os.getpid(), "what": "won", "seconds": 0.0}
    code = 0
    try:
        with RunFolder(root, "mine").lock():
            os.write(report, json.dumps(row).encode() + b"\n")
            os.read(hold, 1)  # until every other one has reported
    except ConfigError as error:
        code = error.exit_code
        row |= {"what": error.what, "seconds": time.monotonic() - started}
        os.write(report, json.dumps(row).encode() + b"\n")
    return code


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with RunFolder(tmp_path, "mine").lock():
            worker = os.fork()  # it outlives its parent, and must not keep the parent's lock
            os.write(tell, f"{worker or os.getpid()}\n".encode())
            signal.pause()
        os._exit(0)
    told = b""
    while told.count(b"\n") < 2:
        told += os.read(ready, 64)
    worker = next(int(line) for line in told.split() if int(line) != child)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        with caplog.at_level("INFO"), RunFolder(tmp_path, "mine").lock():
            assert f"left by process {child} on {socket.gethostname()}" in caplog.text
            holder = json.loads((tmp_path / "mine" / LOCK).read_text())
            assert holder["pid"] == os.getpid()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_lock_is_free_after_a_run_however_it_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path, "mine")
    with pytest.raises(KeyError), folder.lock():
        raise KeyError
    with caplog.at_level("INFO"), folder.lock():
        assert caplog.text == ""
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"), folder.lock():
            pass
        with pytest.raises(ConfigError), folder.lock():  # the failed try has not freed it
            pass
