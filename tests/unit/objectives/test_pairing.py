"""What a token costs when some of the tokens are predicted only, counted by hand."""

from __future__ import annotations

import pytest

from llmkit.config.build import build
from llmkit.objectives.pairing import flops_per_token, misfit
from tests.unit.config.helpers import checked

ENCODER = ["model=bert", "model.vocab_size=1000", "model.d_model=64", "model.n_layers=2", "model.n_heads=4"]


@pytest.mark.parametrize(
    ("objective", "pooler", "share"),
    [
        (["objective=masked_lm", "objective.mask_rate=0.25"], "false", 0.25),
        (["objective=next_sentence"], "true", 0.15),
        (["objective=next_sentence", "objective.masked_lm=false"], "true", 0.0),
    ],
)
def test_an_encoder_spares_the_head_of_what_is_not_predicted(objective: list[str], pooler: str, share: float) -> None:
    words = ["tokenizer=wordpiece", "tokenizer.vocab_size=500", f"model.pooler={pooler}"]
    cfg = checked(*ENCODER, *objective, *words)
    D, V, T = 64, 1000, 128
    blocks = 2 * (4 * D * D + 2 * D * 4 * D)
    by_hand = 6 * (blocks + share * (D * D + V * D)) + 12 * 2 * D * T
    assert flops_per_token(build(cfg.objective), build(cfg.model), T) == pytest.approx(by_hand, abs=1)


def test_a_decoder_predicts_every_token() -> None:
    cfg = checked("model=gpt2", "model.vocab_size=5000")
    model = build(cfg.model)
    assert flops_per_token(build(cfg.objective), model, 128) == model.flops_per_token(128)


MASKED = ["model=bert", "model.pooler=false", "objective=masked_lm", "tokenizer=wordpiece"]


@pytest.mark.parametrize(
    ("trained_by", "changes", "said"),
    [
        (MASKED, {"pooler": True}, "does not train the model's head"),
        (["recipe=bert_tiny"], {"pooler": False}, "needs a model with a head"),
        (["recipe=bert_tiny"], {"n_segments": 1}, "two segments"),
        (["model=gpt2"], {}, "kind decoder"),
    ],
)
def test_what_does_not_fit_is_said(trained_by: list[str], changes: dict[str, object], said: str) -> None:
    bert = checked("recipe=bert_tiny")
    problem = misfit(build(checked(*trained_by).objective), build(bert.model | changes))
    assert problem is not None
    assert said in problem[0]
    assert misfit(build(bert.objective), build(bert.model)) is None
