"""The demo sets: as large as their README says, without repeats, and right in what can be checked."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tomllib
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llmkit.data import demo
from llmkit.data.demo import library
from llmkit.data.readers import stdlib
from llmkit.data.task_questions import load_questions
from llmkit.data.task_records import Record, read_records
from llmkit.errors import DataError
from tests.unit.data.task_support import settings
from tests.unit.tasks.support import task

TASKS = ("sentiment", "qa", "summarization", "translation", "code", "chat")
FOLDER = Path(demo.__file__).parent


RECORDS = demo.records


@cache
def found(name: str) -> list[tuple[Mapping[str, Any], str]]:
    """Read once: the standard library is large."""
    return list(RECORDS(name))


def rows(name: str) -> list[Mapping[str, Any]]:
    return [fields for fields, _ in found(name)]


@cache
def asked(name: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(context, question) of every question of a set in the form of SQuAD."""
    paragraphs = [paragraph for article in rows(name) for paragraph in article["paragraphs"]]
    return [(paragraph["context"], each) for paragraph in paragraphs for each in paragraph["qas"]]


def spoken(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    return [message for message in messages if message["role"] != "system"]


def texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [text for one in inner for text in texts(one)]


# -- what a task makes of them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_tasks_run_on_them_as_their_recipes_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 questions or more, not one of them bad or repeated, and a part for validation that training does not ask."""
    monkeypatch.setattr(demo, "records", found)
    questions = load_questions(task(name), settings(None, val_fraction=0.1))
    report = questions.report
    assert len(questions.train) + len(questions.val) >= 200
    assert len(questions.val) >= 10
    assert (report.files[0].bad.total, report.n_repeated, report.n_shared) == (0, 0, 0)
    assert all(re.fullmatch(rf"builtin:{name}.*:\d+(, example \d+)?", question.where) for question in questions.train)


def test_questions_without_an_answer_need_version_2() -> None:
    every = settings("builtin:qa_v2")
    questions = load_questions(task("qa", unanswerable=True), every, split=False).train
    without = sum(not question.fields["answers"] for question in questions)
    assert 0.13 < without / len(questions) < 0.17
    with pytest.raises(DataError, match=f"{without} of {len(questions)} records of builtin:qa_v2 cannot be used"):
        load_questions(task("qa"), every)


def test_questions_on_one_text_stay_together() -> None:
    questions = load_questions(task("qa"), settings(None, val_fraction=0.2))
    contexts = [{question.fields["context"] for question in part} for part in (questions.train, questions.val)]
    assert not contexts[0] & contexts[1]


# -- what is in the files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sentiment", "qa_v2", "translation", "chat"])
def test_texts_are_clean(name: str) -> None:
    every = [text for row in rows(name) for text in texts(row)]
    assert [text for text in every if text != text.strip() or "  " in text or not text] == []
    assert [text for text in every if re.search("[^\\w\\s.,;:!?'\"()/%°=+*\\[\\]-]", text)] == []


def test_sentiment_is_balanced_and_mixed() -> None:
    labels = [row["label"] for row in rows("sentiment")]
    assert set(Counter(labels).values()) == {len(labels) / 3}
    assert min(Counter(labels[:100]).values()) > 20  # data.max_rows=100 has some of each
    assert len({row["text"].casefold() for row in rows("sentiment")}) == len(labels)


def test_answers_stand_where_they_are_said_to() -> None:
    for context, question in asked("qa_v2"):
        assert bool(question["answers"]) != question["is_impossible"]
        for answer in question["answers"]:
            end = answer["answer_start"] + len(answer["text"])
            assert context[answer["answer_start"] : end] == answer["text"]
            around = context[answer["answer_start"] - 1 : end + 1] if answer["answer_start"] else context[: end + 1]
            assert re.search(rf"(?<!\w){re.escape(answer['text'])}(?!\w)", around), "an answer is not a part of a word"


def test_questions_are_told_apart() -> None:
    for key in ("id", "question"):
        assert len({question[key] for _, question in asked("qa_v2")}) == len(asked("qa_v2"))
    assert {context for context, _ in asked("qa")} == {context for context, _ in asked("qa_v2")}


def test_both_sides_of_a_translation_end_alike() -> None:
    pairs = [(row["en"], row["de"]) for row in rows("translation")]
    assert [pair for pair in pairs if pair[0][-1] != pair[1][-1] or pair[0][-1] not in ".?!"] == []
    assert all(len({pair[side] for pair in pairs}) == len(pairs) for side in (0, 1))
    assert all(0.5 < len(english) / len(german) < 2 for english, german in pairs)


def test_conversations_have_turns_in_order() -> None:
    conversations = [row["messages"] for row in rows("chat")]
    for messages in conversations:
        assert [message["role"] for message in spoken(messages)] == ["user", "assistant"] * (len(spoken(messages)) // 2)
        assert messages[0]["role"] in ("system", "user")
    assert {len(spoken(messages)) for messages in conversations} == {2, 4, 6}
    assert 0.2 < sum(messages[0]["role"] == "system" for messages in conversations) / len(conversations) < 0.3
    assert len({spoken(messages)[0]["content"] for messages in conversations}) == len(conversations)


def test_counts_in_the_readme() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    n_system = sum(row["messages"][0]["role"] == "system" for row in rows("chat"))
    n_negative = sum(row["label"] == "negative" for row in rows("sentiment"))
    for text in (
        f"{len(rows('sentiment'))} texts, {n_negative} of each label",
        f"{len(asked('qa'))} questions on {len(rows('qa'))} short texts",
        f"{len(asked('qa_v2')) - len(asked('qa'))} questions without an answer",
        f"{len(rows('translation'))} sentences",
        f"{len(rows('chat'))} conversations of 2 to 6 turns, {n_system} with a system message",
    ):
        assert text in readme


# -- the standard library -------------------------------------------------------------------------------------------


def test_summaries_are_the_first_lines_of_docstrings() -> None:
    by_place = {where: fields for fields, where in found("summarization")}
    assert len(by_place) == len(rows("summarization")) > 200
    checked = 0
    for name in ("abc", "shutil", "textwrap", "dis"):
        for value in vars(importlib.import_module(name)).values():
            if inspect.isfunction(value) and value.__module__ == name:
                row = by_place.get(f"builtin:summarization {name}.py:{value.__code__.co_firstlineno}")
                if row:
                    checked += 1
                    docstring = inspect.getdoc(value) or ""
                    assert docstring.split() == (row["summary"] + "\n\n" + row["document"]).split()
    assert checked >= 5


def test_functions_are_those_of_the_library_without_their_docstrings() -> None:
    assert len(rows("code")) > 500
    assert len({where for _, where in found("code")}) == len(found("code"))
    checked = 0
    for name in ("difflib.py", "shutil.py", "socket.py", "textwrap.py", "zipapp.py"):
        originals = {node.lineno: node for node in ast.walk(parsed(name)) if isinstance(node, ast.FunctionDef)}
        for fields, where in found("code"):
            if where.startswith(f"builtin:code {name}:"):
                checked += 1
                check_function(fields, originals[int(where.rpartition(":")[2])])
    assert checked > 30


def parsed(name: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(stdlib.source(name))


def check_function(fields: Mapping[str, Any], original: ast.FunctionDef) -> None:
    assert (ast.get_docstring(original) or "").strip() == fields["instruction"]
    del original.body[0]
    (function,) = ast.parse(fields["code"]).body
    assert ast.dump(function) == ast.dump(original)
    assert fields["code"].startswith(fields["signature"] + "\n")
    assert fields["signature"].endswith(":")


WANTED = '''
class Shape:
    """A form."""
    def area(self, scale: float = 1.0) -> float:
        """Return the area of the shape, scaled by a factor."""

        # by the usual rule
        side = self.side * scale
        return side * side

    @property
    def large(self):
        """Return whether the shape is large, by its area."""
        found = self.area()
        return found > 100

    def short(self):
        """Return the short name of the shape, in capitals."""
        return self.name
    def same(self): "Return the shape itself, whatever its form."; a = self; return a
    def message(self):
        """Return the lines that are shown to everybody."""
        return """
left of it
"""
    def outer(self):
        """Return a function that tells the name of the shape."""
        def inner():
            """Return the name, of the outer function's shape."""
            name = self.name
            return name
        return inner
'''


def test_what_is_taken_from_a_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not: decorated, too short, on one line, with text that cannot be moved to the left, inside another function."""
    for name in ("shapes.py", "_private.py", "again.py", "package/inner.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(WANTED)
    monkeypatch.setattr(stdlib, "folder", lambda: tmp_path)
    monkeypatch.setattr(stdlib, "sources", lambda: ("_private.py", "package/inner.py", "again.py", "shapes.py"))
    area, outer = library.functions()  # once, although two public files have them
    assert area == (
        {
            "instruction": "Return the area of the shape, scaled by a factor.",
            "signature": "def area(self, scale: float = 1.0) -> float:",
            "code": "def area(self, scale: float = 1.0) -> float:\n    # by the usual rule\n"
            "    side = self.side * scale\n    return side * side",
        },
        " again.py:4",
    )
    assert outer[0]["code"].count("def ") == 2


def test_which_docstrings_are_summaries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    body = "It goes on to say in many words what the first line has said in few. " * 3
    firsts = [
        "Return the sum of all.",
        "Sum up.",
        "Return the sum of all",
        "Return the sum\n of all.",
        "Give all of it.",
    ]
    docstrings = [f"{first}\n\n{body}{n}" for n, first in enumerate(firsts)]
    docstrings += [docstrings[0], f"Show how it is called.\n\n{body}\n>>> f()", "Say it in a few words.\n\nOnly."]
    source = "\n".join(f"def f{n}():\n    {text!r}" for n, text in enumerate(docstrings))
    (tmp_path / "a.py").write_text(source)
    monkeypatch.setattr(stdlib, "folder", lambda: tmp_path)
    monkeypatch.setattr(stdlib, "sources", lambda: ("a.py",))
    taken = list(library.summaries())
    assert [(fields["summary"], place) for fields, place in taken] == [(firsts[0], " a.py:1"), (firsts[4], " a.py:9")]
    assert taken[0][0]["document"] == f"{body}0"


# -- files and names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sentiment", "qa", "qa_v2", "translation", "chat"])
def test_records_come_in_one_order(name: str) -> None:
    again = list(read_records(f"builtin:{name}", None, settings(None)))
    assert again == [Record(fields, where) for fields, where in found(name)]
    assert len({where for _, where in found(name)}) == len(again)


def test_unknown_set() -> None:
    with pytest.raises(DataError, match="there is no demo set 'builtin:python_docs'") as caught:
        demo.records("python_docs")
    assert all(f"builtin:{name}" in caught.value.fix for name in TASKS)


def test_damaged_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"messages": []}\n{"mess')
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(DataError, match="line 2: broken json") as caught:
        list(demo.records("chat"))
    assert (caught.value.where, caught.value.fix) == ("llmkit/data/demo/chat.jsonl", "install again")


def test_they_are_part_of_the_package() -> None:
    """The wheel takes everything in the package's folder that git does not ignore."""
    root = FOLDER.parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["llmkit"]
    assert not {"exclude", "include", "only-include"} & set(wheel)
    assert {path.name for path in FOLDER.iterdir() if path.suffix in (".jsonl", ".tsv", ".md")} == {
        "README.md", "chat.jsonl", "qa.jsonl", "sentiment.jsonl", "translation.tsv",
    }  # fmt: skip
