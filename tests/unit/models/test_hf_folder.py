"""Model folders: every config comes back exactly, and a damaged or foreign folder is an error that names its fault."""

from __future__ import annotations

import json
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmkit.errors import CheckpointError
from llmkit.models.adapter_config import LoraConfig
from llmkit.models.adapters import attach, merge
from llmkit.models.config import DecoderConfig
from llmkit.models.decoder import Decoder
from llmkit.models.hf import load_config, load_model, save_model
from llmkit.models.hf.families import family_of, fitting_family
from llmkit.models.transformers_config import TransformersConfig
from tests.parity.odd_decoders import FAMILIES
from tests.unit.models.test_config import configs
from tests.unit.models.tiny import built, gpt2, llama

WEIGHTS = "model.safetensors"
Tensors = dict[str, Tensor]
SEEDS = st.integers(0, 1000)


def same_weights(a: Decoder, b: Decoder) -> bool:
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    return all(x == y and torch.equal(p, q) for (x, p), (y, q) in pairs)


def saved(folder: Path, config: DecoderConfig, **arguments: Any) -> Decoder:
    model = built(config)
    save_model(model, folder, **arguments)
    return model


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS)


# -- round trip -----------------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.one_of(configs(), st.builds(lambda name, seed: FAMILIES[name](seed), st.sampled_from([*FAMILIES]), SEEDS)))
def test_every_config_and_weight_comes_back(tmp_path_factory: pytest.TempPathFactory, config: DecoderConfig) -> None:
    folder = tmp_path_factory.mktemp("model")
    model = saved(folder, config)
    assert load_config(folder) == config
    loaded = load_model(folder)
    assert loaded.config == config
    assert same_weights(model, loaded)


def test_the_folder_says_what_other_tools_look_for(tmp_path: Path) -> None:
    saved(tmp_path, llama(rope_theta=5e5), bos_id=1, eos_id=2, pad_id=None)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, None)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  (tied)


def test_a_combination_without_an_architecture_is_our_own_type(tmp_path: Path) -> None:
    config = gpt2(norm="rmsnorm", norm_bias=False)
    model = saved(tmp_path, config)
    assert config.hf_architecture() is None
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llmkit_decoder"
    assert same_weights(load_model(tmp_path), model)


def test_weights_are_sharded_above_the_limit(tmp_path: Path) -> None:
    model = saved(tmp_path, gpt2(), max_shard_bytes=20_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    sizes = [sum(t.nbytes for t in load_file(tmp_path / name).values()) for name in shards]
    assert index["metadata"]["total_size"] == sum(sizes) == 4 * model.config.n_params()
    assert max(sizes) <= 20_000
    assert same_weights(load_model(tmp_path), model)


def test_saving_again_leaves_nothing_of_the_old_weights(tmp_path: Path) -> None:
    saved(tmp_path, llama(), max_shard_bytes=20_000)
    with safe_open(next(tmp_path.glob("*-00001-*")), "pt") as old:  # mapped while it is replaced
        model = saved(tmp_path, llama(d_model=32))
        assert old.get_tensor("model.embed_tokens.weight").shape == (61, 24)
    assert [path.name for path in tmp_path.glob("model*")] == [WEIGHTS]
    assert same_weights(load_model(tmp_path), model)


def test_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        saved(tmp_path, llama())
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_weights_keep_their_type_and_are_cast_when_loaded(tmp_path: Path) -> None:
    model = built(llama()).bfloat16()
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(tmp_path / WEIGHTS)["model.norm.weight"].dtype == torch.bfloat16
    assert same_weights(load_model(tmp_path), model.float())
    assert load_model(tmp_path, dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16


def test_a_gpt2_without_biases_stores_zeros_and_comes_back_without(tmp_path: Path) -> None:
    config = gpt2(attention_bias=False, mlp_bias=False, norm_bias=False)
    model = saved(tmp_path, config)
    assert not load_file(tmp_path / WEIGHTS)["transformer.h.0.attn.c_attn.bias"].any()
    assert same_weights(load_model(tmp_path), model)
    edit_weights(tmp_path, lambda t: t["transformer.h.1.attn.c_attn.bias"].add_(1))
    with pytest.raises(CheckpointError, match=r"h\.1\.attn\.c_attn\.bias is not zero"):
        load_model(tmp_path)


def test_names_without_the_backbone_prefix_are_read(tmp_path: Path) -> None:
    """As in the first GPT-2 files, which also hold the causal mask."""
    model = saved(tmp_path, gpt2())

    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)

    edit_weights(tmp_path, rename)
    assert same_weights(load_model(tmp_path), model)


def test_keys_changed_by_another_tool_win_over_ours(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, llama())
    edit_json(tmp_path / "config.json", lambda c: c.update(rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    assert load_config(tmp_path).rope_theta == 5e5
    assert "changed since llmkit wrote it" in caplog.text


def test_a_config_without_our_key_is_enough(tmp_path: Path) -> None:
    model = saved(tmp_path, llama(n_kv_heads=2, attention_bias=True))
    edit_json(tmp_path / "config.json", lambda c: (c.pop("llmkit"), c.pop("rope_parameters")))
    assert same_weights(load_model(tmp_path), model)


@pytest.mark.parametrize(("extra", "fine"), [("same", True), ("other", False)])
def test_a_stored_tied_head_must_be_the_embedding(tmp_path: Path, extra: str, fine: bool) -> None:
    saved(tmp_path, llama())
    shift = 0 if extra == "same" else 1
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + shift}))
    if fine:
        load_model(tmp_path)
    else:
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            load_model(tmp_path)


