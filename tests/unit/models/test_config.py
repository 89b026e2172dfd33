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
    rotary, flag = draw(st.booleans()), st.booleans()
    norm_position = draw(st.sampled_from(["pre", "post", "both"]))
    windows = draw(st.sampled_from([None, (9,), (3, None), (None, 2, 60)]))
    cap = st.sampled_from([None, 7.5])
    return DecoderConfig(
        vocab_size=draw(st.integers(2, 99)),
        max_seq_len=draw(st.integers(1, 40)),
        d_model=draw(st.integers(1, 50)),
        n_layers=draw(st.integers(1, 3)),
        n_heads=kv_heads * draw(st.integers(1, 3)),
        n_kv_heads=kv_heads,
        d_head=4 * draw(st.integers(1, 5)),
        d_ff=draw(st.one_of(st.none(), st.integers(1, 90))),
        norm=norm,
        norm_bias=norm == "layernorm" and draw(flag),
        norm_eps=1e-5,
        norm_position=norm_position,
        parallel_residual=norm_position == "pre" and draw(flag),
        activation=draw(st.sampled_from(["gelu", "gelu_tanh", "relu", "silu", "swiglu", "reglu", "geglu_tanh"])),
        position="rotary" if rotary else "learned",
        rope_theta=1e4 if rotary else None,
        rotary_fraction=draw(st.sampled_from([0.5, 1.0])) if rotary else 1.0,
        local_rope_theta=draw(st.sampled_from([None, 1e3])) if rotary and windows else None,
        rope_scaling=draw(st.sampled_from([None, {"type": "linear", "factor": 2.0}])) if rotary else None,
        attention_windows=windows,
        qk_norm=draw(st.sampled_from([None, "head", "all"])),
        attention_bias=draw(flag),
        attention_out_bias=draw(flag),
        attention_scale_dim=draw(st.sampled_from([None, 5])),
        scale_attention_by_layer=draw(flag),
        attention_softcap=draw(cap),
        logit_softcap=draw(cap),
        scale_embedding=draw(flag),
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
    """Attention as two products over the full square; forward and backward. Windows are computed over it here."""
    config = replace(config, attention_windows=None, local_rope_theta=None)
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


def test_layers_with_a_window_count_the_keys_they_see() -> None:
    whole = llama(n_layers=5)
    mixed = replace(whole, attention_windows=(4, None, 16))  # layers of 4, all, 16, 4, all
    keys = (8 - 4) + (8 - 4)  # fewer, in a sequence of 8
    assert whole.flops_per_token(8) - mixed.flops_per_token(8) == 12 * whole.n_heads * whole.head_width * keys
    assert whole.n_params() == mixed.n_params()
    assert mixed.layer_windows == (4, None, 16, 4, None)


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


ESTIMATED: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "gqa": {**LLAMA, "n_kv_heads": 2},
    "gemma": {**LLAMA, "norm_position": "both", "qk_norm": "head", "activation": "geglu_tanh"},
    "olmo": {**LLAMA, "norm_position": "post", "qk_norm": "all"},
    "neox": {**GPT2, "parallel_residual": True, "attention_windows": (8,)},
    "capped": {**LLAMA, "attention_softcap": 5.0, "dropout": 1e-9},
    "capped_narrow": {**LLAMA, "attention_softcap": 5.0, "n_heads": 8},
}


@pytest.mark.parametrize("changes", ESTIMATED.values(), ids=ESTIMATED)
def test_the_memory_estimate_is_near_what_autograd_keeps(changes: dict[str, Any]) -> None:
    config = DecoderConfig(**{**changes, "d_model": 64, "n_layers": 6, "max_seq_len": 64})
    estimate = config.activation_bytes(4, 64, value_bytes=4, checkpointing=False, logit_rows=0)
    assert 0.75 < estimate / saved_bytes(config, 4, checkpointing=False) < 1.33


