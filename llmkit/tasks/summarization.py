"""Summaries of documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from llmkit.task_interface import Prediction, Question
from llmkit.tasks.encoding import text_of, texts_of
from llmkit.tasks.text_task import TextTask, mean


@dataclass(frozen=True)
class Summarization(TextTask):
    """A summary in the model's own words. A document may have several; ``train_on`` says which are trained."""

    train_on: Literal["first", "all"]

    name: ClassVar[str] = "summarization"
    usual_kind: ClassVar[str] = "encoder_decoder"  # of the small model that is trained where none is given
    placeholders: ClassVar[tuple[str, ...]] = ("document",)
    needed: ClassVar[tuple[str, ...]] = ("document",)
    long_role: ClassVar[str] = "document"
    best_metric: ClassVar[str] = "rougeL"

    @property
    def roles(self) -> Mapping[str, tuple[str, ...]]:
        return {
            "document": ("document", "article", "dialogue", "source", "text", "body", "content", "abstract"),
            "summary": ("summary", "summaries", "highlights", "tldr", "target", "headline", "title"),
        }

    def read(self, fields: Mapping[str, Any], *, answered: bool) -> Sequence[Mapping[str, Any]]:
        """``document``, and ``summary``, a list."""
        example = {"document": text_of(fields, "document")}
        return [example | {"summary": texts_of(fields, "summary")} if answered else example]

    def values(self, question: Question) -> Mapping[str, str]:
        return {"document": question.fields["document"]}

    def targets(self, question: Question) -> Sequence[str]:
        summaries: list[str] = question.fields["summary"]
        return summaries[:1] if self.train_on == "first" else summaries

    def metrics(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> dict[str, float]:
        """ROUGE, 0 .. 100, best over the references, and the mean lengths in words of predictions and references."""
        from llmkit.metrics.rouge import rouge

        said = [prediction.text.strip() for prediction in predictions]
        references: list[list[str]] = [question.fields["summary"] for question in questions]
        words = mean([len(text.split()) for text in said])
        wanted = mean([mean([len(text.split()) for text in texts]) for texts in references])
        lengths = {"words": words, "reference_words": wanted, "length_ratio": words / wanted if wanted else 0.0}
        return {**rouge(said, references), **lengths}

    def answer_score(self, question: Question, prediction: Prediction) -> float:
        """ROUGE-L of the summary, 0 .. 100."""
        return self.metrics([question], [prediction])["rougeL"]