# -- damage ---------------------------------------------------------------------------------------------------------

NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), rf"tensor {NORM}: missing"),
        (lambda t: (t.pop(NORM), t.pop("model.embed_tokens.weight")), r"embed_tokens\.weight and 1 more: missing"),
        (lambda t: t.update(extra=torch.ones(1)), "tensor extra: not part of the model"),
        (lambda t: t.update({NORM: torch.ones(25)}), rf"{NORM} has the shape \(25,\), the config needs \(24,\)"),
        (lambda t: t.update({NORM: torch.ones(24, 1)}), rf"{NORM} has the shape \(24, 1\)"),
        (lambda t: t.update({NORM: torch.ones(24, dtype=torch.int64)}), rf"{NORM} has the type I64"),
        (lambda t: t[NORM].fill_(float("nan")), rf"{NORM} holds values that are not finite"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path: Path, change: Callable[[Tensors], object], message: str) -> None:
    saved(tmp_path, llama())
    edit_weights(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_a_transposed_tensor_is_named_in_the_shape_of_the_file(tmp_path: Path) -> None:
    saved(tmp_path, gpt2())
    name = "transformer.h.0.attn.c_attn.weight"
    edit_weights(tmp_path, lambda t: t.update({name: t[name].t().contiguous()}))
    with pytest.raises(CheckpointError, match=r"has the shape \(72, 24\), the config needs \(24, 72\)"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data[:4],
        lambda data: (2**40).to_bytes(8, "little") + data[8:],  # a header of a terabyte
        lambda data: data + b"more",
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: data.replace(b'"data_offsets":[', b'"data_offsets":[9', 1),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    saved(tmp_path, llama())
    path = tmp_path / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"not a readable safetensors file") as error:
        load_model(tmp_path)
    assert error.value.where == str(path)


def test_pickle_is_never_read(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (canary,))

    saved(tmp_path, llama())
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="pickle") as error:
        load_model(tmp_path)
    assert "save_pretrained" in error.value.fix
    assert not canary.exists()
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_model(tmp_path)


