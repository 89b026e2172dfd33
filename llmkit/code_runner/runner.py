"""Runs programs one by one in a jail each, and decides from outside whether each passed.

A program has passed when its last statement has run. It is then told by 32 random bytes (``program``); printing,
leaving early, signals and changed modules are no pass. What a program can still do is to give its own tests a value
that equals everything: tests that run in the same interpreter cannot see that.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llmkit.code_runner.interpreter import Interpreter, find_interpreter
from llmkit.code_runner.watch import threads_of_user, usage
from llmkit.errors import SetupError

logger = logging.getLogger(__name__)

_MB = 1 << 20
_INTERPRETER_BYTES = 64 * _MB  # address space that the interpreter takes by itself
_FILE_BYTES = 16 * _MB  # of one file, and of all in the writable folder
_N_FILES = 64
_N_THREADS = 64  # of all processes of a program
_SETUP_SECONDS = 60.0
_TICK_SECONDS = 0.05
_REPLY_BYTES = 4096
_READY = b"+"  # as in program.py: its first word
_SIGNALLED = 64  # as in jail.py: exit status of a program that a signal ended, less the signal
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Limits:
    """What one program may take: seconds of wall clock and of processor time, and memory of all its processes.

    ``memory_mb`` comes on top of what the interpreter needs. Files: 16 MiB, in memory. Threads: 64. Output is thrown
    away.
    """

    seconds: float
    memory_mb: int


@dataclass(frozen=True)
class Verdict:
    """``passed``: the last statement has run. ``reason``: why not, printable, at most 300 characters; empty if passed.

    ``isolated``: false where the program ran with limits only.
    """

    passed: bool
    reason: str
    isolated: bool


@dataclass(frozen=True)
class Jail:
    """How programs are kept: ``isolated`` or with limits only. ``two_users``: root runs them as nobody.

    The kernel bounds the number of processes of all users but root. A program that keeps root's number, and one with
    limits only, may start no other process.
    """

    interpreter: Interpreter
    isolated: bool
    two_users: bool

    def order(self, limits: Limits, root: str, channel: int, n_threads: int) -> dict[str, object]:
        """What ``jail.py`` is told. ``root`` is an empty folder."""
        found = self.interpreter
        level = "jail" if self.isolated else "limits"
        source = (_HERE / "program.py").read_text(encoding="utf-8")
        return {
            "isolated": self.isolated,
            "two_users": self.two_users,
            "processes": self.isolated and (self.two_users or os.geteuid() != 0),
            "channel": channel,
            "root": root,
            "paths": found.paths,
            "hidden": found.hidden,
            "command": [*found.command, "-c", source, str(channel), level],
            "environment": found.environment,
            "seconds": limits.seconds,
            "memory_bytes": limits.memory_mb * _MB + _INTERPRETER_BYTES,
            "file_bytes": _FILE_BYTES,
            "n_files": _N_FILES,
            "n_processes": n_threads,
        }


def run_tests(programs: Sequence[str], limits: Limits, insecure: bool) -> list[Verdict]:
    """Run every program (its setup, what a model wrote, its tests) and say which came to their ends, in order.

    Isolated from the machine; where it offers no isolation only with ``insecure``, with limits and a warning. As many
    at a time as there are processor cores. A program is a module of its own name: guards for ``__main__`` do not run,
    it sees the standard library alone (no ``ctypes``), and one that leaves its own functions in other modules fails.

    Raises ``SetupError`` where there is no isolation and not ``insecure``, and when a program could not be started.
    """
    if not programs:
        return []
    jail = _jail(insecure)
    n_threads = threads_of_user() + _N_THREADS
    with _folder() as folder, ThreadPoolExecutor(_n_cores()) as pool:
        return list(pool.map(lambda text: _run(text, jail, limits, folder, n_threads), programs))


def _jail(insecure: bool) -> Jail:
    """The best this machine offers."""
    try:
        return _isolation()
    except SetupError as error:
        if not insecure:
            raise
        logger.warning("programs run with limits only, not isolated from this machine: %s", error.what)
        return Jail(find_interpreter(), isolated=False, two_users=False)


@functools.cache
def _isolation() -> Jail:
    """A jail that was tried out. Raises ``SetupError`` with what the system answered."""
    fix = (
        "allow user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone=1, "
        "kernel.apparmor_restrict_unprivileged_userns=0; in a container: its seccomp profile must allow unshare and "
        "mount), or accept limits only with task.run_insecure=true"
    )
    if sys.platform != "linux":
        raise SetupError("this system offers no isolation for programs: Linux namespaces are needed", fix=fix)
    fault = ""
    with _folder() as folder:
        test = f"import os\nassert not os.path.exists({folder!r}) and os.getppid() == 1 and 'HOME' not in os.environ"
        for two_users in (True, False) if os.geteuid() == 0 else (False,):
            jail = Jail(find_interpreter(), isolated=True, two_users=two_users)
            try:
                verdict = _run(test, jail, Limits(_SETUP_SECONDS, 64), folder, threads_of_user() + _N_THREADS)
            except SetupError as error:
                fault = error.what
                continue
            if verdict.passed:
                return jail
            fault = verdict.reason
    raise SetupError(f"this machine offers no isolation for programs: {fault}", fix=fix)


def _run(text: str, jail: Jail, limits: Limits, folder: str, n_threads: int) -> Verdict:
    token = secrets.token_bytes(32)
    ours, theirs = os.pipe()
    with _folder(folder) as root, tempfile.TemporaryFile() as program:
        program.write(token + text.encode(errors="surrogatepass"))
        program.flush()
        order = jail.order(limits, os.path.realpath(root), theirs, n_threads)
        try:
            process = _start(jail.interpreter, order, program, theirs)
        finally:
            os.close(theirs)
        try:
            reply, ending = _Watched(process, ours, limits).wait()
        finally:
            _end(process, ours)
            os.close(ours)
    if not reply.startswith(_READY):
        why = _printable(reply) or ending or f"exit status {process.returncode}"
        raise SetupError(f"a program could not be started: {why}", fix="see to that, or set task.run_code=false")
    said = reply[len(_READY) :]
    if said == token:
        return Verdict(True, "", jail.isolated)
    return Verdict(False, _printable(said) or ending or _status(process.returncode), jail.isolated)


def _start(
    interpreter: Interpreter, order: dict[str, object], program: IO[bytes], channel: int
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*interpreter.command, str(_HERE / "jail.py"), json.dumps(order)],
        stdin=program,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[channel],
        env=interpreter.environment,
        start_new_session=True,
    )


@dataclass
class _Watched:
    """A running jail; ``channel`` is the end of the pipe from which its program's reply is read."""

    process: subprocess.Popen[bytes]
    channel: int
    limits: Limits

    def wait(self) -> tuple[bytes, str]:
        """The reply, and how the program was ended if it had to be."""
        reply, limit = b"", _SETUP_SECONDS
        began = time.monotonic()
        poll = select.poll()
        poll.register(self.channel, select.POLLIN)
        while True:
            gone = self.process.poll() is not None
            if poll.poll(0 if gone else 1000 * _TICK_SECONDS):
                part = os.read(self.channel, _REPLY_BYTES)
                if part and not reply:
                    began, limit = time.monotonic(), self.limits.seconds
                reply += part
                if not part:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self.process.wait(1)  # to learn how it ended
                    return reply, ""
                if (reply.startswith(_READY) and len(reply) > len(_READY)) or len(reply) > _REPLY_BYTES:
                    return reply, ""
            elif gone:
                return reply, ""
            elif time.monotonic() - began > limit:
                return reply, f"no end after {limit:g} s"
            elif fault := self._too_much():
                return reply, fault

    def _too_much(self) -> str:
        n_bytes, n_threads = usage(self.process.pid)
        if n_bytes > self.limits.memory_mb * _MB + _INTERPRETER_BYTES:
            return f"more than {self.limits.memory_mb} MiB of memory"
        return f"more than {_N_THREADS} threads and processes" if n_threads > _N_THREADS + 2 else ""


def _end(process: subprocess.Popen[bytes], channel: int) -> None:
    """End the jail and wait for all that is in it: the last of them closes the channel."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    until = time.monotonic() + 5
    while poll.poll(max(0.0, 1000 * (until - time.monotonic()))) and os.read(channel, _REPLY_BYTES):
        continue


def _status(code: int) -> str:
    number = code - _SIGNALLED if code > _SIGNALLED else 0
    if number:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(number).name}"
    return "ended before its last statement"


def _printable(data: bytes) -> str:
    """What a program said, on one line, without what could steer a terminal."""
    text = data.decode(errors="replace")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)[:300]


def _folder(inside: str | None = None) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="llmkit-", dir=inside, ignore_cleanup_errors=True)


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
