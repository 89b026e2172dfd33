"""The objective of a task follows from how it is answered and by which kind of model."""

from __future__ import annotations

import pytest

from llmkit.errors import ConfigError
from llmkit.objectives.classification import Classification
from llmkit.objectives.for_task import objective_for
from llmkit.objectives.pairing import flops_per_token, misfit
from llmkit.objectives.span_qa import SpanQA
from llmkit.objectives.supervised_lm import SupervisedLM
from llmkit.objectives.supervised_seq2seq import SupervisedSeq2Seq
from llmkit.settings import LossConfig
from tests.unit.models.test_encoder_config import bert
from tests.unit.models.tiny import llama
from tests.unit.models.tiny_seq2seq import t5

LOSS = LossConfig(label_smoothing=0.1, r_drop=0.5, chunk_size=64)
MODELS = {"decoder": llama(), "encoder": bert(), "encoder_decoder": t5()}


@pytest.mark.parametrize(
    ("answers", "kind", "expected"),
    [
        ("class", "decoder", Classification(0.1, 0.5, "decoder")),
        ("class", "encoder", Classification(0.1, 0.5, "encoder")),
        ("class", "encoder_decoder", Classification(0.1, 0.5, "encoder_decoder")),
        ("span", "encoder", SpanQA(0.1, 0.5)),
        ("text", "decoder", SupervisedLM(0.1, 64, 0.5)),
        ("text", "encoder_decoder", SupervisedSeq2Seq(0.1, 64, 0.5)),
    ],
)
def test_every_kind_of_answer(answers: str, kind: str, expected: object) -> None:
    found = objective_for(answers, kind, LOSS)
    assert found == expected
    assert found.trains == (kind,)
    assert found.reads == "rows"
    assert misfit(found, MODELS[kind]) is None
    other = next(model for name, model in MODELS.items() if name != kind)
    assert misfit(found, other) is not None


@pytest.mark.parametrize(("answers", "kind"), [("span", "decoder"), ("text", "encoder"), ("number", "decoder")])
def test_what_no_objective_can_train_is_refused(answers: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"kind {kind} cannot give answers of the kind {answers}"):
        objective_for(answers, kind, LOSS)


def test_a_classifier_spares_the_product_with_the_vocabulary() -> None:
    decoder, encoder = MODELS["decoder"], MODELS["encoder"]
    saved = decoder.flops_per_token(16) - flops_per_token(objective_for("class", "decoder", LOSS), decoder, 16)
    assert saved == 6 * decoder.vocab_rows * decoder.d_model
    saved = encoder.flops_per_token(16) - flops_per_token(objective_for("span", "encoder", LOSS), encoder, 16)
    assert saved == 6 * encoder.head_params()  # type: ignore[attr-defined]
    text = objective_for("text", "decoder", LOSS)
    assert flops_per_token(text, decoder, 16) == decoder.flops_per_token(16)
