"""Hostile programs: none gets out of the jail, each gets the right verdict, and nothing of it is left."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from llmkit.code_runner import Limits, Verdict, run_tests, runner
from llmkit.errors import SetupError

LIMITS = Limits(seconds=30.0, memory_mb=128)
SHORT = Limits(seconds=1.0, memory_mb=128)  # for programs that only the clock ends
CLOCK = "no end after 1 s"
SECRET = "canary-5c1f"
MARK = "LLMKIT_TEST_MARK"

# name -> (program, what the reason must hold; None where the program passes). {place} is a folder of the machine,
# {port} and {name} where a server listens. A program that gets what it should not comes to its end, and so passes.
HOSTILE: dict[str, tuple[str, str | None]] = {
    # takes too much
    "endless loop": ("while True: pass", CLOCK),
    "endless sleep": ("import time\ntime.sleep(1e6)", CLOCK),
    "sleep deaf to signals": (
        "import signal, time\nfor n in range(1, 30):\n    if n not in (9, 19): signal.signal(n, signal.SIG_IGN)\n"
        "time.sleep(1e6)",
        CLOCK,
    ),
    "stops itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nos.kill(1, 19)\nassert 0", CLOCK),
    # bounded, lest a broken limit takes the machine that runs the tests down
    "many processes": (
        "import os, time\nfor n in range(400):\n    if not os.fork(): time.sleep(99)",
        "64 threads|128 MiB|BlockingIOError|PermissionError",
    ),
    "fork bomb": (
        "import os, time\nfor n in range(9): os.fork()\ntime.sleep(20)",
        "64 threads|128 MiB|BlockingIOError|PermissionError",
    ),
    "thread flood": (
        "import threading, time\nfor n in range(10**4): threading.Thread(target=time.sleep, args=(99,)).start()",
        "64 threads|start new thread",
    ),
    "10 GB": ("x = bytearray(10**10)", "MemoryError"),
    "10 GB bit by bit": ("x = []\nwhile True: x.append(bytearray(10**6))", "MemoryError|128 MiB"),
    "memory of many processes": (
        "import os, time\nfor n in range(8):\n    if not os.fork(): x = b'x' * (100 << 20); time.sleep(99)\n"
        "time.sleep(99)",
        "128 MiB",
    ),
    "1 GB of output": ("import os\nfor n in range(1 << 10): os.write(1, bytes(1 << 20))", None),  # thrown away
    "endless output": ("while True: print('x' * 9999)", CLOCK),
    "1 GB file": ("with open('x', 'wb') as f:\n    for n in range(1 << 10): f.write(bytes(1 << 20))", "OSError"),
    "many small files": ("for n in range(10**6): open(f'x{n}', 'w').close()", "OSError"),
    "descriptor flood": ("import os\nx = [os.dup(0) for n in range(9999)]", "OSError"),
    "deep recursion in C": (
        "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __repr__(self): return repr([self])\nrepr(A())",
        "SIGSEGV|MemoryError|RecursionError|SIGABRT|128 MiB",
    ),
    # reaches out
    "loopback": ("import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)", "OSError|unreachable|Error"),
    "abstract socket": ("import socket\nsocket.socket(socket.AF_UNIX).connect('\\x00{name}')", "ConnectionRefused"),
    "datagram": ("import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))", "Error"),
    "names": ("import socket\nsocket.getaddrinfo('example.com', 80)", "gaierror"),
    "devices of the network": ("import socket\nassert len(socket.if_nameindex()) > 1", "AssertionError"),
    "reads a secret": ("assert open('{place}/secret').read()", "FileNotFoundError"),
    "reads a home": ("import os\nassert os.listdir(os.path.expanduser('~'))", "Error"),
    "reads the environment": ("import os\nassert os.environ", "AssertionError"),
    "reads what processes there are": ("import os\nassert os.listdir('/proc')", "FileNotFoundError"),
    "reads accounts": ("open('/etc/passwd').read()", "FileNotFoundError"),
    "reads installed packages": (
        "import os, sys\nfound = [os.path.join(p, 'site-packages') for p in sys.path]\n"
        "assert any(os.path.isdir(p) and os.listdir(p) for p in found)",
        "AssertionError",
    ),
    "writes outside": ("open('{place}/escaped', 'w').write('x')", "FileNotFoundError"),
    "removes what is outside": ("import shutil\nshutil.rmtree('{place}')", "FileNotFoundError"),
    "writes to the root": ("open('/x', 'w')", "Read-only|Permission"),
    "writes to the library": ("import os\nopen(os.__file__, 'a')", "Read-only|Permission"),
    "link to outside": ("import os\nos.symlink('{place}', 'x')\nos.listdir('x')", "FileNotFoundError"),
    "device": ("import os, stat\nos.mknod('x', 0o600 | stat.S_IFBLK, os.makedev(8, 0))", "PermissionError"),
    "shell": ("import os\nassert os.system('true') == 0", "AssertionError"),
    "other program": ("import os\nos.execv('/bin/sh', ['sh'])", "FileNotFoundError"),
    "becomes root": ("import os\nos.setuid(0)\nassert os.getuid() == 0", "PermissionError|Invalid argument"),
    "new root": ("import os\nos.chroot('/tmp')", "PermissionError"),
    "other host name": ("import socket\nsocket.sethostname(socket.gethostname())", "PermissionError"),
    "own namespaces": (
        "import os\nassert hasattr(os, 'unshare')\nos.unshare(os.CLONE_NEWUSER)", "AssertionError|PermissionError",
    ),
    "limits taken back": (
        "import resource as r\nr.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY, r.RLIM_INFINITY))", "ValueError|Permission",
    ),
    "kills its parent": ("import os\nos.kill(os.getppid(), 9)\nassert 0", "AssertionError"),
    "kills all": ("import os\nos.kill(-1, 9)\nassert 0", "AssertionError|SIGKILL|ProcessLookupError"),
    "kills its group": ("import os\nos.killpg(0, 9)", "SIGKILL"),
    "leaves a process behind": (
        "import os, time\nif not os.fork():\n    os.setsid()\n    if not os.fork(): time.sleep(99)\n    os._exit(0)\n"
        "os._exit(0)",
        "before its last statement",
    ),
    "passes and leaves a process behind": ("import os, time\nif not os.fork(): time.sleep(99)", None),
    "loads native code": (
        "import _ssl, shutil, _imp\nfrom importlib.machinery import ExtensionFileLoader as L, ModuleSpec as S\n"
        "shutil.copy(_ssl.__file__, 'x.so')\nplace = '/tmp/x.so'\n"
        "_imp.create_dynamic(S('_ssl', L('_ssl', place), origin=place))",
        "failed to map segment",
    ),
    "file in memory": ("import os\nos.memfd_create('x')", "PermissionError"),
    # claims what is not so
    "prints": ("print('passed', 'OK')\nassert 0", "AssertionError"),
    "exits at once": ("import os\nos._exit(0)\nassert 0", "before its last statement"),
    "leaves": ("import sys\nsys.exit(0)\nassert 0", "SystemExit"),
    "leaves by raising": ("raise SystemExit\nassert 0", "SystemExit"),
    "quits": ("quit()", "NameError|SystemExit"),
    "interrupts": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "ends by a signal": ("import os\nos.abort()", "SIGABRT"),
    "writes to all descriptors": (
        "import os\nfor n in range(64):\n    try: os.write(n, b'+' + bytes(32))\n    except OSError: pass\nassert 0",
        "",
    ),
    "writes half a pass": ("import os\nos.write(int(__import__('sys').orig_argv[-2]), b'passed')", "passed"),
    "closes all descriptors": ("import os\nos.closerange(0, 64)", "before its last statement"),
    "reads all descriptors": (
        "import os\nfound = b''\nfor n in range(64):\n    try: found = os.pread(n, 99, 0) or found\n"
        "    except OSError: pass\nassert found, 'nothing'",
        "nothing",
    ),
    "looks for the secret in frames": (
        "import sys\nframe, found = sys._getframe(), []\nwhile frame:\n"
        "    found += [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]\n"
        "    frame = frame.f_back\n"
        "assert any(isinstance(x, bytes) and len(x) == 32 for x in found), 'nothing'",
        "nothing",
    ),
    "other code for a function": (
        "import unittest\nunittest.TestCase.fail.__code__ = (lambda self, msg=None: None).__code__", "changed unittest",
    ),
    "other code for the runner": (
        "import sys\nsys.modules['__main__']._refuse_changes.__code__ = (lambda: None).__code__", "PermissionError",
    ),
    "looks for the secret in memory": ("import gc\ngc.get_objects()", "PermissionError"),
    "no longer asserts": ("import builtins\nbuiltins.AssertionError = None\nassert 0", ""),
    "patches unittest": (
        "import unittest\nunittest.TestCase.assertEqual = lambda *given: None\nunittest.TestCase().assertEqual(1, 2)",
        "changed unittest",
    ),
    "patches math": ("import math\nmath.isclose = lambda *given: True\nassert math.isclose(1, 2)", "changed math"),
    "patches what is built in": (
        "import builtins\nclass Same(set):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
        "builtins.set = Same\nassert set([1]) == set([2])",
        "changed builtins.set",
    ),
    "patches with another's": ("import builtins\nbuiltins.all = any\nassert all([0, 1])", "changed builtins.all"),
    "patches the end": (
        "import os, sys\nos._exit = lambda code: None\nos.write = lambda *given: 1\n"
        "sys.modules['__main__']._describe = sys.modules['__main__']._refuse_changes = lambda *given: b''\nassert 0",
        "",
    ),
    "jumps over its tests": (
        "import sys\ndef jump(frame, event, value):\n    if frame.f_lineno == 7: frame.f_lineno = 8\n    return jump\n"
        "sys.settrace(jump)\nsys._getframe().f_trace = jump\nassert sys is None\nx = 1",
        "PermissionError",
    ),
    "ctypes": ("import ctypes\nctypes.string_at(0)", "ImportError"),
    "ctypes by its file": (
        "import glob, os, _imp\nfrom importlib.machinery import ExtensionFileLoader as L, ModuleSpec as S\n"
        "place = glob.glob(os.path.dirname(os.__file__) + '/lib-dynload/_ctypes.*')[0]\n"
        "_imp.create_dynamic(S('_ctypes', L('_ctypes', place), origin=place))",
        "Error",
    ),
    "opened text": ("x = '''", "SyntaxError"),
    "words of an error": (
        "class Error(Exception):\n    def __str__(self):\n        while True: pass\nraise Error", CLOCK,
    ),
    "steers the terminal": ("raise ValueError('\\x1b[2J\\n\\x07passed')", r"\x1b[2J\n\x07passed"),
    "hangs when it ends": ("import atexit\n@atexit.register\ndef hang():\n    while True: pass", None),
    "reads the keyboard": ("input()", "EOFError"),
    "guard of a script": ("if __name__ == '__main__':\n    assert 0", None),
    "zero bytes": ("x = 1\0", "SyntaxError|ValueError"),
    "half a character": ("x = '\udc80'", "SyntaxError|Unicode"),
}  # fmt: skip

# What limits alone must stop, or refuse; nothing that would hurt the machine if they did not
LIMITED = (
    "endless loop", "endless sleep", "sleep deaf to signals", "many processes", "fork bomb", "thread flood",
    "10 GB", "10 GB bit by bit", "new root", "device", "other host name", "1 GB of output", "1 GB file",
    "descriptor flood", "loopback", "datagram", "reads the environment", "writes outside",
    "removes what is outside", "shell", "limits taken back", "kills its parent", "kills its group", "prints",
    "exits at once", "leaves", "leaves by raising", "interrupts", "ends by a signal", "writes to all descriptors",
    "closes all descriptors", "reads all descriptors", "looks for the secret in frames",
    "looks for the secret in memory", "no longer asserts", "patches unittest", "patches math", "patches the end",
    "patches what is built in", "patches with another's", "jumps over its tests", "ctypes", "opened text",
    "words of an error", "steers the terminal", "hangs when it ends", "reads the keyboard", "guard of a script",
)  # fmt: skip


@dataclass
class Outcome:
    verdicts: dict[str, Verdict]
    place: Path
    server: socket.socket
    local: socket.socket
    mark: str


def attack(place: Path, jail: runner.Jail, names: tuple[str, ...]) -> Outcome:
    """Run programs with something to steal, spoil and reach beside them."""
    place.mkdir()
    (place / "secret").write_text(SECRET)
    mark = uuid.uuid4().hex
    marked = replace(jail.interpreter, environment={**jail.interpreter.environment, MARK: mark})
    server, local = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    local.bind(f"\0{mark}" if sys.platform == "linux" else str(place / "socket"))
    local.listen()
    values = {"{place}": str(place), "{port}": str(server.getsockname()[1]), "{name}": mark}
    programs = {name: filled(HOSTILE[name][0], values) for name in names}
    slow = {name: text for name, text in programs.items() if CLOCK in (HOSTILE[name][1] or "")}
    fast = {name: text for name, text in programs.items() if name not in slow}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET", SECRET)
        patch.setattr(runner, "_jail", lambda insecure: replace(jail, interpreter=marked))
        said = [*run_tests(list(slow.values()), SHORT, False), *run_tests(list(fast.values()), LIMITS, False)]
    return Outcome(dict(zip([*slow, *fast], said, strict=True)), place, server, local, mark)


def filled(text: str, values: dict[str, str]) -> str:
    for key, value in values.items():
        text = text.replace(key, value)
    return text


def isolation() -> runner.Jail:
    try:
        return runner._isolation()
    except SetupError as error:
        pytest.skip(error.what)


@pytest.fixture(scope="module")
def jailed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    outcome = attack(tmp_path_factory.mktemp("machine") / "x", isolation(), tuple(HOSTILE))
    yield outcome
    outcome.server.close()
    outcome.local.close()


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    jail = runner.Jail(runner.find_interpreter(), isolated=False, two_users=False)
    outcome = attack(tmp_path_factory.mktemp("machine") / "x", jail, LIMITED)
    yield outcome
    outcome.server.close()
    outcome.local.close()


def check(verdict: Verdict, name: str) -> None:
    words = HOSTILE[name][1]
    assert verdict.passed == (words is None), verdict
    if words is None:
        assert verdict.reason == ""
    else:
        assert any(word in verdict.reason for word in words.split("|")), verdict.reason
        assert verdict.reason
        assert verdict.reason.isprintable()


def nothing_left(outcome: Outcome) -> None:
    """No process still runs, nothing was written or removed, nobody called."""
    wait_for(lambda: not processes(outcome.mark), 5)
    assert [file.name for file in outcome.place.iterdir()] == ["secret"]
    for server in (outcome.server, outcome.local):
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


def processes(mark: str) -> list[float]:
    """The processor time of every process that carries the mark, in seconds."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                ticks = (folder / "stat").read_text().rpartition(")")[2].split()[11]
                found.append(int(ticks) / os.sysconf("SC_CLK_TCK"))
        except OSError:  # it has ended, or is another user's
            continue
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_in_the_jail(jailed: Outcome, name: str) -> None:
    assert jailed.verdicts[name].isolated
    check(jailed.verdicts[name], name)


