"""Processes: in order, bounded, gone when the parent stops or dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmkit.data.workers import Workers, n_cores, peak_memory_bytes
from llmkit.errors import DataError, MemoryBudgetError
from tests.unit.data.helpers import write_jsonl


def square(n: int) -> int:
    return n * n


def fail_at_three(n: int) -> int:
    if n == 3:
        raise DataError("three", where="file:3", fix="count again")
    return n


def die(n: int) -> int:
    os._exit(9)


def process(n: int) -> int:
    time.sleep(0.05)  # so that both processes get tasks
    return os.getpid()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: set[int]) -> None:
    end = time.monotonic() + 20
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not [pid for pid in pids if is_alive(pid)]


def test_one_process_is_this_one() -> None:
    with Workers(1) as workers:
        assert set(workers.map(process, range(2))) == {os.getpid()}
        assert workers.peak_memory_bytes() >= peak_memory_bytes() > 2**20
    assert n_cores() >= 1


def test_results_come_in_order_and_tasks_are_taken_as_needed() -> None:
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for n in range(40):
            taken.append(n)
            yield n

    with Workers(2) as workers:
        results = workers.map(square, tasks())
        assert next(results) == 0
        assert len(taken) <= 4
        assert list(results) == [n * n for n in range(1, 40)]
        assert workers.peak_memory_bytes() > peak_memory_bytes() + 2**20


def test_an_error_keeps_its_words_and_ends_the_processes() -> None:
    seen: set[int] = set()

    def fail() -> None:
        with Workers(2) as workers:
            seen.update(workers.map(process, range(4)))
            list(workers.map(fail_at_three, range(100)))

    with pytest.raises(DataError, match="three") as caught:
        fail()
    assert (caught.value.where, caught.value.fix) == ("file:3", "count again")
    wait_until_gone(seen)


def test_a_killed_process_is_said() -> None:
    with pytest.raises(MemoryBudgetError, match="was killed"), Workers(2) as workers:
        list(workers.map(die, range(4)))


SCRIPT = """
import os, sys, time
from pathlib import Path
from tests.unit.data import helpers

class Slow(helpers.ByteTokenizer):
    def encode(self, text):
        Path(sys.argv[2], str(os.getpid())).touch()
        time.sleep(60)

def load(folder):
    return Slow()

if __name__ == "__main__":
    from llmkit.data import sources
    from llmkit.engine.stop import leave_on_signal
    from llmkit.errors import LLMKitError
    sources.CHUNK_BYTES = 500
    try:
        with leave_on_signal():
            helpers.run(helpers.config(sys.argv[1], Path(sys.argv[3]), n_workers=2), load=load)
    except LLMKitError as error:
        sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)], ids=["TERM", "INT", "KILL"]
)
def test_a_stopped_preparation_leaves_no_process_and_no_entry(tmp_path: Path, number: int, code: int) -> None:
    """The signal goes to the whole group, as a terminal or a scheduler sends it; SIGKILL to the parent alone."""
    corpus = write_jsonl(tmp_path / "a.jsonl", [f"document {n} " * 5 for n in range(40)])
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "pids").mkdir()
    arguments = [tmp_path / "script.py", corpus, tmp_path / "pids", tmp_path / "cache"]
    parent = subprocess.Popen([sys.executable, *map(str, arguments)], start_new_session=True)
    end = time.monotonic() + 60
    while len(pids := {int(path.name) for path in (tmp_path / "pids").iterdir()}) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert len(pids - {parent.pid}) == 2
    (os.kill if number == signal.SIGKILL else os.killpg)(parent.pid, number)
    assert parent.wait(20) == code
    wait_until_gone(pids)
    assert not list((tmp_path / "cache").glob("a-*"))
    assert bool(list((tmp_path / "cache").glob(".tmp-*"))) == (number == signal.SIGKILL)
