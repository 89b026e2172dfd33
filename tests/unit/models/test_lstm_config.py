"""Counts of the LSTM models against real builds and torch's own counter, model folders, and the checks of a config."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
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
from llmkit.interfaces import Batch, Tokens
from llmkit.models.hf import load_config, load_model, save_model
from llmkit.models.lstm_config import LSTMConfig
from llmkit.models.lstm_seq2seq_config import LSTMSeq2SeqConfig
from tests.unit.models.lstm_reference import LSTM, SEQ2SEQ, lstm, random_weights, seq2seq
from tests.unit.models.tiny import random_ids

Config = LSTMConfig | LSTMSeq2SeqConfig


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Any valid combination of the switches, with odd sizes."""
    optional = st.one_of(st.none(), st.integers(1, 20).map(lambda n: 2 * n))
    sizes: dict[str, Any] = {
        "vocab_size": draw(st.integers(2, 99)),
        "max_seq_len": draw(st.integers(1, 20)),
        "d_model": 2 * draw(st.integers(1, 20)),
        "d_hidden": draw(optional),
        "n_layers": draw(st.integers(1, 3)),
        "dropout": 0.0,
        "tie_embeddings": draw(st.booleans()),
        "init_range": 0.1,
    }
    if draw(st.booleans()):
        return LSTMSeq2SeqConfig(**sizes)
    attention = draw(st.booleans())
    return LSTMConfig(**sizes, attention=attention, attention_window=draw(optional) if attention else None)


def batch_for(config: Config, batch_size: int, seq_len: int, target_len: int) -> Batch:
    source = random_ids(config, batch_size, seq_len)
    if isinstance(config, LSTMConfig):
        return Batch(source, source, source, None, 0)
    target = random_ids(config, batch_size, target_len)
    return Batch(target, target, target, None, 0, source=Tokens(source, source, None))


# -- counts ---------------------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=60, deadline=None)
@given(configs())
def test_parameter_counts_equal_a_real_build(config: Config) -> None:
    assert config.problems() == []
    with torch.device("meta"):
        parameters = dict(config.build().named_parameters())
    assert config.n_params() == sum(parameter.numel() for parameter in parameters.values())
    tables = [parameters.pop(name).numel() for name in ("embedding.weight", "head.weight") if name in parameters]
    assert config.n_params_without_embeddings() == sum(parameter.numel() for parameter in parameters.values())
    matrices = sum(parameter.numel() for parameter in parameters.values() if parameter.dim() == 2)
    assert config.matmul_params() == matrices + tables[0]


@settings(derandomize=True, max_examples=12, deadline=None)
@given(configs(), st.integers(1, 2), st.integers(1, 9))
def test_flops_equal_what_torch_counts(config: Config, batch_size: int, target_len: int) -> None:
    """Attention as two products over the full square. In fp64, where nn.LSTM is made of products that torch counts."""
    model, seq_len = random_weights(config.build()).double(), config.max_seq_len
    batch = batch_for(config, batch_size, seq_len, target_len)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        logits = model.hidden_states(batch) @ model.output_weight_VD.T
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    n_tokens = seq_len + (target_len if config.kind == "encoder_decoder" else 0)
    assert 3 * forward.get_total_flops() // (n_tokens * batch_size) == config.flops_per_token(seq_len, target_len)
    assert backward.get_total_flops() <= 2 * forward.get_total_flops()  # nothing flows to before the first step


def test_a_closed_form_by_hand() -> None:
    """One layer, D = 3, R = 2, V = 5, T = 7."""
    config = lstm(vocab_size=5, d_model=3, d_hidden=2, n_layers=1)
    layer, attention, head = 4 * 2 * (3 + 2), 2 * 2 + 3 * 4, 3 * 5
    assert config.matmul_params() == layer + attention + head
    assert config.n_params() == layer + 2 * 4 * 2 + attention + head
    assert config.flops_per_token(7) == 6 * (layer + attention + head) + 12 * 2 * 7
    assert replace(config, attention=False).flops_per_token(7) == 6 * (layer + 2 * 3 + head)
    pair = seq2seq(vocab_size=5, d_model=3, d_hidden=2, n_layers=1)
    encoder = 2 * (4 * 1 * (3 + 1))
    whole = 6 * (7 * encoder + 4 * (layer + attention + head)) + 12 * 2 * 7 * 4
    assert pair.flops_per_token(7, 4) == whole // 11
    assert pair.flops_per_token(7) == 6 * encoder


def saved_bytes(config: Config, batch_size: int, *, checkpointing: bool) -> int:
    """Bytes that autograd keeps for the backward pass of the hidden states, parameters left out."""
    model = random_weights(config.build())
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

    batch = batch_for(config, batch_size, config.max_seq_len, config.max_seq_len)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden_states(batch)
    return sum(storages.values())


SIZES: dict[str, Any] = {"d_model": 64, "n_layers": 4, "max_seq_len": 64}
MEASURED: dict[str, Config] = {
    "attention": lstm(**SIZES),
    "wide": lstm(**SIZES, d_hidden=128),
    "plain": lstm(**SIZES, attention=False),
    "seq2seq": seq2seq(**SIZES),
}
measured = pytest.mark.parametrize("config", MEASURED.values(), ids=MEASURED)


