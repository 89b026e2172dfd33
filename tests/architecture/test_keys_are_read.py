"""Every key that a configuration may hold is read by something.

A read is an attribute access whose object has, by the type checker's own inference, the class that declares the field.
Accesses that only show or judge a value do not count: the plan of a dry run, and ``problems`` methods.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import sys
from functools import cache
from pathlib import Path
from typing import get_type_hints

import pytest

from llmkit.config.schema import ROOTS
from llmkit.config.targets import config_fields, resolve
from tests.architecture.source import PACKAGE, SOURCES
from tests.architecture.test_yaml_fields import TARGETS

N_KEYS = 382
NOT_A_USE = ("llmkit.commands.plan", "llmkit.config")  # modules that show or judge values
JUDGING = ("problems", "__post_init__")


def declared() -> set[tuple[str, str]]:
    """(class, field) of every key: root dataclasses, their sections, and the classes of the packaged nodes."""
    found = set()
    for root in ROOTS.values():
        for cls in (root, *(hint for hint in get_type_hints(root).values() if dataclasses.is_dataclass(hint))):
            found |= {(f"{cls.__module__}.{cls.__qualname__}", field.name) for field in dataclasses.fields(cls)}
    for target in TARGETS:
        found |= {(target, name) for name in config_fields(resolve(target))[0]}
    return found


@cache
def reads(folder: Path = PACKAGE) -> frozenset[tuple[str, str]]:
    """(class, attribute) of every attribute access in the package that counts."""
    from mypy import build
    from mypy.find_sources import create_source_list
    from mypy.nodes import MypyFile
    from mypy.options import Options
    from mypy.traverser import NameAndMemberCollector
    from mypy.types import Instance, UnionType, get_proper_type

    options = Options()
    options.export_types = options.preserve_asts = options.check_untyped_defs = options.ignore_missing_imports = True
    options.incremental, options.cache_dir, options.follow_imports = False, os.devnull, "skip"
    options.python_version = sys.version_info[:2]
    result = build.build(create_source_list([str(folder)], options), options)
    found = set()
    for module, file in result.files.items():
        if not isinstance(file, MypyFile) or module.startswith(NOT_A_USE) or not module.startswith("llmkit"):
            continue
        judging = judging_lines(module)
        collector = NameAndMemberCollector()
        file.accept(collector)
        for access in collector.member_exprs:
            kind = get_proper_type(result.types.get(access.expr))
            for part in kind.items if isinstance(kind, UnionType) else [kind]:
                instance = get_proper_type(part)
                if isinstance(instance, Instance) and access.line not in judging:
                    found |= {(cls.fullname, access.name) for cls in instance.type.mro}
    return frozenset(found)


def judging_lines(module: str) -> set[int]:
    (tree,) = (source.tree for source in SOURCES if source.module == module)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in JUDGING]
    return {line for node in functions for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def inherited(key: tuple[str, str]) -> set[tuple[str, str]]:
    """The field of a class under the names of its bases, whose methods may read it."""
    cls = resolve(key[0]) if key[0] in TARGETS else None
    return {(f"{base.__module__}.{base.__qualname__}", key[1]) for base in cls.__mro__} if cls else {key}


def test_every_key_is_read() -> None:
    used = reads()
    assert {key for key in declared() if not inherited(key) & used} == set()


def test_none_was_overlooked() -> None:
    assert len(declared()) == N_KEYS


def test_the_finder_tells_a_read_from_a_namesake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``other.seed`` of another class, ``problems`` and an assignment by keyword are no reads."""
    package = tmp_path / "llmkit"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "part.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    used: int\n    seed: int\n    judged: int\n"
        "    def problems(self) -> bool:\n        return self.judged > 0\n"
        "@dataclass\nclass B:\n    seed: int\n"
        "def f(a: A | None, b: B) -> int:\n"
        "    return (a.used if a else 0) + b.seed + A(used=1, seed=2, judged=3).used\n"
    )
    from tests.architecture import source

    monkeypatch.setattr(source, "ROOT", tmp_path)
    monkeypatch.setattr("tests.architecture.test_keys_are_read.SOURCES", source.read_sources(package))
    found = {key for key in reads(package) if key[0].startswith("llmkit.part")}
    assert found == {("llmkit.part.A", "used"), ("llmkit.part.B", "seed")}
