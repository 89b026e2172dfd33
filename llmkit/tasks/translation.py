"""Translation from one language to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from llmkit.task_interface import Prediction, Question
from llmkit.tasks.encoding import EMPTY_TARGET, text_of
from llmkit.tasks.text_task import TextTask

Scores = tuple[float, float, tuple[str, str]]  # BLEU, chrF, and their signatures
NAMES = {
    **{"ar": "Arabic", "bg": "Bulgarian", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek"},
    **{"en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian", "fi": "Finnish", "fr": "French"},
    **{"he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "it": "Italian"},
    **{"ja": "Japanese", "ko": "Korean", "lt": "Lithuanian", "lv": "Latvian", "nl": "Dutch", "no": "Norwegian"},
    **{"pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sl": "Slovenian"},
    **{"sv": "Swedish", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese"},
}


@dataclass(frozen=True)
class Translation(TextTask):
    """``source`` to ``target``: codes such as ``en``, by which columns are found and languages named in prompts."""

    source: str
    target: str

    name: ClassVar[str] = "translation"
    usual_kind: ClassVar[str] = "encoder_decoder"  # of the small model that is trained where none is given
    placeholders: ClassVar[tuple[str, ...]] = ("text", "source_language", "target_language")
    needed: ClassVar[tuple[str, ...]] = ("text",)
    long_role: ClassVar[str] = "text"
    best_metric: ClassVar[str] = "bleu"

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        found += [(side, "must name a language") for side in ("source", "target") if not getattr(self, side).strip()]
        if self.source == self.target:
            found.append(("target", f"is the language of the source too ({self.source})"))
        return found

    @property
    def roles(self) -> Mapping[str, tuple[str, ...]]:
        """Columns named by the language, inside ``translation`` too, or by the side."""
        return {
            "source": (self.source, f"translation.{self.source}", language(self.source), "src", "source_text", "input"),
            "target": (
                self.target,
                f"translation.{self.target}",
                language(self.target),
                "tgt",
                "target_text",
                "output",
            ),
        }

    def read(self, fields: Mapping[str, Any], *, answered: bool) -> Sequence[Mapping[str, Any]]:
        """``source`` and ``target``."""
        example = {"source": text_of(fields, "source")}
        return [example | {"target": text_of(fields, "target", empty=EMPTY_TARGET)} if answered else example]

    def values(self, question: Question) -> Mapping[str, str]:
        names = {"source_language": language(self.source), "target_language": language(self.target)}
        return {"text": question.fields["source"], **names}

    def targets(self, question: Question) -> Sequence[str]:
        return [question.fields["target"]]

    def metrics(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> dict[str, float]:
        """``bleu`` and ``chrf`` of the whole set, 0 .. 100, as sacreBLEU counts them."""
        bleu, chrf, _ = self._scores(questions, predictions)
        return {"bleu": bleu, "chrf": chrf}

    def details(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> dict[str, Any]:
        """The signatures, without which the scores cannot be compared."""
        return {"signatures": dict(zip(("bleu", "chrf"), self._scores(questions, predictions)[2], strict=True))}

    def _scores(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> Scores:
        from llmkit.metrics.translation import sacre_bleu

        said = [prediction.text.strip() for prediction in predictions]
        return sacre_bleu(said, [[question.fields["target"]] for question in questions], self.target)


def language(code: str) -> str:
    """The English name of a language; the code where it is not known here."""
    return NAMES.get(code.strip().lower(), code.strip())