@measured
def test_the_memory_estimate_is_near_what_autograd_keeps(config: Config) -> None:
    estimate = config.activation_bytes(4, 64, value_bytes=4, checkpointing=False, logit_rows=0)
    assert 0.75 < estimate / saved_bytes(config, 4, checkpointing=False) < 1.33


@measured
def test_checkpointing_keeps_one_input_a_layer(config: Config) -> None:
    whole = config.activation_bytes(4, 64, value_bytes=4, checkpointing=False, logit_rows=0)
    less = config.activation_bytes(4, 64, value_bytes=4, checkpointing=True, logit_rows=0)
    kept = saved_bytes(config, 4, checkpointing=True)
    sides = 2 if config.kind == "encoder_decoder" else 1
    assert kept < less < kept + whole / 4 * 1.1 + sides * 4 * 64 * config.width * 4


def test_logits_are_a_part_of_the_memory_estimate() -> None:
    for config in (lstm(), seq2seq()):
        few, many = (config.activation_bytes(2, 8, value_bytes=2, checkpointing=False, logit_rows=n) for n in (0, 10))
        assert many - few == 10 * 61 * (4 + 2)


# -- folders --------------------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=25, deadline=None)
@given(configs())
def test_every_config_and_weight_comes_back(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    folder: Path = tmp_path_factory.mktemp("model")
    model = random_weights(config.build())
    save_model(model, folder, bos_id=1)
    assert load_config(folder) == config
    loaded = load_model(folder)
    assert loaded.config == config
    pairs = zip(model.named_parameters(), loaded.named_parameters(), strict=True)
    assert all(a == b and torch.equal(p, q) for (a, p), (b, q) in pairs)


def test_no_architecture_of_transformers_computes_them() -> None:
    assert lstm().hf_architecture() is None
    assert seq2seq().hf_architecture() is None


# -- checks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "changes", "field"),
    [
        (lstm, {"vocab_size": 0}, "vocab_size"),
        (lstm, {"max_seq_len": 0}, "max_seq_len"),
        (lstm, {"d_model": 0}, "d_model"),
        (lstm, {"d_hidden": 0}, "d_hidden"),
        (lstm, {"n_layers": -1}, "n_layers"),
        (lstm, {"attention_window": 0}, "attention_window"),
        (lstm, {"attention": False, "attention_window": 4}, "attention_window"),
        (lstm, {"dropout": 1.0}, "dropout"),
        (lstm, {"init_range": 0.0}, "init_range"),
        (lstm, {"init_range": float("nan")}, "init_range"),
        (seq2seq, {"vocab_size": 0}, "vocab_size"),
        (seq2seq, {"n_layers": 0}, "n_layers"),
        (seq2seq, {"d_model": 5}, "d_model"),
        (seq2seq, {"d_hidden": 7}, "d_hidden"),
        (seq2seq, {"dropout": -0.1}, "dropout"),
    ],
)
def test_every_bad_value_is_named(build: Callable[..., Config], changes: dict[str, Any], field: str) -> None:
    assert [name for name, _ in build(**changes).problems()] == [field]


def test_all_problems_are_listed_at_once() -> None:
    found = lstm(n_layers=0, dropout=1.0, attention=False, attention_window=2).problems()
    assert [name for name, _ in found] == ["n_layers", "dropout", "attention_window"]
    assert seq2seq(d_model=5, d_hidden=4).problems() == []


@pytest.mark.parametrize("build", [lstm, seq2seq])
def test_the_vocabulary_is_rounded_up_and_never_too_small(build: Callable[..., Config]) -> None:
    assert build(vocab_size=None).with_vocab(65).vocab_size == 128
    assert build(vocab_size=100).with_vocab(100).vocab_size == 100
    with pytest.raises(ConfigError, match="101 ids, the model only 100"):
        build(vocab_size=100).with_vocab(101)
    with pytest.raises(ConfigError, match="not known yet"):
        build(vocab_size=None).n_params()


def test_a_configuration_is_checked_without_torch() -> None:
    code = (
        "import sys\n"
        "from llmkit.models.lstm_config import LSTMConfig\n"
        "from llmkit.models.lstm_seq2seq_config import LSTMSeq2SeqConfig\n"
        f"for c in (LSTMConfig(**{LSTM!r}), LSTMSeq2SeqConfig(**{SEQ2SEQ!r})):\n"
        "    assert not c.problems() and c.n_params() and c.flops_per_token(8, 4) and c.hf_architecture() is None\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("name", "kind"), [("lstm", LSTMConfig), ("lstm_seq2seq", LSTMSeq2SeqConfig)])
def test_the_recipes_hold_every_field(name: str, kind: type[Config]) -> None:
    values = yaml.safe_load((recipes_dir() / "model" / f"{name}.yaml").read_text())
    assert values.pop("_target_") == f"{kind.__module__}.{kind.__name__}"
    assert values.keys() == {field.name for field in fields(kind)}
    assert replace(kind(**values), vocab_size=1000).problems() == []
