"""Depths of parameters in every family, frozen layers, and learning rates that shrink with the depth."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from llmkit.errors import ConfigError
from llmkit.models.adapter_config import LoraConfig
from llmkit.models.adapters import attach
from llmkit.models.freezing import depths, freeze, lr_scales
from llmkit.models.head_config import HeadConfig
from llmkit.models.heads import attach_head
from tests.unit.models import tiny_seq2seq, wrapped
from tests.unit.models.lstm_reference import lstm, seq2seq
from tests.unit.models.test_encoder_config import bert, electra, modern
from tests.unit.models.tiny import gpt2, llama

# model -> (layers, parameters of depth 0, of the first layer, of the second, and above all layers: beginnings of names)
OURS: dict[str, tuple[Any, int, dict[int, tuple[str, ...]]]] = {
    "gpt2": (
        gpt2(),
        2,
        {0: ("embedding.", "position_embedding."), 1: ("blocks.0.",), 2: ("blocks.1.",), 3: ("norm.",)},
    ),
    "llama untied": (
        llama(tie_embeddings=False),
        2,
        {0: ("embedding.",), 1: ("blocks.0.",), 2: ("blocks.1.",), 3: ("norm.", "head.")},
    ),
    "bert": (
        bert(),
        2,
        {
            0: ("embedding.", "position_embedding.", "segment_embedding.", "embedding_norm."),
            1: ("blocks.0.",),
            2: ("blocks.1.",),
            3: ("transform.", "output_bias", "pooler.", "pair_head."),
        },
    ),
    "electra": (
        electra(),
        2,
        {
            0: ("embedding", "position_embedding.", "segment_embedding."),
            1: ("blocks.0.",),
            2: ("blocks.1.",),
            3: ("transform.", "output_bias"),
        },
    ),
    "modernbert": (
        modern(),
        4,
        {0: ("embedding",), 1: ("blocks.0.",), 4: ("blocks.3.",), 5: ("norm.", "transform.", "output_bias")},
    ),
    "albert": (bert(share_layers=True, n_layers=5), 1, {1: ("blocks.0.",)}),
    "t5": (
        tiny_seq2seq.t5(),
        5,
        {
            0: ("embedding.", "encoder.position_bias.", "decoder.position_bias."),
            1: ("encoder.blocks.0.",),
            2: ("encoder.blocks.1.",),
            3: ("decoder.blocks.0.",),
            5: ("decoder.blocks.2.",),
            6: ("encoder.norm.", "decoder.norm."),
        },
    ),
    "lstm": (lstm(), 2, {0: ("embedding.",), 1: ("lstm.layers.0.",), 2: ("lstm.layers.1.",), 3: ("attention.",)}),
    "lstm_seq2seq": (
        seq2seq(),
        4,
        {
            0: ("embedding.",),
            1: ("encoder.onward.0.", "encoder.back.0."),
            2: ("encoder.onward.1.", "encoder.back.1."),
            3: ("decoder.layers.0.",),
            4: ("decoder.layers.1.",),
            5: ("attention.",),
        },
    ),
}


def at_depth(model: nn.Module, depth: int) -> set[str]:
    return {name for name, found in depths(model)[0].items() if found == depth}


@pytest.mark.parametrize("name", OURS)
def test_depths(name: str) -> None:
    config, n_layers, beginnings = OURS[name]
    model: nn.Module = config.build()
    assert depths(model)[1] == n_layers
    for depth, starts in beginnings.items():
        expected = {n for n, _ in model.named_parameters() if n.startswith(starts)}
        assert at_depth(model, depth) == expected != set()


@pytest.mark.parametrize(
    ("name", "n_layers", "first", "above"),
    [
        ("windows", 2, "hf.transformer.h.0.", "hf.transformer.ln_f."),
        ("positions from the mask", 2, "hf.model.decoder.layers.0.", "hf.model.decoder.project_out."),
        ("transform", 2, "hf.distilbert.transformer.layer.0.", "hf.vocab_"),
        ("relative", 4, "hf.encoder.block.0.", "hf.encoder.final_layer_norm."),
    ],
)
def test_depths_of_wrapped_models(name: str, n_layers: int, first: str, above: str) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    model = wrapped.built(wrapped.ALL[name])
    names = [n for n, _ in model.named_parameters()]
    assert depths(model)[1] == n_layers
    assert at_depth(model, 1) == {n for n in names if n.startswith(first)} != set()
    assert at_depth(model, n_layers + 1) >= {n for n in names if n.startswith(above)} != set()
    assert any("embed" in n or "wte" in n or "shared" in n for n in at_depth(model, 0))


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("n_layers", [0, 1, 2])
def test_freeze(n_layers: int, embeddings: bool) -> None:
    model: Any = bert().build()
    attach_head(model, HeadConfig("class", ("a", "b")), seed=0)
    before = trained(model)
    frozen = {name for name, depth in depths(model)[0].items() if (embeddings if depth == 0 else depth <= n_layers)}
    n = sum(p.numel() for name, p in model.named_parameters() if name in frozen & before)
    assert freeze(model, n_layers, embeddings) == n
    assert trained(model) == before - frozen
    assert {f"task_head.{name}" for name, _ in model.task_head.named_parameters()} <= trained(model)


def test_adapters_on_frozen_layers_are_frozen() -> None:
    model: Any = llama().build()
    attach(model, LoraConfig(2, 4, 0.0, ["q"], False, False, False, False), seed=0)
    assert freeze(model, 1, True) == 4 * model.config.d_model
    assert trained(model) == {"blocks.1.attention.q.lora_A", "blocks.1.attention.q.lora_B"}


@pytest.mark.parametrize("n", [-1, 3])
def test_too_many_layers(n: int) -> None:
    with pytest.raises(ConfigError, match="2 layers"):
        freeze(gpt2().build(), n, False)


def test_rates_shrink_towards_the_embeddings() -> None:
    scales = lr_scales(gpt2().build(), 0.5)
    assert scales["norm.weight"] == 1
    assert scales["blocks.1.attention.q.weight"] == 0.5
    assert scales["blocks.0.mlp.up.bias"] == 0.25
    assert scales["embedding.weight"] == scales["position_embedding.weight"] == 0.125
    assert set(lr_scales(gpt2().build(), 1.0).values()) == {1.0}
