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
from llmkit.models.config import DecoderConfig
from tests.unit.models.tiny import GPT2, LLAMA, built, gpt2, llama, random_ids


@st.composite
def configs(draw: st.DrawFn) -> DecoderConfig:
    """Any valid combination of the switches, with odd sizes."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    norm = draw(st.sampled_from(["layernorm", "rmsnorm"]))
    position = draw(st.sampled_from(["learned", "rotary"]))
    flag = st.booleans()
    return DecoderConfig(
        vocab_size=draw(st.integers(2, 99)),
        max_seq_len=draw(st.integers(1, 40)),
        d_model=draw(st.integers(1, 50)),
        n_layers=draw(st.integers(1, 3)),
        n_heads=kv_heads * draw(st.integers(1, 3)),
        n_kv_heads=kv_heads,
        d_head=2 * draw(st.integers(1, 9)),
        d_ff=draw(st.one_of(st.none(), st.integers(1, 90))),
        norm=norm,
        norm_bias=norm == "layernorm" and draw(flag),
        norm_eps=1e-5,
        activation=draw(st.sampled_from(["gelu", "gelu_tanh", "swiglu", "geglu"])),
        position=position,
        rope_theta=1e4 if position == "rotary" else None,
        qk_norm=draw(flag),
        attention_bias=draw(flag),
        mlp_bias=draw(flag),
        dropout=0.0,
        tie_embeddings=draw(flag),
        init_std=0.02,
        residual_init_scale=draw(flag),
    )


def count(config: DecoderConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in config.build().parameters())


@settings(derandomize=True, max_examples=60, deadline=None)
@given(configs())
def test_parameter_counts_equal_a_real_build(config: DecoderConfig) -> None:
    assert config.problems() == []
    assert config.n_params() == count(config)


@pytest.mark.parametrize(
    ("config", "published"),
    [
        # Radford et al. 2019 (the smallest GPT-2 as released) and Dubey et al. 2024 (Llama 3 8B and 70B)
        (gpt2(vocab_size=50257, max_seq_len=1024, d_model=768, n_layers=12, n_heads=12), 124_439_808),
        (
            llama(
                **{"vocab_size": 128256, "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8},
                **{"d_ff": 14336, "tie_embeddings": False},
            ),
            8_030_261_248,
        ),
        (
            llama(
                **{"vocab_size": 128256, "d_model": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8},
                **{"d_ff": 28672, "tie_embeddings": False},
            ),
            70_553_706_496,
        ),
    ],
    ids=["gpt2", "llama3-8b", "llama3-70b"],
)
def test_published_sizes(config: DecoderConfig, published: int) -> None:
    assert config.n_params() == published == count(config)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(configs(), st.integers(1, 2))
def test_flops_equal_what_torch_counts(config: DecoderConfig, batch_size: int) -> None:
    """Attention as two products over the full square; forward and backward."""
    model, seq_len = built(config), config.max_seq_len
    ids = random_ids(config, batch_size, seq_len)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            logits = model(ids)
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    expected = config.flops_per_token(seq_len) * batch_size * seq_len
    assert 3 * forward.get_total_flops() == expected
    assert forward.get_total_flops() + backward.get_total_flops() == expected


def test_embeddings_are_not_counted_as_products_and_a_tied_head_once() -> None:
    tied, untied = llama(tie_embeddings=True), llama(tie_embeddings=False)
    assert tied.flops_per_token(8) == untied.flops_per_token(8)
    assert untied.n_params() - tied.n_params() == 61 * 24
    assert tied.n_params() - tied.n_params_without_embeddings() == 61 * 24
    assert untied.n_params_without_embeddings() == tied.n_params_without_embeddings()


def saved_bytes(config: DecoderConfig, batch_size: int, *, checkpointing: bool) -> int:
    """Bytes that autograd keeps for the backward pass of the hidden states, parameters left out."""
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

    ids = random_ids(config, batch_size, config.max_seq_len)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model._hidden(ids, None, None, None)
    return sum(storages.values())


@pytest.mark.parametrize("changes", [LLAMA, GPT2, {**LLAMA, "n_kv_heads": 2}], ids=["llama", "gpt2", "gqa"])
def test_the_memory_estimate_is_near_what_autograd_keeps(changes: dict[str, Any]) -> None:
    config = DecoderConfig(**{**changes, "d_model": 64, "n_layers": 6, "max_seq_len": 64})
    estimate = config.activation_bytes(4, 64, value_bytes=4, checkpointing=False, logit_rows=0)
    assert 0.75 < estimate / saved_bytes(config, 4, checkpointing=False) < 1.33


def test_checkpointing_keeps_one_input_a_block() -> None:
    config = llama(d_model=64, n_layers=24, max_seq_len=64)
    whole = config.activation_bytes(4, 64, value_bytes=4, checkpointing=False, logit_rows=0)
    less = config.activation_bytes(4, 64, value_bytes=4, checkpointing=True, logit_rows=0)
    kept = saved_bytes(config, 4, checkpointing=True)
    assert kept < less < kept + whole / 24 + 3 * 4 * 64 * 64 * 4  # and one block while it is computed again


def test_null_widths_are_derived() -> None:
    config = llama(d_model=96, n_heads=4)
    assert (config.kv_heads, config.head_width, config.ff_width) == (4, 24, 256)
    assert gpt2(d_model=96).ff_width == 384


def test_the_vocabulary_is_rounded_up_and_never_too_small() -> None:
    assert llama(vocab_size=None).with_vocab(65).vocab_size == 128
    assert llama(vocab_size=None).with_vocab(64).vocab_size == 64
    assert llama(vocab_size=100).with_vocab(100).vocab_size == 100
    with pytest.raises(ConfigError, match="101 ids, the model only 100"):
        llama(vocab_size=100).with_vocab(101)
    with pytest.raises(ConfigError, match="not known yet"):
        llama(vocab_size=None).n_params()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"max_seq_len": 0}, "max_seq_len"),
        ({"d_model": 0}, "d_model"),
        ({"n_layers": -1}, "n_layers"),
        ({"n_heads": 0}, "n_heads"),
        ({"n_heads": 5}, "n_heads"),
        ({"n_kv_heads": 3}, "n_kv_heads"),
        ({"d_head": 0}, "d_head"),
        ({"d_head": 5}, "d_head"),
        ({"d_ff": 0}, "d_ff"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"init_std": 0.0}, "init_std"),
        ({"dropout": 1.0}, "dropout"),
        ({"norm_bias": True}, "norm_bias"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"position": "learned"}, "rope_theta"),
    ],
)
def test_every_bad_value_is_named(changes: dict[str, Any], field: str) -> None:
    assert [name for name, _ in llama(**changes).problems()] == [field]


def test_all_problems_are_listed_at_once() -> None:
    found = llama(n_layers=0, dropout=-0.1, rope_theta=None).problems()
    assert [name for name, _ in found] == ["n_layers", "dropout", "rope_theta"]


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (gpt2(), "GPT2LMHeadModel"),
        (gpt2(activation="gelu", attention_bias=False, norm_bias=False), "GPT2LMHeadModel"),
        (gpt2(n_kv_heads=2), None),
        (gpt2(d_head=8), None),
        (gpt2(activation="swiglu"), None),
        (gpt2(norm="rmsnorm", norm_bias=False), None),
        (gpt2(qk_norm=True), None),
        (llama(), "LlamaForCausalLM"),
        (llama(activation="geglu", attention_bias=True, mlp_bias=True), "LlamaForCausalLM"),
        (llama(activation="gelu"), None),
        (llama(norm="layernorm"), None),
        (llama(d_model=25, d_head=6), None),
        (llama(qk_norm=True), "Qwen3ForCausalLM"),
        (llama(qk_norm=True, d_model=25, d_head=6), "Qwen3ForCausalLM"),
        (llama(qk_norm=True, mlp_bias=True), None),
    ],
)
def test_which_architecture_computes_the_same(config: DecoderConfig, architecture: str | None) -> None:
    assert config.problems() == []
    assert config.hf_architecture() == architecture


def test_a_configuration_is_checked_without_torch() -> None:
    code = (
        "import sys\n"
        "from llmkit.models.config import DecoderConfig\n"
        "from llmkit.objectives.causal_lm import CausalLM\n"
        f"c = DecoderConfig(**{LLAMA!r})\n"
        "assert not c.problems() and c.n_params() and c.flops_per_token(8) and c.hf_architecture()\n"
        "assert not CausalLM(label_smoothing=0.0, z_loss=0.0, chunk_size=None).problems()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_recipes_hold_every_field() -> None:
    for name in ("llama", "gpt2"):
        values = yaml.safe_load((recipes_dir() / "model" / f"{name}.yaml").read_text())
        assert values.pop("_target_") == "llmkit.models.config.DecoderConfig"
        assert values.keys() == {field.name for field in fields(DecoderConfig)}
        assert replace(DecoderConfig(**values), vocab_size=1000).problems() == []