def test_shards_stay_in_the_folder_and_must_be_there(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    saved(folder, llama(), max_shard_bytes=20_000)
    index = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("*.safetensors"))
    (tmp_path / "outside.safetensors").write_bytes(shards[0].read_bytes())
    whole = index.read_text()
    for bad in ("../outside.safetensors", "/outside.safetensors"):
        edit_json(index, lambda c, bad=bad: c["weight_map"].update({NORM: bad}))
        with pytest.raises(CheckpointError, match="outside of the folder"):
            load_model(folder)
    index.write_text('{"weight_map": {"a": 1}}')
    with pytest.raises(CheckpointError, match="must name a file"):
        load_model(folder)
    index.write_text(whole)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"shard {shards[1].name} is missing"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="opt"), "model_type 'opt' is not one of gpt2, gpt_neox, llama"),
        (lambda c: c.pop("model_type"), "model_type None"),
        (lambda c: c.update(hidden_size="24"), "hidden_size must be an integer, got '24'"),
        (lambda c: c.update(hidden_size=True), "hidden_size must be an integer"),
        (lambda c: c.pop("num_hidden_layers"), "num_hidden_layers must be an integer, got None"),
        (lambda c: c.update(rms_norm_eps="x"), "rms_norm_eps must be a number"),
        (lambda c: c.update(tie_word_embeddings=1), "tie_word_embeddings must be true or false"),
        (lambda c: c.update(hidden_act="tanh"), "hidden_act is 'tanh'; llmkit has gelu, gelu_python, gelu_new"),
        (lambda c: c.update(sliding_window=64), "sliding_window is 64"),
        (lambda c: c["rope_parameters"].update(rope_type="longrope"), "rope_type is 'longrope'"),
        (lambda c: c["rope_parameters"].update(rope_type="yarn"), "rope_scaling of type yarn needs factor"),
        (lambda c: c.update(model_type="gemma3"), "gemma3' holds an image encoder"),
        (lambda c: c.update(rope_parameters=3), "rope_parameters must be an object"),
        (lambda c: c.update(num_attention_heads=5, num_key_value_heads=5, head_dim=5), "must be even"),
        (lambda c: c.update(num_attention_heads=0, head_dim=4), "n_heads must be at least 1"),
        (lambda c: c["llmkit"].pop("norm"), r"llmkit\.norm is missing"),
        (lambda c: c["llmkit"].update(new=1), r"llmkit\.new is unknown"),
        (lambda c: c["llmkit"].update(norm="batchnorm"), r"llmkit\.norm has the value 'batchnorm'"),
        (lambda c: c["llmkit"].update(n_layers=2.0), r"llmkit\.n_layers has the value 2\.0"),
        (lambda c: c["llmkit"].update(qk_norm=1), r"llmkit\.qk_norm has the value 1"),
        (lambda c: c["llmkit"].update(dropout=True), r"llmkit\.dropout has the value True"),
        (lambda c: c["llmkit"].update(d_ff="64"), r"llmkit\.d_ff has the value '64'"),
        (lambda c: c.update(llmkit=[]), "llmkit must be an object"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    saved(tmp_path, llama())
    edit_json(tmp_path / "config.json", change)
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(scale_attn_weights=None), "scale_attn_weights must be true or false"),
        (lambda c: c.update(add_cross_attention=True), "add_cross_attention is True"),
        (lambda c: c.update(activation_function="tanh"), "activation_function is 'tanh'"),
    ],
)
def test_a_gpt2_that_cannot_be_computed_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    saved(tmp_path, gpt2())
    edit_json(tmp_path / "config.json", change)
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path)


def test_different_dropouts_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, gpt2(dropout=0.1))
    edit_json(tmp_path / "config.json", lambda c: (c.update(attn_pdrop=0.0), c.pop("llmkit")))
    assert load_config(tmp_path).dropout == 0.1
    assert "all places will use the first" in caplog.text


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00", "[" * 100_000])
def test_a_broken_config_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load_model(tmp_path)


def test_a_disk_that_refuses_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be written"):
        saved(tmp_path / "file", llama())


def test_a_model_of_another_library_has_no_family() -> None:
    config = TransformersConfig("causal_lm", "opt", {}, 77, 40)
    assert fitting_family(config) is None
    with pytest.raises(CheckpointError, match="no table of tensor names for a TransformersConfig"):
        family_of(config)
    assert fitting_family(llama()) is family_of(llama())


def test_a_model_with_adapters_is_not_saved(tmp_path: Path) -> None:
    """The tables have no name for them: what was trained would be lost without a word."""
    model = built(llama())
    attach(model, LoraConfig(2, 4, 0.0, ["q"], False, False, False, True), seed=0)
    with pytest.raises(CheckpointError, match=r"the model has adapters \(blocks\.0\.attention\.q among 2\)") as caught:
        save_model(model, tmp_path / "model")
    assert "merge them first" in caught.value.fix
    assert not (tmp_path / "model").exists()
    merge(model)
    save_model(model, tmp_path / "model")
    assert same_weights(load_model(tmp_path / "model"), model)
