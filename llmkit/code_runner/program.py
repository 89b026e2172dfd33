"""The interpreter of one program inside the jail: runs it and tells whether it came to its end. A script.

Standard input is a file: 32 random bytes, then the program. Those bytes, written to the channel, say "passed". While
the program runs they are neither in a variable nor in an open file, only on the stack of a frame that is running,
where Python code cannot look; and what would look deeper (``ctypes``, ``gc.get_objects``, trace functions that jump
over lines) is refused by an audit hook, which nothing can remove.
"""

from __future__ import annotations

import builtins
import os
import sys
from importlib.machinery import SourceFileLoader
from os import PathLike
from types import CodeType, FunctionType, ModuleType

TYPE_CHECKING = False  # typing takes long to load
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

TOKEN_BYTES = 32
READY = b"+"  # written first of all: the jail stands
NAME = "program"  # of the module that the program is; not "__main__", whose guard starts what reads from a keyboard
_MESSAGE_CHARS = 200

_BUILTINS = dict(vars(builtins))
globals()["__builtins__"] = _BUILTINS  # the functions below keep these, whatever the program changes


def main(channel: int, limits_only: bool) -> None:
    os.environ.clear()
    sys.argv = [NAME]
    source = _source()
    sys.addaudithook(_guard(limits_only, os.getcwd()))
    os.write(channel, READY)
    write, leave = os.write, os._exit
    write(channel, _take_token() + _run(source, channel))
    leave(0)


def _source() -> bytes:
    parts: list[bytes] = []
    while part := os.pread(0, 1 << 20, TOKEN_BYTES + sum(map(len, parts))):
        parts.append(part)
    return b"".join(parts)


def _take_token() -> bytes:
    """The random bytes; their file is closed."""
    token = os.pread(0, TOKEN_BYTES, 0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return token


def _run(source: bytes, channel: int) -> bytes:
    """Nothing, once the program has come to its end; whatever it raises goes on from here."""
    module = sys.modules[NAME] = ModuleType(NAME)
    refuse_changes = _refuse_changes
    try:
        _Text(source).exec_module(module)
        refuse_changes()
    except BaseException as error:  # SystemExit too: a program that leaves has not passed its tests
        os.write(channel, _describe(error))
        raise
    return b""


class _Text(SourceFileLoader):
    """Loads a module from its text."""

    def __init__(self, source: bytes) -> None:
        super().__init__(NAME, NAME)
        self.source = source

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = compile(self.source, NAME, "exec", dont_inherit=True)
        return code


def _describe(error: BaseException) -> bytes:
    """Its class, message and line. The program may have written the class, and so what this says, but not the token."""
    line, place = 0, error.__traceback__
    while place is not None:
        line = place.tb_lineno if place.tb_frame.f_code.co_filename == NAME else line
        place = place.tb_next
    message = str(error)[:_MESSAGE_CHARS]
    name = type(error).__name__
    return f"{name}{': ' if message else ''}{message}{f' (line {line})' if line else ''}".encode(errors="replace")


def _refuse_changes() -> None:
    """Raise if the program has put something of its own into a module that is not its own, such as ``unittest``."""
    for name, module in list(sys.modules.items()):
        if name == NAME or not isinstance(module, ModuleType):
            continue
        for key, value in list(vars(module).items()):
            spaces = [(key, value)]
            if isinstance(value, type) and value.__module__ == name:
                spaces += [(f"{key}.{inner}", thing) for inner, thing in list(vars(value).items())]
            for place, thing in spaces:
                if _is_own(thing) or (name == "builtins" and _BUILTINS.get(place, thing) is not thing):
                    raise RuntimeError(f"the program changed {name}.{place}")


def _is_own(thing: Any) -> bool:
    if isinstance(thing, staticmethod | classmethod):
        thing = thing.__func__
    if type(thing) is FunctionType:
        return thing.__code__.co_filename == NAME
    return isinstance(thing, type) and thing.__module__ == NAME


def _guard(limits_only: bool, folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """What audit events (PEP 578) are refused. Inside the jail the kernel keeps the rest away.

    With limits only: also other processes, the network and changes to files outside ``folder``. That stops accidents;
    whoever means harm finds a way around it.
    """
    looking = {
        "sys.settrace", "sys.setprofile", "sys.monitoring.register_callback", "sys.remote_exec", "gc.get_objects",
        "gc.get_referrers", "gc.get_referents",
    }  # fmt: skip
    processes = {
        "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "os.exec", "os.kill", "os.killpg",
        "pty.spawn", "subprocess.Popen", "signal.pthread_kill", "resource.prlimit",
    }  # fmt: skip
    network = {
        "socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.sethostname",
    }  # fmt: skip
    files = {
        "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.removexattr", "os.rename", "os.rmdir",
        "os.setxattr", "os.symlink", "os.truncate", "os.utime", "shutil.rmtree",
    }  # fmt: skip
    refused = looking | (processes | network if limits_only else set())
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    real, join, text = os.path.realpath, os.path.join, os.fsdecode
    null = join(os.devnull, "")

    def guard(event: str, values: tuple[Any, ...]) -> None:
        if event in refused or event.startswith("ctypes."):
            raise PermissionError(f"{event} is not for tested programs")
        if event == "object.__setattr__" and getattr(values[0], "__globals__", None) is globals():
            raise PermissionError("another function in the place of the runner's is not for tested programs")
        if event == "import" and any("ctypes" in str(value) for value in values[:2]):
            raise ImportError("ctypes is not for tested programs")
        if limits_only and (event in files or (event == "open" and values[2] & writing)):
            paths = values[:1] if event == "open" else values[:2]
            places = [join(real(text(path)), "") for path in paths if isinstance(path, str | bytes | PathLike)]
            if not all(place.startswith((join(folder, ""), null)) for place in places):
                raise PermissionError(f"{event} outside its folder is not for tested programs")

    return guard


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] == "limits")
