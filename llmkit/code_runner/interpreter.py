"""What the interpreter consists of: its file, its library, and the folders of the C libraries that it loads."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass

from llmkit.errors import SetupError

_LOADER = re.compile(rb"/[\w./+-]*/ld[\w.-]*\.so[\w.]*")  # the path that a program's file names for its loader
_PASSED_ON = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # without which some interpreters do not start

# Loads every extension module, as a program may, and shows its library and the C libraries that are mapped then
_PROBE = """
import contextlib, importlib, json, os, sys
folder = next((path for path in sys.path if path.endswith("lib-dynload")), None)
for name in sorted(os.listdir(folder)) if folder else ():
    if not name.startswith(("_test", "_tkinter", "xx", "_ctypes_test")):
        with contextlib.suppress(Exception):
            importlib.import_module(name.partition(".")[0])
mapped = set()
with contextlib.suppress(OSError), open("/proc/self/maps") as maps:
    mapped = {os.path.dirname(line.split(maxsplit=5)[-1].strip()) for line in maps if ".so" in line}
print(json.dumps({"library": [path for path in sys.path if os.path.exists(path)], "mapped": sorted(mapped)}))
"""


@dataclass(frozen=True)
class Interpreter:
    """``command`` starts it without the user's settings and packages. ``paths``: files and folders that it reads,
    none inside another; ``hidden``: folders in them that hold installed packages; ``environment``: all of it.
    """

    command: tuple[str, ...]
    paths: tuple[str, ...]
    hidden: tuple[str, ...]
    environment: dict[str, str]


@functools.cache
def find_interpreter() -> Interpreter:
    """The one that runs now, outside any virtual environment."""
    if os.name != "posix":
        raise SetupError("programs can be run on Linux and macOS only", fix="set task.run_code=false")
    file = os.path.realpath(sys.executable)
    command = (file, "-I", "-S", "-B", "-X", "utf8")
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    shown = subprocess.run([*command, "-c", _PROBE], capture_output=True, env=environment, check=False)
    try:
        found = json.loads(shown.stdout)
    except ValueError as error:
        raise SetupError(f"{file} does not start on its own: {shown.stderr.decode(errors='replace')}") from error
    with open(file, "rb") as opened:
        loader = _LOADER.search(opened.read(8192))
    paths = _outermost({file, *found["library"], *found["mapped"], *([os.fsdecode(loader[0])] if loader else [])})
    packages = [os.path.join(path, name) for path in found["library"] for name in ("site-packages", "dist-packages")]
    environment |= {"LD_LIBRARY_PATH": ":".join(found["mapped"])} if found["mapped"] else {}
    return Interpreter(command, paths, tuple(path for path in packages if os.path.isdir(path)), environment)


def _outermost(paths: set[str]) -> tuple[str, ...]:
    found: list[str] = []
    for path in sorted(paths):
        if not any(path == outer or path.startswith(outer + "/") for outer in found):
            found.append(path)
    return tuple(found)
