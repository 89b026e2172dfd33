"""Shuts a program into a place of its own and runs it there; a script, so that nothing of llmkit is loaded.

It gives up what it can reach, in this order: new namespaces for users, mounts, processes, network, System V IPC and
host name; a root that holds the interpreter and its library, read-only, and one small writable folder in memory; all
capabilities; the system calls that reach the kernel's rarer parts; memory, processor time, open files and processes
(rlimits). Then the interpreter starts anew inside. When it ends, the kernel ends whatever it has started.

The order comes as JSON in the first argument (``runner.Jail.order``). Exit status: 64 + n when signal n ended the
program. If the jail cannot be made, the reason is written to the channel, where a program that starts says so first.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import struct
import sys

TYPE_CHECKING = False  # typing takes long to load
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

SIGNALLED = 64

# linux/sched.h: mounts, cgroups, host name, IPC, users, processes, network
_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
# linux/mount.h
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 1 << 12, 1 << 14, 1 << 18
_DETACH = 2
# linux/prctl.h
_SET_DEATH_SIGNAL, _SET_DUMPABLE, _SET_SECCOMP, _SET_SUBREAPER, _SET_NO_NEW_PRIVILEGES = 1, 4, 22, 36, 38
_NOBODY = 65534
_CAPABILITIES_3 = 0x20080522  # version of the structure that capset takes: two words of 32 bits each

# Per machine: its number in linux/audit.h, the number of clone, and calls that no tested program needs: mounts,
# namespaces, other processes' memory, files in memory, modules, bpf, counters, keys, handles, clocks, io_uring
_SHARED_CALLS = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442, 447)
_CALLS = {
    "x86_64": (0xC000003E, 56, (
        101, 103, 135, 155, 159, 161, 163, 164, 165, 166, 167, 168, 169, 175, 176, 179, 227, 246, 248, 249, 250, 272,
        298, 300, 303, 304, 305, 308, 310, 311, 312, 313, 319, 320, 321, 322, 323,
    )),
    "aarch64": (0xC00000B7, 220, (
        39, 40, 41, 51, 60, 89, 92, 97, 104, 105, 106, 112, 116, 117, 142, 170, 171, 217, 218, 219, 224, 225, 241, 262,
        264, 265, 266, 268, 270, 271, 272, 273, 279, 280, 281, 282, 294,
    )),
}  # fmt: skip
_X86_FORKS = (57, 58)  # fork and vfork, which other machines do not have
_THREAD = 0x00010000  # linux/sched.h: the flag of clone for a thread of the same process
_CLONE3 = 435  # its flags lie in memory, where a filter cannot see them; the C library falls back to clone


def main(order: dict[str, Any]) -> int:
    isolated, channel = order["isolated"], order["channel"]
    with _told(channel):
        if isolated:
            _enter(order)
        elif sys.platform == "linux":
            _call("prctl", _SET_SUBREAPER, 1)
        _end_with_parent()
        child = os.fork()
    if not child:
        _first_process(order) if isolated else _run(order)
    os.close(channel)
    status = _wait(child)
    if not isolated:
        _end_children()
    return status


def _first_process(order: dict[str, Any]) -> NoReturn:
    """Process 1 of the new namespace: when it ends the kernel kills all others there, and none of them can end it."""
    with _told(order["channel"]):
        _give_up_rights(order["two_users"])
        _end_with_parent()
        child = os.fork()
    if not child:
        _run(order)
    os.close(order["channel"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # in the place of the file that holds the program
    os._exit(_wait(child))


def _run(order: dict[str, Any]) -> NoReturn:
    """Become the program's interpreter."""
    with _told(order["channel"]):
        if order["isolated"]:
            os.setsid()
        else:
            _end_with_parent()
            os.chdir(order["root"])
            with contextlib.suppress(OSError):
                _drop_capabilities()
        _limit(order)
        if sys.platform == "linux":
            _filter_calls(order["isolated"], order["processes"])
        os.execve(order["command"][0], order["command"], order["environment"])


@contextlib.contextmanager
def _told(channel: int) -> Iterator[None]:
    """What goes wrong before the program starts is written to the channel, and ends this process."""
    try:
        yield
    except (OSError, ValueError) as error:
        os.write(channel, str(error).encode())
        os._exit(1)


def _wait(child: int) -> int:
    """The exit status of ``child``, 64 + n if signal n ended it. Orphans that end earlier are laid to rest."""
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            return SIGNALLED - code if code < 0 else code


def _end_children() -> None:
    """Orphans of an ended program, which became children of this process, and theirs."""
    here = f"/proc/self/task/{os.getpid()}/children"
    while os.path.exists(here):
        with open(here) as file:
            children = [int(process) for process in file.read().split()]
        if not children:
            return
        for process in children:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def _limit(order: dict[str, Any]) -> None:
    import resource

    seconds = int(order["seconds"]) + 1
    wanted = {
        "RLIMIT_CPU": seconds,
        "RLIMIT_AS": order["memory_bytes"],
        "RLIMIT_FSIZE": order["file_bytes"],
        "RLIMIT_NOFILE": order["n_files"],
        "RLIMIT_NPROC": order["n_processes"],
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
    for name, value in wanted.items():
        kind = getattr(resource, name, None)
        if kind is None:  # not known to this system
            continue
        hard = resource.getrlimit(kind)[1]
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.nullcontext() if sys.platform == "linux" else contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, limit))