def test_nothing_of_the_jailed_is_left(jailed: Outcome) -> None:
    assert len(HOSTILE) >= 30
    nothing_left(jailed)


@pytest.mark.parametrize("name", LIMITED)
def test_with_limits_only(limited: Outcome, name: str) -> None:
    verdict = limited.verdicts[name]
    assert not verdict.isolated
    if "not for tested programs" in verdict.reason:  # refused before the machine could
        assert not verdict.passed
    else:
        check(verdict, name)


def test_nothing_of_the_limited_is_left(limited: Outcome) -> None:
    nothing_left(limited)


# What the kernel keeps from a program that runs as the user of llmkit himself, and what it takes for itself
AS_ONESELF = (
    "writes to the library", "writes to the root", "device", "becomes root", "new root", "other host name",
    "own namespaces", "file in memory", "loads native code", "reads installed packages", "reads a secret", "loopback",
    "many processes", "kills all",
)  # fmt: skip


def test_without_a_second_user(tmp_path: Path) -> None:
    """Only root can run programs as somebody else; all others run them as themselves."""
    outcome = attack(tmp_path / "x", replace(isolation(), two_users=False), AS_ONESELF)
    for name, verdict in outcome.verdicts.items():
        check(verdict, name)
    nothing_left(outcome)
    outcome.server.close()
    outcome.local.close()


