"""Python functions from a docstring or an instruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from llmkit.errors import BadExample, DataError
from llmkit.settings import Range
from llmkit.task_interface import Prediction, Question
from llmkit.tasks.code_program import calls_of, extract, is_python, program, tidy, whole_function
from llmkit.tasks.encoding import EMPTY_TARGET, text_of
from llmkit.tasks.text_task import TextTask, mean


@dataclass(frozen=True)
class Code(TextTask):
    """Code for an instruction, which may come with a signature and with tests: statements that raise when it is wrong.

    ``run_code`` runs what the model wrote against the tests, isolated from the machine; ``run_insecure`` runs it also
    where the machine offers no isolation. Without ``run_code`` nothing that a model wrote is ever run.
    """

    run_code: bool
    run_insecure: bool
    timeout_seconds: Annotated[float, Range(0.1)]
    memory_mb: Annotated[int, Range(16)]
    k: list[Annotated[int, Range(1)]]

    name: ClassVar[str] = "code"
    usual_kind: ClassVar[str] = "decoder"  # of the small model that is trained where none is given
    placeholders: ClassVar[tuple[str, ...]] = ("instruction", "signature", "tests")
    needed: ClassVar[tuple[str, ...]] = ("instruction",)
    long_role: ClassVar[str] = "instruction"
    optional: ClassVar[tuple[str, ...]] = ("signature", "tests", "setup", "entry_point")

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        if self.run_insecure and not self.run_code:
            found.append(("run_insecure", "has no meaning without run_code=true"))
        if 1 not in self.k:
            found.append(("k", "must hold 1"))
        return found

    @property
    def roles(self) -> Mapping[str, tuple[str, ...]]:
        return {
            "instruction": ("instruction", "docstring", "prompt", "text", "description", "question", "intent", "nl"),
            "code": ("code", "solution", "output", "response", "completion", "canonical_solution", "snippet", "target"),
            "signature": ("signature", "declaration"),
            "tests": ("tests", "test_list", "test"),
            "setup": ("setup", "test_setup_code", "imports"),
            "entry_point": ("entry_point", "function_name"),
        }

    @property
    def best_metric(self) -> str:
        return "pass_at_1" if self.run_code else "chrf"

    @property
    def n_samples(self) -> int:
        """How many texts a question needs for every k of pass@k."""
        return max(self.k) if self.run_code else 1

    def read(self, fields: Mapping[str, Any], *, answered: bool) -> Sequence[Mapping[str, Any]]:
        """``instruction``, ``signature``, ``setup``, ``entry_point``, ``tests`` and their ``calls`` (lists), and
        ``code`` from its first column on; where it is the body of a function only, with the head of the instruction.
        """
        instruction, tests = text_of(fields, "instruction"), _tests(fields.get("tests"))
        signature, setup, entry_point = (_maybe_text(fields, role) for role in ("signature", "setup", "entry_point"))
        example: dict[str, Any] = {
            "instruction": instruction,
            "signature": signature,
            "setup": setup,
            "entry_point": entry_point,
            "tests": tests,
            "calls": calls_of(tests, entry_point),
        }
        if not answered:
            return [example]
        text_of(fields, "code", empty=EMPTY_TARGET)
        return [example | {"code": whole_function(instruction, fields["code"])}]

    def values(self, question: Question) -> Mapping[str, str]:
        fields = question.fields
        tests = (
            "" if fields["calls"] else "\n".join(fields["tests"])
        )  # functions that test are not for the model to see
        return {"instruction": fields["instruction"], "signature": fields["signature"], "tests": tests}

    def targets(self, question: Question) -> Sequence[str]:
        return [question.fields["code"]]

    def metrics(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> dict[str, float]:
        """``exact_match``, ``valid_syntax`` and ``chrf``, 0 .. 100; where code is run ``pass_at_k``, 0 .. 1.

        Raises ``DataError`` where code is to be run and no question has tests.
        """
        said = [extract(prediction.text) for prediction in predictions]
        wanted = [question.fields["code"] for question in questions]
        found = {
            "exact_match": 100 * mean([float(a == b) for a, b in zip(said, wanted, strict=True)]),
            "valid_syntax": 100 * mean([float(is_python(code)) for code in said]),
            "chrf": _chrf(questions, predictions)[0],
        }
        return found | (self._passed(questions, predictions) if self.run_code and questions else {})

    def details(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> dict[str, Any]:
        """The signature of chrF."""
        return {"signatures": {"chrf": _chrf(questions, predictions)[1]}}

    def _passed(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> dict[str, float]:
        """pass@k (Chen et al. 2021) for every k that the number of samples allows, over questions with tests."""
        from llmkit.code_runner import Limits, run_tests
        from llmkit.metrics.pass_at_k import pass_at_k

        tested = [pair for pair in zip(questions, predictions, strict=True) if pair[0].fields["tests"]]
        if not tested:
            what = "task.run_code=true, but no question has tests"
            raise DataError(what, where="data.columns.tests", fix="name their column, or set task.run_code=false")
        texts = [(said.text, *said.samples) for _, said in tested]
        programs = [program(asked, text) for (asked, _), said in zip(tested, texts, strict=True) for text in said]
        limits = Limits(seconds=self.timeout_seconds, memory_mb=self.memory_mb)
        verdicts = iter(run_tests(programs, limits, self.run_insecure))
        counts = [(len(said), sum(next(verdicts).passed for _ in said)) for said in texts]
        fewest = min(n for n, _ in counts)
        scores = {f"pass_at_{k}": mean([pass_at_k(n, c, k) for n, c in counts]) for k in self.k if k <= fewest}
        return scores | {"n_tested": float(len(tested))}


def _chrf(questions: Sequence[Question], predictions: Sequence[Prediction]) -> tuple[float, str]:
    """chrF and its signature."""
    from llmkit.metrics.translation import sacre_bleu

    said = [extract(prediction.text) for prediction in predictions]
    _, chrf, (_, signature) = sacre_bleu(said, [[question.fields["code"]] for question in questions])
    return chrf, signature


def _maybe_text(fields: Mapping[str, Any], role: str) -> str:
    """An optional text; empty where there is none."""
    value = fields.get(role)
    if value is not None and not isinstance(value, str):
        raise BadExample(f"{role} is not text")
    return (value or "").strip()


def _tests(value: Any) -> list[str]:
    """A text or a list of texts, empty ones left out."""
    items = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise BadExample("tests is not text")
    return [tidy(item) for item in items if item.strip()]
