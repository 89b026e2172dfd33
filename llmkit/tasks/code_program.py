"""From an answer and the tests of a row to a program that ends without an error when the answer is right."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Sequence

from llmkit.errors import BadExample
from llmkit.task_interface import Question

_FENCED = re.compile(r"(?:```|~~~)[^\n`]*\n(.*?)(?:\n(?:```|~~~)|\Z)", re.DOTALL)
_SEAM = re.compile(r"\A (?=\S)")  # the space between a prompt and its answer
_DEFINES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)


def program(question: Question, text: str) -> str:
    """What is run: what the model wrote, the setup of the tests, which may use it (so in MBPP), and the tests.

    An empty line stands behind the answer, so that nothing at its end can swallow the first test.
    """
    fields = question.fields
    code = extract(text)
    if fields["entry_point"] and not re.search(rf"\bdef\s+{re.escape(fields['entry_point'])}\b", code):
        code = whole_function(fields["instruction"], text)
    return "\n".join([code, "", *filter(None, [fields["setup"]]), *fields["tests"], *fields["calls"], ""])


def extract(text: str) -> str:
    """The code in what a model wrote: its first fenced block, else all of it, without the one space before it."""
    block = _FENCED.search(text)
    return tidy(block[1] if block else _SEAM.sub("", text))


def tidy(code: str) -> str:
    """With ``\\n`` as line ends, from the first column on, without blank lines around it."""
    return textwrap.dedent(code.replace("\r\n", "\n").replace("\r", "\n")).strip()


def is_python(code: str) -> bool:
    """Whether it is a module, not an empty one, that the compiler takes. Nothing is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(code, "answer", "exec", dont_inherit=True)
            return bool(ast.parse(code).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def whole_function(head: str, code: str) -> str:
    """``code`` by itself where it is a module; where it is the body of a function that ``head`` begins, both.

    HumanEval (Chen et al. 2021) has its solutions so. What is neither stays as it is.
    """
    alone = tidy(code)
    if is_python(alone):
        return alone
    body = code.replace("\r\n", "\n").replace("\r", "\n").strip("\n")
    shapes = (body, f"    {body.strip()}", textwrap.indent(alone, "    "))
    joined = (f"{head.rstrip()}\n{shape}" for shape in shapes)
    return next((tidy(function) for function in joined if is_python(tidy(function))), alone)


def calls_of(tests: Sequence[str], entry_point: str) -> list[str]:
    """What has to stand behind tests that only define functions: ``check`` of HumanEval, which is given the function
    to be tested, and the ``test...`` functions of pytest. Raises ``BadExample`` for tests that would run nothing.
    """
    try:
        body = ast.parse("\n".join(tests)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []  # the program will fail, and say so
    run = [node for node in body if not _only_defines(node)]
    if run or not body:
        return []
    functions = {node.name: node.args for node in body if isinstance(node, ast.FunctionDef)}
    calls = [f"check({entry_point})"] if "check" in functions and entry_point else []
    calls += [f"{name}()" for name, args in functions.items() if name.startswith("test") and not args.args]
    if not calls:
        raise BadExample("tests that run nothing")
    return calls


def _only_defines(node: ast.stmt) -> bool:
    """Also a docstring, and what is left out of an import: ``if __name__ == "__main__"``."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.If):
        return any(isinstance(part, ast.Name) and part.id == "__name__" for part in ast.walk(node.test))
    return isinstance(node, _DEFINES)
