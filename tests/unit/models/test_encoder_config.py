"""Counts of an encoder against real builds and torch's own counter, and the checks of its configuration."""

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

from llmkit.config.choices import recipes_dir
from llmkit.errors import ConfigError
from llmkit.models.encoder_config import EncoderConfig
from tests.unit.models.tiny import built, random_ids

BERT: dict[str, Any] = {
    "vocab_size": 61,
    "max_seq_len": 32,
    "d_model": 24,
    "d_embedding": None,
    "n_layers": 2,
    "n_heads": 4,
    "d_ff": None,
    "norm_position": "post",
    "norm_bias": True,
    "norm_eps": 1e-12,
    "activation": "gelu",
    "position": "learned",
    "rope_theta": None,
    "local_rope_theta": None,
    "global_every": 1,
    "local_window": None,
    "n_segments": 2,
    "transform_activation": None,
    "attention_bias": True,
    "mlp_bias": True,
    "transform_bias": True,
    "head_bias": True,
    "pooler": True,
    "share_layers": False,
    "dropout": 0.0,
    "tie_embeddings": True,
    "init_std": 0.02,
    "residual_init_scale": False,
}
MODERN: dict[str, Any] = {
    **BERT,
    "n_layers": 4,
    "norm_position": "pre",
    "norm_bias": False,
    "norm_eps": 1e-5,
    "activation": "geglu",
    "position": "rotary",
    "rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
    "global_every": 3,
    "local_window": 8,
    "n_segments": 0,
    "attention_bias": False,
    "mlp_bias": False,
    "transform_bias": False,
    "pooler": False,
    "residual_init_scale": True,
}


def bert(**changes: Any) -> EncoderConfig:
    return EncoderConfig(**{**BERT, **changes})


def roberta(**changes: Any) -> EncoderConfig:
    return bert(**{"n_segments": 1, "pooler": False, **changes})


def distil(**changes: Any) -> EncoderConfig:
    return bert(**{"n_segments": 0, "pooler": False, **changes})


def electra(**changes: Any) -> EncoderConfig:
    return bert(**{"d_embedding": 14, "pooler": False, **changes})


def modern(**changes: Any) -> EncoderConfig:
    return EncoderConfig(**{**MODERN, **changes})


@st.composite
def encoder_configs(draw: st.DrawFn) -> EncoderConfig:
    """Any valid combination of the switches, with odd sizes."""
    flag, n_heads = st.booleans(), draw(st.integers(1, 4))
    rotary, local = draw(flag), draw(flag)
    return EncoderConfig(
        vocab_size=draw(st.integers(2, 99)),
        max_seq_len=draw(st.integers(1, 40)),
        d_model=n_heads * (2 if rotary else 1) * draw(st.integers(1, 9)),
        d_embedding=draw(st.one_of(st.none(), st.integers(1, 40))),
        n_layers=draw(st.integers(1, 4)),
        n_heads=n_heads,
        d_ff=draw(st.one_of(st.none(), st.integers(1, 90))),
        norm_position=draw(st.sampled_from(["post", "pre"])),
        norm_bias=draw(flag),
        norm_eps=1e-5,
        activation=draw(st.sampled_from(["gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu"])),
        transform_activation=draw(st.sampled_from([None, "gelu", "gelu_tanh", "relu", "silu"])),
        position="rotary" if rotary else "learned",
        rope_theta=1e5 if rotary else None,
        local_rope_theta=draw(st.sampled_from([None, 1e4])) if rotary and local else None,
        global_every=draw(st.integers(2, 4)) if local else 1,
        local_window=draw(st.integers(1, 50)) if local else None,
        n_segments=draw(st.integers(0, 3)),
        attention_bias=draw(flag),
        mlp_bias=draw(flag),
        transform_bias=draw(flag),
        head_bias=draw(flag),
        pooler=draw(flag),
        share_layers=draw(flag),
        dropout=0.0,
        tie_embeddings=draw(flag),
        init_std=0.02,
        residual_init_scale=draw(flag),
    )


