"""Summaries and functions from the running interpreter's standard library, which is read and parsed, never imported.

Only its public modules of one file, and short texts of theirs: more than enough for a demonstration, and parsed in a
moment. What is found therefore depends on the version of Python.
"""

from __future__ import annotations

import ast
import textwrap
import warnings
from collections.abc import Iterator
from itertools import dropwhile
from typing import Any, NamedTuple

from llmkit.data.readers import stdlib

_SUMMARY_WORDS = range(4, 26)
_DOCUMENT_CHARACTERS = range(120, 801)
_DOCSTRING_CHARACTERS = range(30, 501)
_BODY_LINES = range(2, 17)  # of a function, without its docstring

_Owner = ast.Module | ast.ClassDef | ast.FunctionDef


class _Documented(NamedTuple):
    """A module, class or function with a docstring."""

    node: _Owner
    docstring: str
    lines: list[str]  # of the file
    place: str  # " file:line"


def summaries() -> Iterator[tuple[dict[str, Any], str]]:
    """``document``, what a docstring explains, and ``summary``, its first line; with where it stands.

    Only docstrings whose first line is a sentence on its own and whose rest has no examples to run.
    """
    seen: set[str] = set()
    for found in _documented():
        summary, _, rest = found.docstring.partition("\n\n")
        document = rest.strip()
        if not _is_sentence(summary) or len(document) not in _DOCUMENT_CHARACTERS or ">>>" in document:
            continue
        if document not in seen:
            seen.add(document)
            yield {"document": document, "summary": summary}, found.place


def functions() -> Iterator[tuple[dict[str, Any], str]]:
    """``instruction``, a docstring, ``signature``, and ``code``, the function without the docstring; with its place.

    Methods are written from the first column on, as functions. Nothing with decorators, which would be left out.
    """
    seen: set[tuple[str, str]] = set()
    for found in _documented():
        if len(found.docstring) not in _DOCSTRING_CHARACTERS or not isinstance(found.node, ast.FunctionDef):
            continue
        parts = _without_docstring(found.node, found.lines)
        if parts is None or (found.docstring, parts[0]) in seen:
            continue
        seen.add((found.docstring, parts[0]))
        yield {"instruction": found.docstring, "signature": parts[0], "code": parts[1]}, found.place


def _documented() -> Iterator[_Documented]:
    """In the order of the files and of their lines."""
    for name in stdlib.sources():
        if "/" in name or name.startswith("_"):
            continue
        text = stdlib.source(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old modules
            tree = ast.parse(text)
        lines = text.split("\n")
        for node in _owners(tree):
            docstring = (ast.get_docstring(node) or "").strip()
            if docstring:
                yield _Documented(node, docstring, lines, f" {name}:{getattr(node, 'lineno', 1)}")


def _owners(node: ast.Module | ast.ClassDef) -> Iterator[_Owner]:
    """A module or class, and the classes and functions directly inside at any depth; none inside a function."""
    yield node
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _owners(child)
        elif isinstance(child, ast.FunctionDef):
            yield child


def _is_sentence(line: str) -> bool:
    words = line.split()
    return "\n" not in line and len(words) in _SUMMARY_WORDS and line.endswith(".") and words[0].isalpha()


def _without_docstring(node: ast.FunctionDef, lines: list[str]) -> tuple[str, str] | None:
    """The signature and the whole function without its docstring, from the first column on.

    None where one of them shares a line with what follows, for functions of another size, and for decorated ones.
    """
    docstring, *rest = node.body
    end = docstring.end_lineno or docstring.lineno
    if not rest or node.decorator_list or docstring.lineno == node.lineno or rest[0].lineno <= end:
        return None
    head, body = lines[node.lineno - 1 : docstring.lineno - 1], lines[end : node.end_lineno]
    body = list(dropwhile(lambda line: not line.strip(), body))
    if len(body) not in _BODY_LINES:
        return None
    code = textwrap.dedent("\n".join([*head, *body])).rstrip()
    signature = "\n".join(code.split("\n")[: len(head)])
    return (signature, code) if _is_one_function(code) and signature.endswith(":") else None


def _is_one_function(code: str) -> bool:
    """False where a text of several lines stands further left than the function, so that it cannot be moved."""
    try:
        body = ast.parse(code).body
    except SyntaxError:
        return False
    return len(body) == 1 and isinstance(body[0], ast.FunctionDef)
