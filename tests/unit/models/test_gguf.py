"""Models written as GGUF and read again; ``gguf.GGUFReader`` says what is in the file."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmkit.errors import CheckpointError, ConfigError
from llmkit.gguf_file import GGUFFile, GGUFTensor, read_gguf
from llmkit.models.config import DecoderConfig
from llmkit.models.gguf import load_gguf, load_gguf_config, rope, save_gguf
from llmkit.models.gguf.architectures import LLAMA, architecture_of
from llmkit.models.hf import load_config, load_model
from tests.unit.models.tiny import built, gpt2, llama, random_ids

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

WIDE = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96}
LLAMA3 = {"type": "llama3", "factor": 8.0, "original_len": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0, "original_len": 8}
MODELS = {
    "llama": llama(**WIDE),
    "untied, with biases": llama(
        **WIDE, tie_embeddings=False, attention_bias=True, attention_out_bias=True, mlp_bias=True
    ),
    "narrow heads": llama(**WIDE, d_head=8, norm_eps=1e-6, rope_theta=5e5),
    "linear": llama(**WIDE, rope_scaling={"type": "linear", "factor": 2.0}),
    "yarn": llama(**WIDE, rope_scaling=YARN),
    "llama3": llama(**WIDE, d_head=64, rope_scaling=LLAMA3),
    "qwen2": llama(**WIDE, attention_bias=True),
    "qwen3": llama(**WIDE, d_head=24, qk_norm="head"),
}


def written(config: DecoderConfig, path: Path, kind: Any = "f32", fields: dict[str, Any] | None = None) -> Any:
    model = built(config)
    save_gguf(model, path, kind=kind, tokenizer_fields=fields or {})
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(ids)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_f32_is_the_same_model(name: str, tmp_path: Path) -> None:
    config, path = MODELS[name], tmp_path / "model.gguf"
    model = written(config, path)
    again = load_model(path)
    assert dict(again.named_parameters()).keys() == dict(model.named_parameters()).keys()
    for (_, a), (_, b) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b)
    ids = random_ids(config, 2, config.max_seq_len)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert load_config(path) == load_gguf_config(path) == again.config
    assert list(tmp_path.iterdir()) == [path]  # nothing half-written


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_values_are_those_of_the_package(kind: str, tmp_path: Path) -> None:
    """What is read equals ``gguf.dequantize`` of ``gguf.quantize``, whatever the pieces it was read in."""
    model = written(replace(MODELS["qwen2"], tie_embeddings=False), tmp_path / "m.gguf", kind)
    again = dict(load_gguf(tmp_path / "m.gguf").named_parameters())
    type_ = gguf.GGMLQuantizationType[kind.upper()]
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        expected = array if array.ndim == 1 else gguf.dequantize(gguf.quantize(array, type_), type_)
        assert np.array_equal(again[name].detach().numpy(), expected), name
        step = np.abs(array).max() * {"f16": 2**-11, "q8_0": 0.51 / 127 + 2**-11}[kind]
        assert np.abs(again[name].detach().numpy() - array).max() <= step


def test_rows_without_whole_blocks_are_f16_in_q8_0(tmp_path: Path) -> None:
    written(llama(), tmp_path / "m.gguf", "q8_0")  # 24 wide, 64 in the feed-forward layer
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("Q8_0", "F16")
    assert (kinds["token_embd.weight"], kinds["output_norm.weight"]) == ("F16", "F32")


def test_the_reader_of_llama_cpp_finds_what_was_written(tmp_path: Path) -> None:
    fields = {
        "general.name": "small",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.token_type": [1, 1],
        "tokenizer.ggml.scores": [0.0, -1.0],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "",
    }
    model = written(MODELS["llama"], tmp_path / "m.gguf", "f16", fields)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {key: field.contents() for key, field in reader.fields.items()}
    assert (found["general.architecture"], found["general.name"], found["general.file_type"]) == ("llama", "small", 1)
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    sizes = ("embedding_length", "block_count", "feed_forward_length", "context_length", "vocab_size")
    assert [found[f"llama.{key}"] for key in sizes] == [64, 2, 96, 32, 61]
    heads = ("head_count", "head_count_kv", "key_length", "value_length")
    assert [found[f"llama.attention.{key}"] for key in heads] == [4, 2, 16, 16]
    assert (found["llama.rope.dimension_count"], found["llama.rope.freq_base"]) == (16, 10000.0)
    assert found["tokenizer.ggml.tokens"] == ["a", "b", *(f"[PAD{i}]" for i in range(2, 61))]
    assert found["tokenizer.ggml.token_type"] == [1, 1] + [5] * 59
    assert len(found["tokenizer.ggml.scores"]) == 61
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert "tokenizer.chat_template" not in found
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(list(model.named_parameters()))
    assert np.array_equal(
        tensors["blk.1.attn_v.weight"].data, model.blocks[1].attention.v.weight.detach().half().numpy()
    )
    q = model.blocks[0].attention.q.weight.detach().half().numpy()
    assert np.array_equal(tensors["blk.0.attn_q.weight"].data[:4], q[[0, 8, 1, 9]])  # a head of 16: pairs side by side


def test_what_a_tiny_tensor_type_cannot_hold(tmp_path: Path) -> None:
    model = built(MODELS["llama"])
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[3, 5] = 7e4
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight holds 70000, which F16 cannot hold"):
        save_gguf(model, tmp_path / "m.gguf", kind="f16", tokenizer_fields={})
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[3, 5] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        save_gguf(model, tmp_path / "m.gguf", kind="q8_0", tokenizer_fields={})


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (gpt2(), "GPT2LMHeadModel cannot be written as GGUF"),
        (llama(norm="layernorm"), "a model of our own format cannot be written as GGUF"),
        (llama(activation="geglu"), "llama does not compute hidden_act='gelu'"),
        (
            llama(rope_scaling={"type": "dynamic", "factor": 2.0, "original_len": 16}),
            "does not compute .*rope_parameters",
        ),
        (
            llama(rope_scaling={**YARN, "beta_fast": 16.0, "attention_factor": 1.0}),
            "does not compute .*rope_parameters",
        ),
        (llama(attention_bias=True, attention_windows=(None, 8)), "does not compute .*sliding_window"),
    ],
)
def test_models_that_gguf_has_no_words_for(config: DecoderConfig, what: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=what):
        written(config, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the tokenizer has 62 ids, the model 61 embedding rows"):
        written(MODELS["llama"], tmp_path / "m.gguf", "f32", {"tokenizer.ggml.tokens": ["x"] * 62})


def test_a_refused_write_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("old")
    (tmp_path / "m.gguf.part").mkdir()
    with pytest.raises(CheckpointError, match="could not be written"):
        written(MODELS["llama"], tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "old"


# -- rotary settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [8192, 64, 512, 3000])
@pytest.mark.parametrize(("factor", "high"), [(8.0, 4.0), (32.0, 4.0), (2.5, 16.0)])
def test_llama3_settings_are_found_again(length: int, factor: float, high: float) -> None:
    """From the divisors alone, for heads of 64 and 128 and the base of Llama 3."""
    named = {"original_max_position_embeddings": length, "low_freq_factor": 1.0, "high_freq_factor": high}
    rope_parameters = {"rope_type": "llama3", "factor": factor, **named, "rope_theta": 500000.0}
    for width in (64, 128):
        divisors = rope.divisors({"rope_parameters": rope_parameters, "head_dim": width})
        file = GGUFFile(Path("x"), {"llama.rope.freq_base": 500000.0}, {})
        found = rope.read(file, "llama", divisors)
        assert {**found, "rope_theta": 500000.0} == rope_parameters


@pytest.mark.parametrize("seed", range(60))
def test_few_waves_leave_settings_that_divide_alike(seed: int) -> None:
    """Heads of 2 to 16 with any settings: none, one or several waves between the long and the short ones."""
    draw = random.Random(seed)
    low, theta = draw.choice([0.5, 1.0, 3.0]), draw.choice([100.0, 10000.0, 500000.0])
    parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": draw.choice([1.5, 2.0, 8.0]),
        "original_max_position_embeddings": draw.choice([4, 16, 64, 8192, 10**6]),
        "low_freq_factor": low,
        "high_freq_factor": low * draw.choice([1.01, 2.0, 4.0, 30.0]),
    }
    content = {"rope_parameters": parameters, "head_dim": 2 * draw.randint(1, 8)}
    file = GGUFFile(Path("x"), {"llama.rope.freq_base": theta}, {})
    found = {**rope.read(file, "llama", rope.divisors(content)), "rope_theta": theta}
    assert rope.divide_alike(content, {**content, "rope_parameters": found})


@pytest.mark.parametrize("d_head", [2, 6, 16])
@pytest.mark.parametrize("original", [8, 20, 4096])
def test_small_llama3_models_keep_their_function(d_head: int, original: int, tmp_path: Path) -> None:
    scaling = {**LLAMA3, "original_len": original, "low_freq_factor": 0.7, "high_freq_factor": 2.0}
    model = written(llama(**WIDE, d_head=d_head, rope_scaling=scaling), tmp_path / "m.gguf")
    ids = random_ids(model.config, 2, 32)
    ours = logits(model, ids)
    difference = logits(load_model(tmp_path / "m.gguf"), ids) - ours
    assert float(difference.abs().max()) <= 1e-5 * float(ours.abs().max())


def test_divisors_of_something_else() -> None:
    file = GGUFFile(Path("x"), {"llama.rope.freq_base": 10000.0}, {})
    with pytest.raises(CheckpointError, match="not those of Llama 3"):
        rope.read(file, "llama", np.linspace(1, 8, 32, dtype=np.float32) ** 2)
    assert rope.read(file, "llama", np.ones(32, np.float32)) == {"rope_type": "default"}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, {"rope_type": "default"}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_type": "default"}),
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 8},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
        ),
    ],
)
def test_scalings_in_metadata(metadata: dict[str, Any], expected: dict[str, Any]) -> None:
    file = GGUFFile(Path("x"), {f"llama.{key}": value for key, value in metadata.items()}, {})
    assert rope.read(file, "llama", None) == expected


# -- reading --------------------------------------------------------------------------------------------------------


def header(**changes: Any) -> GGUFFile:
    sizes = {"embedding_length": 64, "block_count": 2, "feed_forward_length": 96, "context_length": 32}
    heads = {"attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5}
    metadata = {f"llama.{key}": value for key, value in {**sizes, **heads, **changes}.items()}
    tensors = {"token_embd.weight": GGUFTensor("token_embd.weight", (61, 64), 0, 0, 0)}
    return GGUFFile(Path("x"), {"general.architecture": "llama", **metadata}, tensors)


def test_defaults_of_a_sparse_header() -> None:
    found = LLAMA.config(header(), None)
    assert (found["vocab_size"], found["rope_theta"], found["tie_word_embeddings"]) == (61, 10000.0, True)
    assert "head_dim" not in found
    assert LLAMA.config(header(**{"rope.dimension_count": 8}), None)["head_dim"] == 8
    assert LLAMA.unknown_keys(header(surprise=1)) == ["llama.surprise"]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"expert_count": 8}, "mixtures of experts"),
        ({"attention.sliding_window": 4096}, "a sliding window"),
        ({"attention.value_length": 8, "attention.key_length": 16}, "only the width of a head, 16"),
        ({"rope.dimension_count": 8, "attention.key_length": 16}, "only the width of a head, 16"),
        ({"rope.scaling.type": "longrope"}, "'longrope'; llmkit computes none, linear, yarn"),
        ({"rope.freq_base": math.inf}, "rope_theta is inf"),
    ],
)
def test_computations_of_others_are_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(CheckpointError, match=what):
        LLAMA.config(header(**changes), None)


def test_an_unknown_architecture() -> None:
    with pytest.raises(CheckpointError, match="'bloom' is not read from GGUF; llmkit reads llama, qwen2, qwen3"):
        architecture_of(GGUFFile(Path("x"), {"general.architecture": "bloom"}, {}))


def test_types_and_devices(tmp_path: Path) -> None:
    written(MODELS["llama"], tmp_path / "m.gguf", "q8_0")
    model = load_gguf(tmp_path / "m.gguf", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert read_gguf(tmp_path / "m.gguf").tensors["token_embd.weight"].shape == (61, 64)