def count(config: EncoderConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in config.build().parameters())


@settings(derandomize=True, max_examples=80, deadline=None)
@given(encoder_configs())
def test_parameter_counts_equal_a_real_build(config: EncoderConfig) -> None:
    assert config.problems() == []
    assert config.n_params() == count(config)


BASE: dict[str, Any] = {"d_model": 768, "n_heads": 12, "n_layers": 12}
SMALL: dict[str, Any] = {"d_model": 256, "d_embedding": 128, "n_heads": 4, "n_layers": 12}


@pytest.mark.parametrize(
    ("config", "published"),
    [
        # The released bert-base-uncased with both heads, and roberta-base without the two position rows of no use
        (bert(**BASE, vocab_size=30522, max_seq_len=512), 110_106_428),
        (roberta(**BASE, vocab_size=50265, max_seq_len=512), 124_697_433 - 2 * 768),
        # The released ModernBERT-base
        (modern(**{**BASE, "n_layers": 22}, vocab_size=50368, d_ff=1152), 149_655_232),
        # distilbert-base-uncased and the small ELECTRA generator, as ``transformers`` counts its classes of these sizes
        (distil(**{**BASE, "n_layers": 6}, vocab_size=30522, max_seq_len=512), 66_985_530),
        (electra(**SMALL, vocab_size=30522, max_seq_len=512), 13_546_682),
    ],
    ids=["bert", "roberta", "modernbert", "distilbert", "electra"],
)
def test_published_sizes(config: EncoderConfig, published: int) -> None:
    assert config.n_params() == published == count(config)


def test_a_shared_block_is_stored_once_and_multiplies_n_layers_times() -> None:
    own, shared = (
        bert(n_layers=12, d_model=768, n_heads=12),
        bert(n_layers=12, d_model=768, n_heads=12, share_layers=True),
    )
    block = 12 * 768**2 + 13 * 768
    assert own.n_params() - shared.n_params() == 11 * block
    assert own.n_params_without_embeddings() - shared.n_params_without_embeddings() == 11 * block
    assert own.flops_per_token(8) == shared.flops_per_token(8)


def test_what_counts_as_embedding() -> None:
    """Tables and output head: 61 tokens, 32 positions, 2 segments, 61 biases."""
    config = bert()
    assert config.n_params() - config.n_params_without_embeddings() == (61 + 32 + 2) * 24 + 61
    untied = bert(tie_embeddings=False)
    assert untied.n_params() - config.n_params() == 61 * 24
    assert untied.n_params_without_embeddings() == config.n_params_without_embeddings()


@settings(derandomize=True, max_examples=10, deadline=None)
@given(encoder_configs(), st.integers(1, 2))
def test_flops_equal_what_torch_counts(config: EncoderConfig, batch_size: int) -> None:
    """Attention as two products over the full square; forward and backward. The dense kernel computes all of it."""
    config = replace(config, global_every=1, local_window=None, local_rope_theta=None)
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


@pytest.mark.parametrize(("seq_len", "window", "seen"), [(32, 8, 9), (32, 7, 7), (5, 8, 5), (9, 8, 9), (10, 8, 9)])
def test_a_local_layer_counts_its_window(seq_len: int, window: int, seen: int) -> None:
    """Layers 0 and 3 of five are global; each layer has two products of width 24, forward and twice backward."""
    config = modern(n_layers=5, local_window=window)
    attention = config.flops_per_token(seq_len) - 6 * config.matmul_params()
    assert attention == 3 * 2 * 2 * 24 * (2 * seq_len + 3 * seen)


