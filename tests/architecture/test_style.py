"""Size, types and dangerous calls, over the whole package."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator

import pytest

from tests.architecture.source import PACKAGE, ROOT, SOURCES, Source

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
LONG_FUNCTION_LINES = 40  # at most one function in ten
MEDIAN_FUNCTION_LINES = 12

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: Source) -> Iterator[Function]:
    return (node for node in ast.walk(source.tree) if isinstance(node, Function))


def n_lines(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def test_files_are_short() -> None:
    long = {source.shown: n for source in SOURCES if (n := source.text.count("\n")) > MAX_FILE_LINES}
    assert long == {}


def test_functions_are_short() -> None:
    lengths = {
        f"{source.shown}:{node.lineno} {node.name}": n_lines(node) for source in SOURCES for node in functions(source)
    }
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}
    assert statistics.median(lengths.values()) <= MEDIAN_FUNCTION_LINES
    assert sum(n > LONG_FUNCTION_LINES for n in lengths.values()) <= len(lengths) / 10


def test_everything_is_typed() -> None:
    untyped = []
    for source in SOURCES:
        for node in functions(source):
            arguments = [
                *node.args.posonlyargs,
                *node.args.args,
                *node.args.kwonlyargs,
                node.args.vararg,
                node.args.kwarg,
            ]
            bare = [a for a in arguments if a and a.annotation is None and a.arg not in ("self", "cls")]
            if bare or node.returns is None:
                untyped.append(f"{source.shown}:{node.lineno} {node.name}")
    assert untyped == []


def test_every_module_says_what_it_is() -> None:
    silent = [source.shown for source in SOURCES if source.text.strip() and not ast.get_docstring(source.tree)]
    assert silent == []


FORBIDDEN_CALLS = {
    "eval", "exec", "pickle.load", "pickle.loads", "torch.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load",
    "marshal.loads", "shelve.open", "os.system", "hydra.utils.instantiate", "joblib.load",
}  # fmt: skip


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_no_call_that_runs_what_a_file_says() -> None:
    found = []
    for source in SOURCES:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and dotted(node.func) in FORBIDDEN_CALLS:
                found.append(f"{source.shown}:{node.lineno}")
            if isinstance(node, ast.keyword) and node.arg in ("shell", "allow_pickle", "trust_remote_code"):
                found.append(f"{source.shown}:{node.value.lineno}")
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [
                    f"{source.shown}:{node.lineno}" for name in names if name in ("pickle", "marshal", "shelve", "dill")
                ]
    assert found == []


def test_no_swallowed_exceptions() -> None:
    """``except: pass`` and bare ``except:`` hide bugs."""
    found = []
    for source in SOURCES:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None
                or (dotted(node.type) in ("Exception", "BaseException") and isinstance(node.body[0], ast.Pass))
            ):
                found.append(f"{source.shown}:{node.lineno}")
    assert found == []


TEXTS = [
    path
    for folder in (PACKAGE, ROOT / "recipes", ROOT / "docs")
    for path in sorted(folder.rglob("*"))
    if path.suffix in (".py", ".yaml", ".md")
]
MACHINE_PATH = re.compile(r"(?<![\w.<}])/(home|root|Users|work|mnt|scratch|tmp|opt)/\w")
LEFT_OVER = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|raise NotImplementedError")


@pytest.mark.parametrize("pattern", [MACHINE_PATH, LEFT_OVER], ids=["machine paths", "left over"])
def test_texts(pattern: re.Pattern[str]) -> None:
    assert len(TEXTS) > 60
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in TEXTS
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []
