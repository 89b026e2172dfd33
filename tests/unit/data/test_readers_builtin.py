"""The embedded corpora, against the imported modules they come from."""

from __future__ import annotations

import asyncio.base_events
import inspect
import json
import pydoc_data.topics
import subprocess
import sys
from functools import cache

from llmkit.data.readers.base import Document, chunks_of, fingerprint, read_chunk
from llmkit.data.readers.stdlib import folder, sources
from tests.unit.data.readers_support import SETTINGS, rows


@cache
def _documents(name: str) -> list[str]:
    found = rows(f"builtin:{name}")
    assert all(isinstance(row, Document) for row in found)
    return [row.text for row in found if isinstance(row, Document)]


def test_python_docs_has_the_size_that_is_promised() -> None:
    texts = _documents("python_docs")
    assert 5000 < len(texts) < 20_000
    assert 1_500_000 < sum(len(text.encode()) for text in texts) < 6_000_000


def test_python_docs_begins_with_every_help_topic() -> None:
    topics = [text.strip() for text in pydoc_data.topics.topics.values()]
    assert _documents("python_docs")[: len(topics)] == topics


def test_python_docs_holds_the_docstrings_of_a_module_in_order() -> None:
    def docs(owner: object) -> list[str]:
        functions = [value for value in vars(owner).values() if inspect.isfunction(value) and value.__doc__]
        return [
            inspect.getdoc(function) or "" for function in sorted(functions, key=lambda f: f.__code__.co_firstlineno)
        ]

    texts, last = _documents("python_docs"), -1
    for doc in (json.__doc__ or "", *docs(json)):
        last = texts.index(doc.strip(), last + 1)
    loop_docs = docs(asyncio.base_events.BaseEventLoop)
    assert len(loop_docs) > 20
    for doc in loop_docs:
        assert doc.strip() in texts


def test_python_source_is_the_library_without_its_tests() -> None:
    texts = _documents("python_source")
    assert (folder() / "json" / "decoder.py").read_text(encoding="utf-8") in texts
    assert sum(len(text) for text in texts) > 5_000_000
    parts = {part for name in sources() for part in name.split("/")}
    assert not parts & {"test", "tests", "site-packages", "__pycache__", "idle_test"}
    assert not any(
        "_sysconfigdata" in name or "/test_" in name for name in sources()
    )  # the former holds this machine's paths


def test_chunks_do_not_matter() -> None:
    chunks = chunks_of(["builtin:python_source"], 1 << 18)
    assert len(chunks) > 10
    parts = [row.text for chunk in chunks for row in read_chunk(chunk, SETTINGS) if isinstance(row, Document)]
    assert parts == _documents("python_source")
    assert list(sources()) == sorted(sources())


def test_nothing_of_the_library_is_imported() -> None:
    code = (
        "import sys; from llmkit.data.readers.base import chunks_of, read_chunk;"
        "from tests.unit.data.readers_support import SETTINGS;"
        "chunks = chunks_of(['builtin:python_docs'], 1 << 20); before = set(sys.modules);"
        "[row for chunk in chunks[:4] for row in read_chunk(chunk, SETTINGS)];"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []


def test_fingerprints_differ() -> None:
    assert fingerprint("builtin:python_docs") == fingerprint("builtin:python_docs")
    assert fingerprint("builtin:python_docs") != fingerprint("builtin:python_source")
