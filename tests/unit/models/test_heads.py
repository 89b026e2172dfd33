"""Task heads: what they compute, what they change in a model, and how they come back from files."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmkit.errors import CheckpointError, ConfigError
from llmkit.interfaces import Batch
from llmkit.models.head_config import HeadConfig, HeadShape, numbered_labels
from llmkit.models.heads import TaskHead, attach_head, detach_head, head_architecture, head_of
from llmkit.models.hf import load_model, save_model
from llmkit.models.hf.task_heads import LEFT_ASIDE, OUTPUT_LAYERS, TABLES
from llmkit.models.lstm_config import LSTMConfig
from llmkit.models.lstm_seq2seq_config import LSTMSeq2SeqConfig
from llmkit.models.transformers_build import output_matrix
from tests.unit.models import tiny_seq2seq, wrapped
from tests.unit.models.test_encoder_config import bert, distil, modern, roberta
from tests.unit.models.tiny import built, gpt2, llama, random_ids

THREE = HeadConfig("class", ("bad", "fair", "good"), 0.0)
SPAN = HeadConfig("span", (), 0.0)
SIZES: dict[str, Any] = {"vocab_size": 61, "max_seq_len": 40, "n_layers": 2, "dropout": 0.1, "tie_embeddings": False}
OWN = {  # no class of transformers computes their heads
    "t5": tiny_seq2seq.t5(dropout=0.1),
    "bart": tiny_seq2seq.bart(),
    "lstm": LSTMConfig(**SIZES, d_model=12, d_hidden=10, attention=True, attention_window=None, init_range=0.1),
    "lstm_seq2seq": LSTMSeq2SeqConfig(**SIZES, d_model=12, d_hidden=10, init_range=0.1),
    "shared_blocks": bert(share_layers=True, pooler=False),
    "odd_decoder": llama(mlp_bias=True, norm="layernorm", norm_bias=True),
}


def with_head(config: Any, head: HeadConfig = THREE, seed: int = 0) -> Any:
    model = built(config)
    attach_head(model, head, seed)
    return model


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def whole(config: Any) -> Batch:
    ids = random_ids(config, 2, 8)
    return Batch(ids, ids, torch.arange(8).expand(2, 8), None, 16)


# -- what is computed -----------------------------------------------------------------------------------------------


@given(
    shape=st.builds(
        HeadShape,
        activation=st.sampled_from(["tanh", "relu", "gelu", None]),
        drop_input=st.booleans(),
        dense_bias=st.booleans(),
        norm_eps=st.sampled_from([None, 1e-5, 0.1]),
        norm_bias=st.booleans(),
        out_bias=st.booleans(),
    ),
    n_labels=st.integers(2, 5),
)
@settings(derandomize=True, max_examples=40, deadline=None)
def test_logits_are_those_of_the_formula(shape: HeadShape, n_labels: int) -> None:
    head = TaskHead(6, HeadConfig("class", numbered_labels(n_labels), 0.5), shape).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    states = x = torch.randn(4, 6, generator=generator)
    given_values = parameters(head)
    if shape.activation is not None:
        x = x @ given_values["dense.weight"].T + given_values.get("dense.bias", torch.zeros(6))
        x = {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu}[shape.activation](x)
    if shape.norm_eps is not None:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + shape.norm_eps).sqrt()
        x = x * given_values["norm.weight"] + given_values.get("norm.bias", torch.zeros(6))
    x = x @ given_values["out.weight"].T + given_values.get("out.bias", torch.zeros(n_labels))
    assert float((head(states) - x).detach().abs().max()) < 1e-5


@pytest.mark.parametrize(("shape", "n_draws"), [(HeadShape("tanh", drop_input=True), 2), (HeadShape("tanh"), 1)])
def test_dropout_is_where_the_shape_has_it(shape: HeadShape, n_draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head = TaskHead(6, HeadConfig("class", ("a", "b"), 0.5), shape)
    drawn: list[float] = []
    monkeypatch.setattr(F, "dropout", lambda x, p, training, inplace: drawn.append(p if training else 0.0) or x)
    head(torch.ones(1, 6))
    assert drawn == [0.5] * n_draws
    head.eval()(torch.ones(1, 6))
    assert drawn[n_draws:] == [0.0] * n_draws


def test_dropout_is_the_models_own_for_classes_and_none_for_spans() -> None:
    model = built(roberta(dropout=0.3))
    for head, expected in ((THREE, 0.0), (replace(THREE, dropout=None), 0.3), (HeadConfig("span"), 0.0)):
        attach_head(model, head, seed=0)
        assert model.task_head.dropout.p == model.task_head.config.dropout == expected


# -- what happens to the model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [llama(init_std=0.1), roberta(init_std=0.1), tiny_seq2seq.t5(), *OWN.values()])
def test_a_new_head_is_drawn_from_the_seed(config: Any) -> None:
    a, b, c = (parameters(with_head(config, seed=seed).task_head) for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["out.weight"], c["out.weight"])
    std = getattr(config, "init_std", None) or config.d_model**-0.5
    weight = a.get("dense.weight", a["out.weight"])
    assert abs(float(weight.std()) - std) < 0.3 * std
    assert not any(value.any() for name, value in a.items() if name.endswith("bias"))


def test_hidden_states_stay_the_same_and_output_layers_are_not_trained() -> None:
    for config in (gpt2(tie_embeddings=False), bert(), modern(tie_embeddings=False), tiny_seq2seq.bart()):
        model = built(config).eval()
        before = parameters(model)
        attach_head(model, THREE, seed=0)
        after = dict(model.named_parameters())
        for name, parameter in after.items():
            assert parameter.requires_grad != name.startswith(OUTPUT_LAYERS), name
            assert name.startswith("task_head.") or torch.equal(parameter, before[name])
        assert {name for name in before if not name.startswith(OUTPUT_LAYERS)} <= after.keys()


@pytest.mark.parametrize("config", [llama(), roberta(), modern()])
def test_every_trained_weight_gets_a_gradient(config: Any) -> None:
    model = with_head(config)
    model.task_head(model.hidden_states(whole(config))[:, 0]).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_the_pair_head_of_a_bert_goes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "llmkit.models"):
        model = with_head(bert())
    assert model.pooler is None
    assert model.pair_head is None
    assert model.config == bert(pooler=False)
    assert any("sentence pairs is left out" in message for message in caplog.messages)
    assert any("a new head for 3 classes: task_head.dense.weight" in message for message in caplog.messages)


def test_attaching_again_gives_a_new_head() -> None:
    model = with_head(roberta())
    first = model.task_head
    attach_head(model, SPAN, seed=0)
    assert head_of(model) is model.task_head is not first
    assert model.task_head(torch.zeros(5, 24)).shape == (5, 2)


def test_detaching_brings_the_language_model_back() -> None:
    model = with_head(roberta())
    detach_head(model)
    detach_head(model)
    assert head_of(model) is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert parameters(model).keys() == parameters(built(roberta())).keys()


def test_a_head_has_the_type_and_the_mode_of_its_model() -> None:
    model = built(llama()).to(torch.bfloat16).eval()
    head = attach_head(model, replace(THREE, dropout=0.5), seed=0)
    assert head.out.weight.dtype == torch.bfloat16
    assert not head.training
    assert head(torch.ones(1, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "head", "what"),
    [
        (llama(), SPAN, "spans are read from the states of an encoder"),
        (tiny_seq2seq.t5(), SPAN, "kind encoder_decoder"),
        (llama(), HeadConfig("class", ("one",)), "labels must be at least 2, got 1"),
        (llama(), HeadConfig("class", ("a", "b", "a")), "must differ"),
        (roberta(), HeadConfig("span", ("a", "b")), "no meaning for spans"),
        (roberta(), HeadConfig("span", (), 1.0), "dropout must be null or in"),
    ],
)
def test_a_head_that_cannot_be_is_an_error(config: Any, head: HeadConfig, what: str) -> None:
    model = built(config)
    with pytest.raises(ConfigError, match=what):
        attach_head(model, head, seed=0)
    assert head_of(model) is None
    assert all(parameter.requires_grad for parameter in model.parameters())


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_heads_that_transformers_lacks_are_saved_in_our_own_format(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "llmkit.models"):
        model = with_head(OWN[name], replace(THREE, dropout=0.25))
    assert any("it is saved in llmkit's own format" in message for message in caplog.messages)
    assert head_architecture(model) is None
    save_model(model, tmp_path, bos_id=0, eos_id=1, pad_id=2)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"].startswith("llmkit_")
    back = load_model(tmp_path)
    assert back.config == model.config
    assert back.task_head.config == model.task_head.config
    assert back.task_head.shape == model.task_head.shape
    ours, theirs = dict(model.named_parameters()), dict(back.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {name for name in ours if not ours[name].requires_grad} == {
        name for name in theirs if not theirs[name].requires_grad
    }


@pytest.mark.parametrize("config", [bert(pooler=False), distil(), modern(tie_embeddings=False), llama(), gpt2()])
def test_files_hold_no_output_layer_beside_a_head(config: Any, tmp_path: Path) -> None:
    config = replace(config, tie_embeddings=config.kind == "encoder" and config.position == "learned")
    save_model(with_head(config), tmp_path, pad_id=2)
    names = load_file(tmp_path / "model.safetensors").keys()
    table = TABLES[json.loads((tmp_path / "config.json").read_text())["model_type"], "class"]
    heads = {name for name in names if name.startswith(tuple(f"{theirs}." for theirs in table.modules.values()))}
    assert {name.rpartition(".")[0] for name in heads} == set(table.modules.values())
    outputs = ("lm_head.", "cls.", "vocab_", "decoder.")
    assert not [name for name in names if name.startswith(outputs)]


@pytest.mark.parametrize("config", [roberta(), llama()])
def test_the_same_labels_keep_the_head(config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = with_head(config)
    save_model(model, tmp_path, pad_id=2)
    back = load_model(tmp_path, seed=5, head=replace(THREE, dropout=0.4))
    assert torch.equal(back.task_head.out.weight, model.task_head.out.weight)
    assert back.task_head.config.dropout == back.task_head.dropout.p == 0.4
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    "wanted",
    [
        HeadConfig("class", ("good", "fair", "bad")),  # another order would turn every answer round
        HeadConfig("class", ("bad", "good")),
        HeadConfig("class", ("x", "y", "z")),
        HeadConfig("span"),
    ],
)
def test_a_head_of_another_size_or_kind_is_left_aside(
    wanted: HeadConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = with_head(roberta())
    save_model(model, tmp_path, pad_id=2)
    back = load_model(tmp_path, seed=5, head=wanted)
    assert back.task_head.config == wanted.for_model(0.0)
    assert torch.equal(
        back.task_head.out.weight, attach_head(model, wanted, seed=5).out.weight
    )  # new, drawn from the seed
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "its head is left aside: it answers with the labels bad, fair, good" in warning


def test_a_head_with_numbered_labels_takes_the_names(tmp_path: Path) -> None:
    model = with_head(roberta(), HeadConfig("class", numbered_labels(3), 0.0))
    save_model(model, tmp_path, pad_id=2)
    config = json.loads((tmp_path / "config.json").read_text())
    for keys in ({}, {"num_labels": 3}):  # named by number, or only counted
        if keys:
            config.pop("id2label", None), config.pop("label2id", None)
        (tmp_path / "config.json").write_text(json.dumps({**config, **keys}))
        back = load_model(tmp_path, head=THREE)
        assert back.task_head.config == THREE
        assert torch.equal(back.task_head.out.weight, model.task_head.out.weight)


@pytest.mark.parametrize("config", [roberta(), gpt2(), tiny_seq2seq.t5()])
def test_a_file_without_a_head_gets_a_new_one(config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(built(config), tmp_path, pad_id=2)
    assert head_of(load_model(tmp_path)) is None
    with caplog.at_level(logging.INFO, "llmkit.models"):
        a, b = (load_model(tmp_path, seed=seed, head=THREE).task_head.out.weight for seed in (3, 4))
    assert any("a new head for 3 classes" in message for message in caplog.messages)
    assert torch.equal(a, load_model(tmp_path, seed=3, head=THREE).task_head.out.weight)
    assert not torch.equal(a, b)


def edited(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, r"tensor classifier.out_proj.weight has the shape \(3, 24\)"),
        ({"id2label": {"0": "a", "1": "b", "3": "c"}}, "2 must be a label, got None"),
        ({"id2label": {"0": "a", "1": "b", "2": 5}}, "2 must be a label, got 5"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "labels must differ"),
        ({"id2label": ["a", "b", "c"]}, "must be an object"),
        ({"id2label": None, "num_labels": 10**12}, "num_labels is above"),
        ({"id2label": None, "num_labels": "3"}, "num_labels must be an integer"),
        ({"classifier_dropout": 2.0}, "dropout must be null or in"),
    ],
)
def test_broken_keys_of_a_head_are_named(keys: dict[str, Any], what: str, tmp_path: Path) -> None:
    save_model(with_head(roberta()), tmp_path, pad_id=2)
    edited(tmp_path, **keys)
    with pytest.raises(CheckpointError, match=what):
        load_model(tmp_path)


def test_a_span_head_has_two_outputs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(with_head(roberta(), SPAN), tmp_path, pad_id=2)
    edited(tmp_path, num_labels=3)
    assert head_of(load_model(tmp_path)) is None
    assert any("it has 3 outputs" in message for message in caplog.messages)


@pytest.mark.parametrize(("config", "lost"), [(roberta(), "classifier.dense.bias"), (llama(), "score.weight")])
def test_half_a_head_is_an_error(config: Any, lost: str, tmp_path: Path) -> None:
    """Even all of it: the config says that the head is there."""
    save_model(with_head(config), tmp_path, pad_id=2)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors[lost]
    path.unlink()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"tensor {lost}: missing"):
        load_model(tmp_path)


def test_another_activation_in_our_own_format_is_an_error(tmp_path: Path) -> None:
    save_model(with_head(OWN["t5"]), tmp_path, pad_id=2)
    edited(tmp_path, classifier_activation="relu")
    with pytest.raises(CheckpointError, match="classifier_activation is 'relu'"):
        load_model(tmp_path)


def test_tensors_of_other_heads_are_left_aside_in_decoders_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(with_head(llama()), tmp_path, pad_id=2)
    edited(tmp_path, architectures=["LlamaForCausalLM"])
    with caplog.at_level(logging.INFO, "llmkit.models"):
        assert head_of(load_model(tmp_path)) is None
    assert LEFT_ASIDE[0] == "score."
    assert any("left aside: score.weight" in message for message in caplog.messages)


def constants(model: Any) -> set[int]:
    """Tables of sinusoids, which are never trained."""
    return {id(p) for name, p in model.named_parameters() if "embed_positions" in name}


WRAPPED = ["biased head", "transform", "sinusoids"]


@pytest.mark.filterwarnings("ignore")  # those of transformers
@pytest.mark.parametrize("name", WRAPPED)
def test_the_head_of_a_wrapped_model_has_files_of_its_own(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    model = wrapped.built(wrapped.ALL[name])
    config = HeadConfig("span", (), 0.2) if model.config.kind == "encoder" else replace(THREE, dropout=None)
    attach_head(model, config, seed=0)
    assert model.task_head.config.dropout == (0.2 if config.kind == "span" else 0.1)
    save_model(model, tmp_path, bos_id=0, eos_id=1, pad_id=2)
    back = load_model(tmp_path)
    assert back.task_head.config == model.task_head.config
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), back.parameters(), strict=True))
    for each in (model, back):
        matrix, table = output_matrix(each.hf), each.hf.get_input_embeddings().weight
        outputs = {id(p) for p in (matrix.weight, matrix.bias) if p is not None and p is not table}
        assert {id(p) for p in each.parameters() if not p.requires_grad} - constants(each) == outputs
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == model.config.model_type
    kept = load_model(tmp_path, head=replace(config, dropout=0.3)).task_head
    assert torch.equal(kept.out.weight, model.task_head.out.weight)
    assert kept.dropout.p == 0.3
    detach_head(back)
    save_model(back, tmp_path, bos_id=0, eos_id=1, pad_id=2)
    assert head_of(load_model(tmp_path)) is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"labels": ["a", "b"]}, "out.weight must have 2 rows"),
        ({"labels": "abc"}, "must be a list of labels"),
        ({"labels": ["a", "a", "b"]}, "must differ"),
        ({"kind": "tokens"}, "kind is 'tokens'"),
        ({"classifier_activation": "gelu"}, "classifier_activation is 'gelu'"),
    ],
)
def test_broken_files_of_a_wrapped_models_head_are_named(keys: dict[str, Any], what: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    model = wrapped.built(wrapped.ALL["biased head"])
    attach_head(model, THREE, seed=0)
    save_model(model, tmp_path, bos_id=0, eos_id=1, pad_id=2)
    edited(tmp_path / "task_head", **keys)
    with pytest.raises(CheckpointError, match=what):
        load_model(tmp_path)


def test_gguf_has_no_place_for_a_head(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the extra gguf")
    from llmkit.models.gguf.save import save_gguf

    with pytest.raises(ConfigError, match="GGUF has no place for a task head"):
        save_gguf(with_head(llama()), tmp_path / "model.gguf", kind="F32", tokenizer_fields={})


def test_the_answers_of_two_heads() -> None:
    assert THREE.answers_as(THREE)
    assert not THREE.answers_as(SPAN)
    assert HeadConfig("span", (), 0.1).answers_as(SPAN)
    assert HeadConfig("class", numbered_labels(3)).answers_as(THREE)
    assert not THREE.answers_as(HeadConfig("class", numbered_labels(3)))
    assert (THREE.n_labels, SPAN.n_labels) == (3, 2)