def saved_bytes(config: EncoderConfig, batch_size: int, *, checkpointing: bool, packed: bool = False) -> int:
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
    documents = (torch.arange(config.max_seq_len) // 20).expand(batch_size, -1) if packed else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model._hidden(ids, None, documents, None)
    return sum(storages.values())


LARGER: dict[str, Any] = {"d_model": 64, "n_layers": 6, "max_seq_len": 64}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "config", [bert(**LARGER), modern(**LARGER), bert(**LARGER, share_layers=True)], ids=["bert", "modern", "shared"]
)
def test_the_memory_estimate_is_near_what_autograd_keeps(config: EncoderConfig, packed: bool) -> None:
    estimate = config.activation_bytes(4, 64, value_bytes=4, checkpointing=False, logit_rows=0)
    assert 0.75 < estimate / saved_bytes(config, 4, checkpointing=False, packed=packed) < 1.33


def test_one_mask_serves_all_layers() -> None:
    """Packed rows cost one square of fp32 more for global layers; and one for local ones."""
    for config, n in ((bert(**LARGER), 1), (modern(**LARGER), 2)):
        alone, packed = (saved_bytes(config, 4, checkpointing=False, packed=packed) for packed in (False, True))
        assert packed - alone <= n * 4 * 64 * 64 * 4


@pytest.mark.parametrize("config", [bert(d_model=64, n_layers=24, max_seq_len=64), modern(d_model=64, n_layers=24)])
def test_checkpointing_keeps_one_input_a_block(config: EncoderConfig) -> None:
    config = replace(config, max_seq_len=64)
    whole = config.activation_bytes(4, 64, value_bytes=4, checkpointing=False, logit_rows=0)
    less = config.activation_bytes(4, 64, value_bytes=4, checkpointing=True, logit_rows=0)
    kept = saved_bytes(config, 4, checkpointing=True, packed=True)
    assert kept < less < kept + whole / 24 + 3 * 4 * 64 * 64 * 4  # and one block while it is computed again


def test_logits_count_in_the_memory() -> None:
    arguments: dict[str, Any] = {"value_bytes": 2, "checkpointing": False}
    with_logits, without = (bert().activation_bytes(1, 8, **arguments, logit_rows=n) for n in (10, 0))
    assert with_logits - without == 10 * 61 * 6


def test_null_widths_are_derived_and_the_vocabulary_is_rounded_up() -> None:
    assert (bert(d_model=96).head_width, bert(d_model=96).ff_width, modern(d_model=96).ff_width) == (24, 384, 256)
    assert bert(vocab_size=None).with_vocab(65).vocab_size == 128
    with pytest.raises(ConfigError, match="101 ids, the model only 100"):
        bert(vocab_size=100).with_vocab(101)
    with pytest.raises(ConfigError, match="not known yet"):
        bert(vocab_size=None).n_params()


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (bert(vocab_size=0), "vocab_size"),
        (bert(max_seq_len=0), "max_seq_len"),
        (bert(d_model=0), "d_model"),
        (bert(n_layers=0), "n_layers"),
        (bert(n_heads=0), "n_heads"),
        (bert(n_heads=5), "n_heads"),
        (modern(n_heads=8), "n_heads"),
        (bert(d_ff=0), "d_ff"),
        (bert(d_embedding=0), "d_embedding"),
        (bert(norm_eps=0.0), "norm_eps"),
        (bert(init_std=float("nan")), "init_std"),
        (bert(dropout=1.0), "dropout"),
        (bert(n_segments=-1), "n_segments"),
        (bert(global_every=0, local_window=4), "global_every"),
        (bert(rope_theta=1e4), "rope_theta"),
        (bert(local_rope_theta=1e4), "local_rope_theta"),
        (bert(global_every=2), "local_window"),
        (bert(local_window=4), "local_window"),
        (modern(local_window=0), "local_window"),
        (modern(rope_theta=None), "rope_theta"),
        (modern(rope_theta=1.0), "rope_theta"),
        (modern(local_rope_theta=0.5), "local_rope_theta"),
        (modern(global_every=1, local_window=None), "local_rope_theta"),
    ],
)
def test_every_bad_value_is_named(config: EncoderConfig, field: str) -> None:
    assert [name for name, _ in config.problems()][:1] == [field]
    assert len({name for name, _ in config.problems()}) <= 2


