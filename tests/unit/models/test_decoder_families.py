"""What decoder families read from ``config.json``: the published values, the defaults, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from llmkit.errors import CheckpointError
from llmkit.models.config import DecoderConfig
from llmkit.models.hf.families import family_named, family_of
from llmkit.models.hf.family import Family, Keys
from tests.parity.odd_decoders import FAMILIES as ODD
from tests.unit.models.tiny import gpt2, llama

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


def read(model_type: str, **keys: Any) -> DecoderConfig:
    config = family_named(model_type, "here").read(Keys({**SIZES, **keys}))
    assert isinstance(config, DecoderConfig)
    return config


def fields(config: DecoderConfig, *names: str) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in names)


# -- rotary positions -----------------------------------------------------------------------------------------------

ROTARY = ("rope_theta", "rope_scaling", "max_seq_len")
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
OURS3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_len": 8192}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (10000.0, None, 2048)),
        ({"rope_theta": 5e5}, (5e5, None, 2048)),
        ({"rope_theta": 5e5, "rope_scaling": None}, (5e5, None, 2048)),
        ({"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "rope_type": "llama3"}}, (5e5, OURS3, 2048)),
        ({"rope_parameters": {**LLAMA3, "rope_type": "llama3", "rope_theta": 5e5}}, (5e5, OURS3, 2048)),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, (1e4, {"type": "linear", "factor": 4.0}, 2048)),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            (1e4, {"type": "dynamic", "factor": 2.0, "original_len": 2048}, 4096),
        ),
        (  # as Qwen says to write it: the length stays that of training
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}},
            (1e4, {"type": "yarn", "factor": 4.0, "original_len": 2048}, 8192),
        ),
        (
            {
                "max_position_embeddings": 8192,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 2048,
                    "attention_factor": None,
                    "truncate": False,
                    "beta_fast": 16,
                },
            },
            (1e4, {"type": "yarn", "factor": 4.0, "original_len": 2048, "truncate": False, "beta_fast": 16.0}, 8192),
        ),
    ],
)
def test_both_spellings_of_rotary_settings(keys: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert fields(read("llama", **keys), *ROTARY) == expected


def test_the_old_object_wins_as_in_transformers() -> None:
    new = {"rope_type": "default", "rope_theta": 7.0}
    config = read("llama", rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters=new)
    assert fields(config, *ROTARY) == (10000.0, {"type": "linear", "factor": 2.0}, 2048)


def test_the_scaling_is_written_in_both_spellings() -> None:
    config = llama(rope_theta=5e5, rope_scaling=OURS3)
    written = family_of(config).write(config)
    assert written["rope_scaling"] == {**LLAMA3, "rope_type": "llama3"}
    assert written["rope_parameters"] == {**LLAMA3, "rope_type": "llama3", "rope_theta": 5e5}
    assert "rope_scaling" not in family_of(llama()).write(llama())


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "longrope", "short_factor": [1.0]}, "rope_type is 'longrope'; llmkit has default, linear"),
        ({"type": "linear", "factor": 2.0, "low_freq_factor": 1.0}, "low_freq_factor is unknown to the rotary type"),
        ({"type": "linear", "factor": "2"}, "factor must be a number"),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2.5}, "must be an integer"),
        ({"type": "yarn", "factor": 2.0, "truncate": 1}, "truncate must be true or false"),
        ({"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 5}, "is 5, but max_position"),
        ({"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ([1], "must be an object"),
    ],
)
def test_rotary_settings_that_are_not_computed_are_refused(rope: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read("llama", rope_scaling=rope)


# -- windows --------------------------------------------------------------------------------------------------------

FULL, WINDOW = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("model_type", "keys", "expected"),
    [
        ("mistral", {}, (4096,)),
        ("mistral", {"sliding_window": None}, None),
        ("phi3", {}, None),
        ("phi3", {"sliding_window": 2047}, (2047,)),
        ("qwen2", {"sliding_window": 5}, None),
        ("qwen2", {"use_sliding_window": True}, None),  # max_window_layers is 28
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 4096)),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 5}, (5,)),
        ("qwen3", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
        ("qwen3", {"use_sliding_window": True, "layer_types": [FULL, WINDOW] * 2}, (None, 4096)),
        ("gemma2", {}, (4096, None)),
        ("gemma2", {"layer_types": [WINDOW, FULL, FULL, WINDOW], "sliding_window": 9}, (9, None, None)),
        ("gemma3_text", {}, (4096,)),  # four layers of a pattern of six
        ("gemma3_text", {"sliding_window_pattern": 2, "sliding_window": 7}, (7, None)),
        ("gemma3_text", {"layer_types": [FULL] * 4}, None),
    ],
)
def test_windows_are_the_shortest_list_that_repeats(model_type: str, keys: dict[str, Any], expected: Any) -> None:
    assert read(model_type, **keys).attention_windows == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layer_types": [FULL]}, "must name the type of each of 4 layers"),
        ({"layer_types": 3}, "must name the type"),
        ({"layer_types": [FULL] * 3 + ["chunked_attention"]}, "has 'chunked_attention'"),
        ({"sliding_window": None}, "sliding_window must be an integer, got None"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ],
)
def test_windows_that_are_not_computed_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read("gemma2", **keys)


# -- the families ---------------------------------------------------------------------------------------------------


def test_gemma_2_as_published() -> None:
    config = read("gemma2", head_dim=256, hidden_act="gelu_pytorch_tanh", query_pre_attn_scalar=144)
    assert fields(config, "norm_position", "activation", "scale_embedding", "tie_embeddings") == (
        "both",
        "geglu_tanh",
        True,
        True,
    )
    assert fields(config, "attention_softcap", "logit_softcap", "attention_scale_dim") == (50.0, 30.0, 144)
    assert read("gemma2", attn_logit_softcapping=None).attention_softcap is None
    assert read("gemma2").attention_scale_dim is None  # 256, the width of a head


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (1e6, 1e4, None)),
        ({"rope_theta": 5e5, "rope_local_base_freq": 3e4}, (5e5, 3e4, None)),
        ({"rope_theta": 3e4, "rope_local_base_freq": 3e4}, (3e4, None, None)),
        (
            {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
            (1e6, 1e4, {"type": "linear", "factor": 8.0}),
        ),
        (
            {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6}}},
            (2e6, 1e4, {"type": "linear", "factor": 8.0}),
        ),
        ({"rope_parameters": {WINDOW: {"rope_type": "default", "rope_theta": 9e3}}}, (1e6, 9e3, None)),
        ({"layer_types": [FULL] * 4}, (1e6, None, None)),
    ],
)
def test_gemma_3_has_two_thetas(keys: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert fields(read("gemma3_text", **keys), "rope_theta", "local_rope_theta", "rope_scaling") == expected


@pytest.mark.parametrize(
    ("model_type", "keys", "message"),
    [
        ("gemma3", {}, "holds an image encoder"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "must hold an object for full_attention"),
        ("gemma3_text", {"rope_parameters": {WINDOW: {"rope_type": "linear"}}}, "rope_type is 'linear'"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "of type linear, which a Phi-3 does not have"),
        ("phi3", {"rope_scaling": {"type": "longrope", "long_factor": []}}, "type is 'longrope'"),
        ("llama", {"sliding_window": 5}, "sliding_window is 5"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("gpt_neox", {"hidden_act": "tanh"}, "hidden_act is 'tanh'"),
    ],
)
def test_what_llmkit_does_not_compute_is_refused(model_type: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(model_type, **keys)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (10000.0, 0.25, True)),
        ({"rotary_pct": 1.0, "rotary_emb_base": 500, "use_parallel_residual": False}, (500.0, 1.0, False)),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}},
            (7.0, 0.5, True),
        ),
    ],
)
def test_neox_has_its_own_names(keys: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert fields(read("gpt_neox", **keys), "rope_theta", "rotary_fraction", "parallel_residual") == expected


def test_defaults_where_a_file_leaves_keys_out() -> None:
    """Those of transformers."""
    assert fields(read("mistral", num_attention_heads=16), "kv_heads", "max_seq_len") == (8, 131072)
    assert fields(read("qwen3"), "head_width", "kv_heads") == (128, 32)
    assert fields(read("gemma2"), "head_width", "kv_heads", "norm_eps") == (256, 4, 1e-6)
    assert read("phi3", partial_rotary_factor=0.75).rotary_fraction == 0.75
    assert (read("phi3").norm_eps, read("olmo2").norm_eps) == (1e-5, 1e-5)
    assert fields(read("qwen2"), "attention_bias", "attention_out_bias") == (True, False)
    assert fields(read("llama", attention_bias=True), "attention_bias", "attention_out_bias") == (True, True)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (llama(), "LlamaForCausalLM"),
        (llama(attention_windows=(4, 4)), "MistralForCausalLM"),
        (llama(d_model=21, d_head=6), "MistralForCausalLM"),  # the width is no multiple of the heads
        (llama(attention_windows=(4,), attention_bias=True, attention_out_bias=True), None),
        (llama(attention_bias=True), "Qwen2ForCausalLM"),
        (llama(attention_bias=True, attention_windows=(None, 4)), "Qwen2ForCausalLM"),
        (llama(attention_bias=True, attention_windows=(3, 4)), None),
        (llama(qk_norm="head"), "Qwen3ForCausalLM"),
        (llama(qk_norm="head", mlp_bias=True), None),
        (llama(qk_norm="all"), None),
        (llama(qk_norm="all", norm_position="post"), "Olmo2ForCausalLM"),
        (llama(norm_position="both", scale_embedding=True), "Gemma2ForCausalLM"),
        (llama(norm_position="both", scale_embedding=True, qk_norm="head"), "Gemma3ForCausalLM"),
        (llama(norm_position="both", scale_embedding=True, qk_norm="head", attention_softcap=5.0), None),
        (llama(norm_position="both"), None),
        (llama(rotary_fraction=0.75, d_head=8), "Phi3ForCausalLM"),
        (llama(attention_scale_dim=6), "LlamaForCausalLM"),  # the width of a head
        (llama(attention_scale_dim=7), None),
        (llama(logit_softcap=5.0), None),
        (gpt2(), "GPT2LMHeadModel"),
        (gpt2(activation="relu", attention_out_bias=False), "GPT2LMHeadModel"),
        (gpt2(position="rotary", rope_theta=1e4), "GPTNeoXForCausalLM"),
        (gpt2(position="rotary", rope_theta=1e4, attention_out_bias=False), None),
        (gpt2(parallel_residual=True), None),
        (gpt2(norm_position="both"), None),
    ],
)
def test_the_architecture_that_computes_the_same(config: DecoderConfig, architecture: str | None) -> None:
    assert config.hf_architecture() == architecture


@pytest.mark.parametrize("name", ODD)
def test_what_a_family_writes_it_reads_the_same(name: str) -> None:
    """Whatever our own key adds, file and model agree: writing what was read changes nothing."""
    for seed in range(200):
        config = ODD[name](seed)
        family = family_of(config)
        again = read_back(family, config)
        assert (family.model_types, again.problems()) == ((name,), [])
        assert family_of(again) is family
        assert read_back(family, again) == again
        assert family.write(again) == family.write(config)


def read_back(family: Family, config: DecoderConfig) -> DecoderConfig:
    again = family.read(Keys(family.write(config)))
    assert isinstance(again, DecoderConfig)
    return again