def test_capped_logits_hold_their_slopes_too() -> None:
    plain, capped = (
        llama(logit_softcap=cap).activation_bytes(1, 8, value_bytes=2, checkpointing=False, logit_rows=100)
        for cap in (None, 30.0)
    )
    assert capped - plain == 100 * 61 * 4


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
        ({"parallel_residual": True, "norm_position": "both"}, "parallel_residual"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"position": "learned"}, "rope_theta"),
        ({"position": "learned", "rope_theta": None, "local_rope_theta": 1e4}, "local_rope_theta"),
        ({"position": "learned", "rope_theta": None, "rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"position": "learned", "rope_theta": None, "rotary_fraction": 0.5}, "rotary_fraction"),
        ({"rotary_fraction": 0.0}, "rotary_fraction"),
        ({"rotary_fraction": 1.1}, "rotary_fraction"),
        ({"rotary_fraction": 0.1}, "rotary_fraction"),
        ({"rotary_fraction": 0.5}, "rotary_fraction"),  # 3 of 6 dimensions
        ({"local_rope_theta": 1e4}, "local_rope_theta"),
        ({"local_rope_theta": 1e4, "attention_windows": (None,)}, "local_rope_theta"),
        ({"local_rope_theta": 0.5, "attention_windows": (4,)}, "local_rope_theta"),
        ({"attention_windows": ()}, "attention_windows"),
        ({"attention_windows": (None, 0)}, "attention_windows"),
        ({"attention_scale_dim": 0}, "attention_scale_dim"),
        ({"attention_softcap": 0.0}, "attention_softcap"),
        ({"logit_softcap": float("nan")}, "logit_softcap"),
        ({"rope_scaling": {}}, "rope_scaling"),
    ],
)
def test_every_bad_value_is_named(changes: dict[str, Any], field: str) -> None:
    assert [name for name, _ in llama(**changes).problems()] == [field]


def test_all_problems_are_listed_at_once() -> None:
    found = llama(n_layers=0, dropout=-0.1, rope_theta=None).problems()
    assert [name for name, _ in found] == ["n_layers", "dropout", "rope_theta"]


YARN = {"type": "yarn", "factor": 4.0, "original_len": 64}
LLAMA3 = {"type": "llama3", "factor": 8.0, "original_len": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"factor": 2.0}, "needs a type"),
        ({"type": "longrope", "factor": 2.0}, "needs a type: one of linear, dynamic, llama3, yarn"),
        ({"type": "linear"}, "needs factor"),
        ({"type": "dynamic", "factor": 2.0}, "needs original_len"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 1.0}, "has no beta_fast"),
        ({"type": "linear", "factor": 0.5}, "wrong factor: it must be at least 1"),
        ({"type": "linear", "factor": "2"}, "wrong factor: it must be a number"),
        ({"type": "linear", "factor": float("inf")}, "wrong factor: it must be a number"),
        ({"type": "linear", "factor": True}, "wrong factor: it must be a number"),
        ({**YARN, "original_len": 64.5}, "wrong original_len: it must be a whole number"),
        ({**YARN, "original_len": 0}, "wrong original_len: it must be at least 1"),
        ({**YARN, "truncate": 1}, "wrong truncate: it must be true or false"),
        ({**YARN, "mscale": 0.0}, "wrong mscale: it must be above 0"),
        ({**YARN, "beta_slow": 40.0}, "beta_slow below its beta_fast"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor below its high_freq_factor"),
    ],
)
def test_every_bad_rope_scaling_is_named(scaling: dict[str, Any], message: str) -> None:
    (problem,) = llama(rope_scaling=scaling).problems()
    assert problem[0] == "rope_scaling"
    assert message in problem[1]


def test_good_rope_scalings_have_no_problems() -> None:
    linear = {"type": "linear", "factor": 1, "original_len": 16}
    yarn = {**YARN, "attention_factor": 1.2, "mscale": 1, "mscale_all_dim": 0.8, "beta_fast": 16, "truncate": False}
    for scaling in (linear, YARN, yarn, LLAMA3):
        assert llama(rope_scaling=scaling).problems() == []
    dynamic = {"type": "dynamic", "factor": 2.0, "original_len": 16}
    assert llama(rope_scaling=dynamic).problems() == []
    assert "at least 4 rotated" in llama(rope_scaling=dynamic, d_head=2).problems()[0][1]


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (gpt2(), "GPT2LMHeadModel"),
        (gpt2(activation="gelu", attention_bias=False, attention_out_bias=False, norm_bias=False), "GPT2LMHeadModel"),
        (gpt2(n_kv_heads=2), None),
        (gpt2(d_head=8), None),
        (gpt2(attention_scale_dim=1, scale_attention_by_layer=True), "GPT2LMHeadModel"),
        (gpt2(attention_scale_dim=2), None),
        (llama(scale_attention_by_layer=True), None),
        (gpt2(activation="swiglu"), None),
        (gpt2(norm="rmsnorm", norm_bias=False), None),
        (gpt2(qk_norm="head"), None),
        (llama(), "LlamaForCausalLM"),
        (llama(activation="geglu", attention_bias=True, attention_out_bias=True, mlp_bias=True), "LlamaForCausalLM"),
        (llama(activation="gelu"), None),
        (llama(norm="layernorm"), None),
        (llama(d_model=25, d_head=6), "MistralForCausalLM"),
        (llama(qk_norm="head"), "Qwen3ForCausalLM"),
        (llama(qk_norm="head", d_model=25, d_head=6), "Qwen3ForCausalLM"),
        (llama(qk_norm="head", mlp_bias=True), None),
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
