"""Which objective trains which kind of model for which kind of answer."""

from __future__ import annotations

from llmkit.errors import ConfigError
from llmkit.interfaces import Objective
from llmkit.objectives.classification import Classification
from llmkit.objectives.span_qa import SpanQA
from llmkit.objectives.supervised_lm import SupervisedLM
from llmkit.objectives.supervised_seq2seq import SupervisedSeq2Seq
from llmkit.settings import LossConfig

KINDS = ("decoder", "encoder", "encoder_decoder")


def objective_for(answers: str, kind: str, loss: LossConfig) -> Objective:
    """``answers`` is what ``Task.answers`` says: ``class``, ``span`` or ``text``; ``kind`` is the model's.

    Raises ``ConfigError`` where no objective fits: spans are found by encoders, and encoders write no text.
    """
    if answers == "class" and kind in KINDS:
        return Classification(label_smoothing=loss.label_smoothing, r_drop=loss.r_drop, kind=kind)
    if (answers, kind) == ("span", "encoder"):
        return SpanQA(label_smoothing=loss.label_smoothing, r_drop=loss.r_drop)
    if (answers, kind) == ("text", "decoder"):
        return SupervisedLM(label_smoothing=loss.label_smoothing, chunk_size=loss.chunk_size, r_drop=loss.r_drop)
    if (answers, kind) == ("text", "encoder_decoder"):
        return SupervisedSeq2Seq(label_smoothing=loss.label_smoothing, chunk_size=loss.chunk_size, r_drop=loss.r_drop)
    raise ConfigError(f"a model of the kind {kind} cannot give answers of the kind {answers}", where="task")
