"""Counts against real builds and torch's own counter, published sizes, and the checks of a configuration."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llmkit.config.compose import recipes_dir
from llmkit.errors import ConfigError
from llmkit.models.encoder_decoder_config import EncoderDecoderConfig
from tests.unit.models.tiny_seq2seq import BART, T5, T5_GATED, bart, batch_of, built, marian, random_ids, t5, whole

ACTIVATIONS = ["relu", "gelu", "gelu_tanh", "silu", "reglu", "geglu", "geglu_tanh", "swiglu"]


@st.composite
def configs(draw: st.DrawFn) -> EncoderDecoderConfig:
    """Any valid combination of the switches, with odd sizes."""
    flag, position = st.booleans(), draw(st.sampled_from(["relative", "learned", "sinusoidal"]))
    norm, buckets = draw(st.sampled_from(["layernorm", "rmsnorm"])), draw(st.integers(4, 20))
    return EncoderDecoderConfig(
        vocab_size=draw(st.integers(2, 99)),
        max_seq_len=draw(st.integers(2, 30)),
        d_model=draw(st.integers(1, 50)),
        n_layers=draw(st.integers(1, 3)),
        n_decoder_layers=draw(st.one_of(st.none(), st.integers(1, 3))),
        n_heads=draw(st.integers(1, 3)),
        d_head=draw(st.integers(1, 9)),
        d_ff=draw(st.one_of(st.none(), st.integers(1, 90))),
        norm=norm,
        norm_bias=norm == "layernorm" and draw(flag),
        norm_eps=1e-5,
        norm_position=draw(st.sampled_from(["pre", "post"])),
        embedding_norm=draw(flag),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        position=position,
        n_position_buckets=buckets if position == "relative" else None,
        max_position_distance=buckets + 1 if position == "relative" else None,
        scale_embedding=draw(flag),
        scale_attention=draw(flag),
        scale_logits=draw(flag),
        attention_bias=draw(flag),
        mlp_bias=draw(flag),
        head_bias=draw(flag),
        dropout=0.0,
        attention_dropout=None,
        tie_embeddings=draw(flag),
        init_std=draw(st.sampled_from([None, 0.02])),
        start_id=draw(st.sampled_from([None, 1])),
    )


def count(config: EncoderDecoderConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in config.build().parameters())


@settings(derandomize=True, max_examples=60, deadline=None)
@given(configs())
def test_parameter_counts_equal_a_real_build(config: EncoderDecoderConfig) -> None:
    assert config.problems() == []
    assert config.n_params() == count(config)


T5_SMALL: dict[str, Any] = {
    **{"vocab_size": 32128, "d_model": 512, "n_layers": 6, "n_decoder_layers": 6, "n_heads": 8, "d_head": 64},
    **{"d_ff": 2048, "n_position_buckets": 32, "max_position_distance": 128, "max_seq_len": 512},
}
BART_BASE: dict[str, Any] = {
    **{"vocab_size": 50265, "d_model": 768, "n_layers": 6, "n_decoder_layers": 6, "n_heads": 12, "d_ff": 3072},
    **{"max_seq_len": 1024},
}


def test_published_sizes() -> None:
    """T5-small has 60.5 M parameters and its v1.1 77.0 M (Raffel et al. 2020, and the released files); BART-base 139 M.

    Of BART's file the two rows before each position table are not parameters here, and the bias of the logits is one.
    """
    assert t5(**T5_SMALL).n_params() == 60_506_624
    gated = {**T5_SMALL, "n_layers": 8, "n_decoder_layers": 8, "n_heads": 6, "d_ff": 1024}
    assert EncoderDecoderConfig(**{**T5_GATED, **gated}).n_params() == 76_961_152
    assert bart(**BART_BASE).n_params() == 139_420_416 - 2 * 2 * 768 + 50265


@settings(derandomize=True, max_examples=25, deadline=None)
@given(configs(), st.integers(1, 2), st.integers(2, 30))
def test_flops_equal_what_torch_counts(config: EncoderDecoderConfig, batch_size: int, target_len: int) -> None:
    """Attention as two products over full rectangles; forward and backward."""
    S, T = config.max_seq_len, min(target_len, config.max_seq_len)
    model = built(config)
    source, target = whole(random_ids(config, batch_size, S)), random_ids(config, batch_size, T)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            logits = model(source, target)
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    total = forward.get_total_flops() + backward.get_total_flops()
    assert total == 3 * forward.get_total_flops()
    assert total // batch_size // (S + T) == config.flops_per_token(S, T)


def test_embeddings_are_not_counted_as_products_and_a_tied_head_once() -> None:
    tied, untied = t5(), t5(tie_embeddings=False)
    assert tied.flops_per_token(8, 4) == untied.flops_per_token(8, 4)
    assert tied.matmul_params() == untied.matmul_params()
    assert untied.n_params() - tied.n_params() == 61 * 24
    assert tied.n_params() - tied.n_params_without_embeddings() == 61 * 24 + 2 * 8 * 4
    assert bart().n_params() - bart().n_params_without_embeddings() == 61 * 24 + 2 * 40 * 24 + 61


def saved_bytes(config: EncoderDecoderConfig, target_len: int, *, checkpointing: bool) -> int:
    """Bytes that autograd keeps for the backward pass of the hidden states of 4 rows, parameters left out."""
    model = built(config)
    model.set_activation_checkpointing(checkpointing)
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no address is used twice
        return tensor

    batch = batch_of(whole(random_ids(config, 4, config.max_seq_len)), whole(random_ids(config, 4, target_len)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden_states(batch)
    return sum(storages.values())


LARGER: dict[str, Any] = {"d_model": 64, "n_layers": 5, "n_decoder_layers": 4, "d_head": 16, "d_ff": 160}


@pytest.mark.parametrize("target_len", [64, 16])
@pytest.mark.parametrize("style", [T5, T5_GATED, BART], ids=["t5", "t5_gated", "bart"])
def test_the_memory_estimate_is_near_what_autograd_keeps(style: dict[str, Any], target_len: int) -> None:
    config = EncoderDecoderConfig(**{**style, **LARGER, "max_seq_len": 64})
    whole_, less = (
        config.activation_bytes(4, 64, value_bytes=4, checkpointing=on, logit_rows=0, target_len=target_len)
        for on in (False, True)
    )
    assert 0.75 < whole_ / saved_bytes(config, target_len, checkpointing=False) < 1.33
    kept = saved_bytes(config, target_len, checkpointing=True)
    assert kept < less < kept + whole_ / 3
    assert config.activation_bytes(4, 64, value_bytes=4, checkpointing=False, logit_rows=0) >= whole_


def test_null_widths_are_derived() -> None:
    config = bart(d_model=96, n_heads=4, d_ff=None, n_decoder_layers=None)
    assert (config.head_width, config.ff_width, config.decoder_layers) == (24, 384, 2)
    assert t5(d_model=96, d_ff=None, activation="geglu_tanh").ff_width == 256


def test_the_vocabulary_is_rounded_up_and_never_too_small() -> None:
    assert t5(vocab_size=None).with_vocab(65).vocab_size == 128
    with pytest.raises(ConfigError, match="101 ids, the model only 100"):
        t5(vocab_size=100).with_vocab(101)
    with pytest.raises(ConfigError, match="not known yet"):
        t5(vocab_size=None).n_params()


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (t5(vocab_size=0), "vocab_size"),
        (t5(attention_dropout=1.0), "attention_dropout"),
        (t5(max_seq_len=0), "max_seq_len"),
        (t5(d_model=0), "d_model"),
        (t5(n_layers=0), "n_layers"),
        (t5(n_decoder_layers=0), "n_decoder_layers"),
        (t5(n_heads=0), "n_heads"),
        (t5(d_head=None, n_heads=5), "n_heads"),
        (t5(d_head=0), "d_head"),
        (t5(d_ff=0), "d_ff"),
        (t5(norm_eps=float("nan")), "norm_eps"),
        (t5(init_std=0.0), "init_std"),
        (t5(dropout=1.0), "dropout"),
        (bart(start_id=61), "start_id"),
        (bart(start_id=-1), "start_id"),
        (t5(norm_bias=True), "norm_bias"),
        (t5(n_position_buckets=None), "n_position_buckets"),
        (t5(n_position_buckets=3), "n_position_buckets"),
        (t5(max_position_distance=None), "max_position_distance"),
        (t5(max_position_distance=4), "max_position_distance"),
        (bart(n_position_buckets=8), "n_position_buckets"),
        (marian(max_position_distance=8), "max_position_distance"),
    ],
)
def test_every_bad_value_is_named(config: EncoderDecoderConfig, field: str) -> None:
    assert [name for name, _ in config.problems()] == [field]


def test_all_problems_are_listed_at_once() -> None:
    found = t5(n_layers=0, dropout=-0.1, n_position_buckets=1, norm_bias=True).problems()
    assert [name for name, _ in found] == ["n_layers", "dropout", "n_position_buckets", "norm_bias"]


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (t5(), "T5ForConditionalGeneration"),
        (EncoderDecoderConfig(**T5_GATED), "T5ForConditionalGeneration"),
        (t5(tie_embeddings=False), None),
        (t5(scale_logits=False), None),
        (t5(activation="geglu"), "T5ForConditionalGeneration"),
        (t5(attention_dropout=0.1), None),
        (t5(mlp_bias=True), None),
        (t5(scale_attention=True), None),
        (t5(norm_position="post"), None),
        (bart(), "BartForConditionalGeneration"),
        (bart(start_id=2), "BartForConditionalGeneration"),
        (bart(head_bias=False, attention_bias=False, norm_bias=False), "BartForConditionalGeneration"),
        (bart(tie_embeddings=False), None),
        (bart(norm_eps=1e-6), None),
        (bart(d_head=5), None),
        (bart(embedding_norm=False), None),
        (bart(activation="swiglu"), None),
        (marian(), "MarianMTModel"),
        (marian(embedding_norm=True), None),
        (marian(norm_position="pre"), None),
    ],
)
def test_which_architecture_computes_the_same(config: EncoderDecoderConfig, architecture: str | None) -> None:
    assert config.problems() == []
    assert config.hf_architecture() == architecture


def test_a_configuration_is_checked_without_torch() -> None:
    code = (
        "import sys\n"
        "from llmkit.models.encoder_decoder_config import EncoderDecoderConfig\n"
        f"c = EncoderDecoderConfig(**{T5!r})\n"
        "assert not c.problems() and c.n_params() and c.flops_per_token(8, 4) and c.hf_architecture()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "architecture"), [("t5", "T5ForConditionalGeneration"), ("bart", "BartForConditionalGeneration")]
)
def test_the_recipes_hold_every_field(name: str, architecture: str) -> None:
    values = yaml.safe_load((recipes_dir() / "model" / f"{name}.yaml").read_text())
    assert values.pop("_target_") == "llmkit.models.encoder_decoder_config.EncoderDecoderConfig"
    assert values.keys() == {field.name for field in fields(EncoderDecoderConfig)}
    config = replace(EncoderDecoderConfig(**values), vocab_size=1000)
    assert config.problems() == []
    assert config.hf_architecture() == architecture


def test_the_comment_on_marian_holds() -> None:
    values = yaml.safe_load((recipes_dir() / "model" / "bart.yaml").read_text())
    del values["_target_"]
    changes = {"position": "sinusoidal", "embedding_norm": False, "scale_embedding": True, "activation": "silu"}
    assert EncoderDecoderConfig(**{**values, **changes, "vocab_size": 1000}).hf_architecture() == "MarianMTModel"