def _enter(order: dict[str, Any]) -> None:
    """Go into namespaces of this process's own, and into a root that holds nothing but what the order names."""
    os.umask(0o022)  # the user inside reads folders that are made here
    user, group = os.geteuid(), os.getegid()
    if order["two_users"]:
        maps = [f"0 {user} 1\n{_NOBODY} {_NOBODY} 1", f"0 {group} 1\n{_NOBODY} {_NOBODY} 1"]
        _with_maps_from_outside(maps)
    else:
        _call("unshare", _NAMESPACES)
        for file, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{_NOBODY} {user} 1"),
            ("gid_map", f"{_NOBODY} {group} 1"),
        ):
            _write(f"/proc/self/{file}", text)
    _mount(None, "/", None, _REC | _PRIVATE)
    root = order["root"]
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV | _NOEXEC, "size=1m,nr_inodes=1k,mode=755")
    files = f"size={order['file_bytes']},nr_inodes=1k,mode=1777"
    for name in ("tmp", "dev/shm"):
        os.makedirs(f"{root}/{name}")
        _mount("tmpfs", f"{root}/{name}", "tmpfs", _NOSUID | _NODEV | _NOEXEC, files)
    for path in order["paths"]:
        _show(path, root)
    for path in order["hidden"]:
        _mount("tmpfs", root + path, "tmpfs", _RDONLY | _NOSUID | _NODEV | _NOEXEC, "size=4k,mode=755")
    for name in ("null", "zero", "random", "urandom"):
        _show(f"/dev/{name}", root, _NOSUID | _NOEXEC)
    _mount(None, root, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | _NOEXEC)
    os.chdir(root)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", _DETACH)
    os.chdir("/tmp")
    with contextlib.suppress(OSError):
        _call("sethostname", b"jail", 4)


def _with_maps_from_outside(maps: list[str]) -> None:
    """Two users need a process outside, with the rights of before, to write the maps."""
    ready, tell = os.pipe()
    inside = os.getpid()
    helper = os.fork()
    if not helper:
        os.close(tell)
        os.read(ready, 1)
        try:
            for file, text in zip(("uid_map", "gid_map"), maps, strict=True):
                _write(f"/proc/{inside}/{file}", text)
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    os.close(ready)
    try:
        _call("unshare", _NAMESPACES)
    finally:
        os.close(tell)
        code = os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1])
    if code:
        raise OSError(code, f"writing uid_map: {os.strerror(code)}")


def _show(path: str, root: str, flags: int = _NOSUID | _NODEV) -> None:
    """Bind a file or folder into the new root, at its own path."""
    target = root + path
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(path, target, None, _BIND | _REC)
    kept = os.statvfs(path).f_flag & (_NOSUID | _NODEV | _NOEXEC)  # of the mount there, which may not be loosened
    _mount(None, target, None, _REMOUNT | _BIND | _RDONLY | flags | kept)


def _give_up_rights(two_users: bool) -> None:
    if two_users:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _drop_capabilities()
    _call("prctl", _SET_DUMPABLE, 0)


def _drop_capabilities() -> None:
    """For good: nothing that is started later gets any back."""
    _call("prctl", _SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _call("capset", struct.pack("<Ii", _CAPABILITIES_3, 0), bytes(24))


def _filter_calls(isolated: bool, processes: bool) -> None:
    """Deny what no tested program needs, where the machine's calls are known (64 bits); new processes if told so.

    Raises ``OSError`` where a jail needs what cannot be had; with limits only the program runs all the same.
    """
    known = _CALLS.get(os.uname().machine) if sys.maxsize > 1 << 32 else None
    with contextlib.nullcontext() if isolated else contextlib.suppress(OSError):
        if known is None and not processes:
            raise OSError(f"root's processes cannot be bounded on {os.uname().machine}: run as another user")
        if known is not None:
            _install_filter(*known, processes=processes)


def _install_filter(machine: int, clone: int, denied: tuple[int, ...], processes: bool) -> None:
    """A seccomp filter (linux/filter.h): denied calls answer "not permitted", new namespaces included."""
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, absent, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    steps = [
        (load, 0, 0, 4), (equal, 1, 0, machine), (answer, 0, 0, kill),
        (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (answer, 0, 0, refuse),  # x86's second table of calls
        (equal, 0, 1, _CLONE3), (answer, 0, 0, absent),
    ]  # fmt: skip
    for call in (*denied, *_SHARED_CALLS, *(() if processes or clone != _CALLS["x86_64"][1] else _X86_FORKS)):
        steps += [(equal, 0, 1, call), (answer, 0, 0, refuse)]
    steps += [(equal, 1, 0, clone), (answer, 0, 0, allow)]
    steps += [(load, 0, 0, 16), (any_bit, 0, 1, _NAMESPACES), (answer, 0, 0, refuse)]
    if not processes:
        steps += [(any_bit, 1, 0, _THREAD), (answer, 0, 0, refuse)]
    steps += [(answer, 0, 0, allow)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    header = struct.pack("@HP", len(steps), ctypes.addressof(program))
    _call("prctl", _SET_SECCOMP, 2, header, 0, 0)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        _call("prctl", _SET_DEATH_SIGNAL, int(signal.SIGKILL))


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    texts = [text and os.fsencode(text) for text in (source, target, kind)]
    try:
        _call("mount", *texts, flags, options.encode() or None)
    except OSError as error:
        raise OSError(error.errno, f"mount {target}: {error.strerror}") from error


def _call(name: str, *values: Any) -> None:
    """A function of the C library that returns -1 and sets errno when it fails."""
    function: Callable[..., int] | None = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        raise OSError(f"the C library has no {name}")
    given = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in values]
    if function(*given) == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    except OSError as error:
        raise OSError(error.errno, f"writing {os.path.basename(path)}: {error.strerror}") from error
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
