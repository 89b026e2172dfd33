"""Imports go downward only, and parts that stand side by side do not know one another."""

from __future__ import annotations

import ast

import pytest

from tests.architecture.source import SOURCES, Source, imported_modules

# From the top. Names in one row never import each other.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("commands",),
    ("engine", "config"),
    ("models", "objectives", "tasks", "tokenizers", "data", "generation", "mask_filling", "tracking"),
    ("metrics", "seq2seq_generation", "gguf_file", "code_runner"),
    ("task_interface",),
    ("interfaces",),
    ("safe_files",),
    ("settings", "errors", "redact", ""),
)
LAYER = {name: depth for depth, row in enumerate(LAYERS) for name in row}


def part_of(module: str) -> str:
    """``llmkit.engine.optim`` belongs to ``engine``; the package itself is ``""``."""
    return module.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.module)
def test_imports_go_down(source: Source) -> None:
    own = part_of(source.module)
    assert own in LAYER, f"{own} has no place in the layers"
    for module in imported_modules(source):
        part = part_of(module)
        assert part == own or LAYER[part] > LAYER[own], f"{source.module} must not import {module}"


def test_no_relative_imports() -> None:
    relative = [
        source.module
        for source in SOURCES
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


def test_no_cycles() -> None:
    """Over the imports at the top of the modules; one inside a function can close no cycle at import time."""
    top = {source.module: top_level_imports(source) for source in SOURCES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for other in top.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in top:
        visit(module, ())


def top_level_imports(source: Source) -> set[str]:
    body = [node for node in source.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    top = Source(source.path, source.module, source.text, ast.Module(body, []))
    return imported_modules(top) - {source.module, "llmkit"}