def test_a_private_umask_does_no_harm() -> None:
    isolation()
    before = os.umask(0o077)
    try:
        assert run_tests(["import json"], LIMITS, False) == [Verdict(True, "", isolated=True)]
    finally:
        os.umask(before)


@pytest.mark.parametrize("isolated", [True, False])
def test_programs_end_with_llmkit(isolated: bool, tmp_path: Path) -> None:
    """Also when it is killed and can tidy nothing up."""
    if sys.platform != "linux":
        pytest.skip("only Linux ends a child with its parent")
    if isolated:
        isolation()
    mark = uuid.uuid4().hex
    script = (
        "from dataclasses import replace\nfrom llmkit.code_runner import Limits, run_tests, runner\n"
        f"jail = runner._isolation() if {isolated} else runner.Jail(runner.find_interpreter(), False, False)\n"
        f"marked = replace(jail.interpreter, environment=jail.interpreter.environment | {{{MARK!r}: {mark!r}}})\n"
        "runner._jail = lambda insecure: replace(jail, interpreter=marked)\n"
        "run_tests(['while True: pass'], Limits(60, 64), False)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as process:
        wait_for(lambda: any(seconds > 0.5 for seconds in processes(mark)), 60)  # it is well in its loop
        process.kill()
    wait_for(lambda: not processes(mark), 10)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        os.sched_yield()


GOOD = {
    "threads": "import threading\nx = []\nt = threading.Thread(target=x.append, args=(1,))\nt.start(); t.join()\n"
    "assert x == [1]",
    "processes": "import multiprocessing as m\ndef f(x): return x + 1\nwith m.get_context('fork').Pool(2) as pool:\n"
    "    assert pool.map(f, [1, 2]) == [2, 3]",
    "files": "import tempfile\nwith tempfile.TemporaryFile('w+') as f:\n    f.write('x'); f.seek(0); assert f.read()",
    "library": "import asyncio, bz2, decimal, hashlib, lzma, random, sqlite3, ssl, statistics, uuid, zlib, heapq\n"
    "assert asyncio.run(asyncio.sleep(0, 7)) == 7",
    "classes": "import dataclasses, enum, pickle, typing\n@dataclasses.dataclass\nclass P:\n    x: int\n"
    "class C(enum.Enum):\n    A = 1\nassert pickle.loads(pickle.dumps(P(1))) == P(1) and C.A.value == 1",
    "mock": "import unittest.mock as u, os\nwith u.patch('os.getcwd', lambda: 'x'): assert os.getcwd() == 'x'",
    "deep recursion": "import sys\nsys.setrecursionlimit(9000)\ndef f(n): return n and f(n - 1)\nassert f(8000) == 0",
    "memory within the limit": "x = b'x' * (100 << 20)\nassert len(x)",
    "long text": f"x = {'y' * 300_000!r}\nassert len(x) == 300_000",
    "empty": "",
}


@pytest.mark.parametrize("isolated", [True, False])
def test_good_programs_pass(isolated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    jail = isolation() if isolated else runner.Jail(runner.find_interpreter(), isolated=False, two_users=False)
    monkeypatch.setattr(runner, "_jail", lambda insecure: jail)
    good = {name: text for name, text in GOOD.items() if isolated or name not in ("processes",)}
    verdicts = run_tests(list(good.values()), replace(LIMITS, seconds=30), False)
    assert dict(zip(good, verdicts, strict=True)) == dict.fromkeys(good, Verdict(True, "", isolated))


def refuse(reason: str) -> runner.Jail:
    raise SetupError(reason)


def test_without_isolation_nothing_runs_unless_accepted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runner, "_isolation", lambda: refuse("no namespaces"))
    monkeypatch.setattr(runner, "_run", lambda *given: pytest.fail("a program was run"))
    with pytest.raises(SetupError, match="no namespaces"):
        run_tests(["x = 1"], LIMITS, False)
    monkeypatch.undo()
    monkeypatch.setattr(runner, "_isolation", lambda: refuse("no namespaces"))
    assert run_tests(["x = 1", "assert 0"], LIMITS, True)[0] == Verdict(True, "", isolated=False)
    assert "limits only" in caplog.text
    assert "no namespaces" in caplog.text


def test_a_kernel_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way of finding out, with a jail that cannot be made: one of its folders is not there."""
    missing = replace(runner.find_interpreter(), paths=("/nowhere/at/all",))
    monkeypatch.setattr(runner, "find_interpreter", lambda: missing)
    with pytest.raises(SetupError, match="offers no isolation for programs: a program could not be started") as caught:
        runner._isolation.__wrapped__()
    assert "task.run_insecure=true" in caught.value.fix


def test_a_program_that_did_not_start_is_no_failed_program(monkeypatch: pytest.MonkeyPatch) -> None:
    jail = isolation()
    broken = replace(jail, interpreter=replace(jail.interpreter, paths=()))
    monkeypatch.setattr(runner, "_jail", lambda insecure: broken)
    with pytest.raises(SetupError, match="could not be started"):
        run_tests(["x = 1"], LIMITS, False)


def test_no_programs() -> None:
    assert run_tests([], LIMITS, False) == []


def test_order_is_kept_and_folders_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    programs = [f"assert {n} % 3" for n in range(12)]
    assert [verdict.passed for verdict in run_tests(programs, LIMITS, True)] == [n % 3 > 0 for n in range(12)]
    assert list(tmp_path.iterdir()) == []


def test_a_program_cannot_see_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_n_cores", lambda: 1)
    leave, find = "open('left', 'w').close()", "import os\nassert os.listdir('.') == [], os.listdir('.')"
    assert [verdict.passed for verdict in run_tests([leave, find], LIMITS, True)] == [True, True]


@pytest.mark.slow
def test_reference_solutions_pass(data_dir: Path) -> None:
    """All of MBPP."""
    isolation()
    files = sorted((data_dir / "code").glob("mbpp.*"))
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 974
    programs = ["\n".join([row["code"], row["test_setup_code"], *row["test_list"]]) for row in rows]
    verdicts = run_tests(programs, Limits(seconds=60, memory_mb=512), False)
    failed = {row["task_id"]: said.reason for row, said in zip(rows, verdicts, strict=True) if not said.passed}
    assert failed == {}