def test_all_problems_are_listed_at_once() -> None:
    found = modern(n_layers=0, dropout=-0.1, rope_theta=None, local_window=None).problems()
    assert [name for name, _ in found] == ["n_layers", "dropout", "rope_theta", "local_window"]


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (bert(), "BertForPreTraining"),
        (bert(n_segments=1, activation="gelu_tanh"), "BertForPreTraining"),
        (bert(pooler=False), "BertForMaskedLM"),
        (roberta(), "RobertaForMaskedLM"),
        (roberta(activation="gelu_tanh"), "BertForMaskedLM"),
        (bert(n_segments=0), None),
        (distil(), "DistilBertForMaskedLM"),
        (distil(activation="gelu_tanh"), "DistilBertForMaskedLM"),
        (distil(norm_eps=1e-5), None),
        (distil(d_embedding=14), None),
        (electra(), "ElectraForMaskedLM"),
        (electra(d_embedding=24), "ElectraForMaskedLM"),
        (electra(activation="gelu_tanh"), None),
        (electra(activation="gelu_tanh", transform_activation="gelu"), "ElectraForMaskedLM"),
        (roberta(activation="relu", transform_activation="gelu", n_segments=2), "RobertaForMaskedLM"),
        (bert(transform_activation="relu"), None),
        (distil(transform_activation="relu"), None),
        (modern(transform_activation="relu"), None),
        (electra(pooler=True), None),
        (modern(d_embedding=14), None),
        (bert(mlp_bias=False), None),
        (bert(norm_bias=False), None),
        (bert(tie_embeddings=False), "BertForPreTraining"),
        (roberta(tie_embeddings=False), "RobertaForMaskedLM"),
        (bert(share_layers=True), None),
        (bert(activation="geglu"), None),
        (bert(norm_position="pre"), None),
        (bert(global_every=2, local_window=4), None),
        (modern(), "ModernBertForMaskedLM"),
        (modern(activation="swiglu", mlp_bias=True, norm_bias=True, tie_embeddings=False), "ModernBertForMaskedLM"),
        (modern(activation="gelu"), None),
        (modern(pooler=True), None),
        (modern(n_segments=2), None),
        (modern(share_layers=True), None),
        (modern(norm_position="post"), None),
    ],
)
def test_which_architecture_computes_the_same(config: EncoderConfig, architecture: str | None) -> None:
    assert config.problems() == []
    assert config.hf_architecture() == architecture


def test_a_configuration_is_checked_without_torch() -> None:
    code = (
        "import sys\n"
        "from llmkit.models.encoder_config import EncoderConfig\n"
        f"c = EncoderConfig(**{BERT!r})\n"
        "assert not c.problems() and c.n_params() and c.flops_per_token(8) and c.hf_architecture()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_projection_counts_as_a_matrix_and_not_as_embedding() -> None:
    narrow, same = electra(), electra(d_embedding=24)
    tables = (61 + 32 + 2) * 14 + 61
    assert narrow.n_params() - narrow.n_params_without_embeddings() == tables
    assert same.n_params() == bert(pooler=False).n_params()
    # 24 x 14 of the projection; the transform and the output matrix are 14 wide in place of 24
    assert same.matmul_params() - narrow.matmul_params() == (24 + 61) * 10 - 24 * 14


def test_the_recipes_hold_every_field() -> None:
    for name, architecture in (("bert", "BertForPreTraining"), ("modern_bert", "ModernBertForMaskedLM")):
        values = yaml.safe_load((recipes_dir() / "model" / f"{name}.yaml").read_text())
        assert values.pop("_target_") == "llmkit.models.encoder_config.EncoderConfig"
        assert values.keys() == {field.name for field in fields(EncoderConfig)}
        config = replace(EncoderConfig(**values), vocab_size=1000)
        assert (config.problems(), config.hf_architecture()) == ([], architecture)
