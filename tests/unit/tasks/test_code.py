"""Code: prompts, what is taken out of an answer, and what is run."""

from __future__ import annotations

import pytest

from llmkit.errors import BadExample
from llmkit.task_interface import Question
from llmkit.tasks.code_program import calls_of, extract, is_python, program, tidy
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
        "entry_point": "",
        "tests": ["assert add(1, 2) == 3"],
        "calls": [],
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
        ("~~~python\nx = 1\n~~~", "x = 1"),
        ("```py title=a.py\nx\n```", "x"),
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


@pytest.mark.parametrize(
    "code", ["", "# nothing", "x = ", "def f(:", "x\0y", "(" * 1000, "-" * 100_000 + "1", "é =", "return 1"]
)
def test_no_python(code: str) -> None:
    assert not is_python(code)


def test_a_program_is_answer_setup_and_tests() -> None:
    question = ask(task("code"), **RECORD)
    text = "```python\ndef add(a, b):\n    return a + b\n```"
    assert program(question, text).splitlines() == [
        *("def add(a, b):", "    return a + b", "", "import math", "assert add(1, 2) == 3")
    ]
    bare = Question({"setup": "", "tests": ["assert 1", "assert 2"], "entry_point": "", "calls": []}, "", 0)
    assert program(bare, "x").splitlines() == ["x", "", "assert 1", "assert 2"]


HUMAN_EVAL = {
    "prompt": 'def half(n: int) -> int:\n    """Half of n."""\n',
    "canonical_solution": "    rest = n % 2\n    return (n - rest) // 2\n",
    "test": "METADATA = {}\n\ndef check(candidate):\n    assert candidate(5) == 2\n",
    "entry_point": "half",
}


def test_rows_of_the_shape_of_human_eval() -> None:
    """The function to be tested is given to ``check``; bodies get their head; the model does not see the tests."""
    job = task("code")
    columns = {role: next(name for name in names if name in HUMAN_EVAL) for role, names in job.roles.items()
               if any(name in HUMAN_EVAL for name in names)}  # fmt: skip
    question = ask(job, **{role: HUMAN_EVAL[column] for role, column in columns.items()})
    assert question.fields["code"].startswith("def half(n: int)")
    assert "check" not in job.filled(question, "decoder").text
    right = ["rest = n % 2\n    return (n - rest) // 2", "    return n // 2\n", "return n // 2"]
    right += [question.fields["code"], "```python\ndef half(n):\n    return n // 2\n```"]
    for text in right:
        exec(compile(program(question, text), "right", "exec"), {})
    for text in ("", "    return n", "def half(n):\n    return n", "pass", "x = ("):
        with pytest.raises((AssertionError, NameError, SyntaxError)):
            exec(compile(program(question, text), "wrong", "exec"), {})


def test_tests_that_would_run_nothing() -> None:
    assert calls_of(
        ["def test_a():\n    assert f(1)", "def test_b(x=1):\n    pass", "def helper():\n    pass"], ""
    ) == ["test_a()"]
    assert calls_of(["def check(c):\n    assert c(1)", "check(f)"], "f") == calls_of([], "f") == []
    for tests in (
        ["def check(c):\n    assert c(1)"],
        ["import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        assert f(1)"],
        ["def helper():\n    pass\nif __name__ == '__main__':\n    assert f(1)"],
    ):
        with pytest.raises(BadExample, match="tests that run nothing"):
            calls_of(tests, "")


def test_the_end_of_an_answer_swallows_no_test() -> None:
    question = ask(task("code"), **(RECORD | {"setup": ""}))
    with pytest.raises(IndentationError):
        compile(program(question, "if 0: \\"), "answer", "exec")


def test_settings_of_running() -> None:
    assert (task("code").best_metric, task("code").n_samples) == ("chrf", 1)
    job = task("code", run_code=True, k=[1, 5])
    assert (job.best_metric, job.n_samples) == ("pass_at_1", 5)
    assert task("code", run_insecure=True).problems() == [("run_insecure", "has no meaning without run_code=true")]
    assert task("code", k=[5]).problems() == [("k", "must hold 1")]
