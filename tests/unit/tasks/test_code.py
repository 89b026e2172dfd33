"""Code: prompts, what is taken out of an answer, and what is run."""

from __future__ import annotations

import pytest

from llmkit.task_interface import Question
from llmkit.tasks.code import extract, is_python, program, tidy
from tests.unit.tasks.support import PatternTokenizer, ask, task, written

RECORD = {
    "instruction": "Add two numbers.",
    "code": "\r\n  def add(a, b):\r\n      return a + b\r\n",
    "tests": ["assert add(1, 2) == 3", " "],
    "setup": "import math",
}


def test_a_record_is_tidied() -> None:
    question = ask(task("code"), **RECORD)
    assert question.fields == {
        "instruction": "Add two numbers.",
        "signature": "",
        "setup": "import math",
        "tests": ["assert add(1, 2) == 3"],
        "code": "def add(a, b):\n    return a + b",
    }


def test_prompts_leave_out_what_a_record_lacks() -> None:
    job = task("code")
    assert job.filled(ask(job, **RECORD), "decoder").text == '"""\nAdd two numbers.\nassert add(1, 2) == 3\n"""\n'
    bare = {"instruction": "Add.", "code": "x", "signature": "def add(a, b):"}
    assert job.filled(ask(job, **bare), "encoder_decoder").text == "Add.\ndef add(a, b):\n"


def test_the_row_ends_in_the_code() -> None:
    job, tokenizer = task("code"), PatternTokenizer(r"\n|[^\n ]+| +")
    (row,) = job.rows(ask(job, **RECORD), tokenizer, "decoder", 99, cut=False)
    assert written(row, tokenizer) == "def add(a, b):\n    return a + b"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (" def f():\n    pass\n", "def f():\n    pass"),
        ("Here:\n```python\nx = 1\n```\nand more", "x = 1"),
        ("```\n  x = 1\n  y = 2", "x = 1\ny = 2"),
        ("```py\nx\n```\n```py\ny\n```", "x"),
        ("x = '```'", "x = '```'"),
        ("", ""),
    ],
)
def test_what_is_taken_out_of_an_answer(text: str, code: str) -> None:
    assert extract(text) == code


def test_tidy_keeps_the_shape() -> None:
    assert tidy("\n\n    if x:\r\n        y\r    z  \n") == "if x:\n    y\nz"


@pytest.mark.parametrize("code", ["x = 1", "def f():\n  return '\\d'", "x is 1"])
def test_python(code: str) -> None:
    assert is_python(code)


@pytest.mark.parametrize("code", ["", "# nothing", "x = ", "def f(:", "x\0y", "(" * 1000, "-" * 100_000 + "1", "é ="])
def test_no_python(code: str) -> None:
    assert not is_python(code)


def test_a_program_is_answer_setup_and_tests() -> None:
    question = ask(task("code"), **RECORD)
    text = "```python\ndef add(a, b):\n    return a + b\n```"
    assert program(question, text).splitlines() == [
        *("def add(a, b):", "    return a + b", "import math", "assert add(1, 2) == 3")
    ]
    bare = Question({"setup": "", "tests": ["assert 1", "assert 2"]}, "", 0)
    assert program(bare, "x").splitlines() == ["x", "assert 1", "assert 2"]


def test_settings_of_running() -> None:
    assert (task("code").best_metric, task("code").n_samples) == ("chrf", 1)
    job = task("code", run_code=True, k=[1, 5])
    assert (job.best_metric, job.n_samples) == ("pass_at_1", 5)
    assert task("code", run_insecure=True).problems() == [("run_insecure", "has no meaning without run_code=true")]
    assert task("code", k=[5]).problems() == [("k", "must hold 1")]
