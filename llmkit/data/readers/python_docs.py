"""``builtin:python_docs``: Python's help topics (``pydoc_data.topics``), then the docstrings of its library."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator

from llmkit.data.readers import stdlib
from llmkit.data.readers.records import BadRow, Chunk, Document, documents
from llmkit.settings import DataConfig

BUILTIN = "python_docs"
_TOPICS = "pydoc_data/topics.py"
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")


def split(path: str, chunk_bytes: int) -> list[Chunk]:
    """The topics, then runs of source files."""
    return [Chunk(path, -1, 0, "python_docs"), *stdlib.split(path, chunk_bytes, "python_docs")]


def read(chunk: Chunk, settings: DataConfig) -> Iterator[Document | BadRow]:
    """``line`` is the place of the text in the chunk."""
    if chunk.start < 0:
        texts = _topics()
    else:
        texts = (text for name in stdlib.sources()[chunk.start : chunk.end] for text in _docstrings(_parse(name)))
    for line, text in enumerate(texts, 1):
        yield from documents(text, line, settings.max_document_bytes)


def _parse(name: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in old modules
        return ast.parse(stdlib.source(name))


def _topics() -> Iterator[str]:
    """The values of the one dictionary in the module; nothing where Python comes without it."""
    if not (stdlib.folder() / _TOPICS).exists():
        return
    for node in _parse(_TOPICS).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from (text.strip() for text in ast.literal_eval(node.value).values() if text.strip())


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a module, its classes and functions at any depth, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = (ast.get_docstring(node) or "").strip()
        if text:
            yield text
    for block in _BLOCKS:  # statements only: no expression holds a docstring, and most nodes are expressions
        for child in getattr(node, block, ()):
            yield from _docstrings(child)
