"""Folders of encoder-decoders: every config comes back exactly, published files are read, and what differs is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmkit.errors import CheckpointError
from llmkit.models.encoder_decoder_config import EncoderDecoderConfig
from llmkit.models.hf import load_config, load_model, save_model
from tests.unit.models.test_encoder_decoder_config import configs
from tests.unit.models.tiny_seq2seq import STYLES, bart, built, marian, random_ids, t5, whole

WEIGHTS = "model.safetensors"


def edit_json(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value != "left out"}))


def edit_weights(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """None takes a tensor away."""
    tensors = {**load_file(folder / WEIGHTS), **changes}
    (folder / WEIGHTS).unlink()
    save_file({name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(configs())
def test_every_config_and_weight_comes_back(
    tmp_path_factory: pytest.TempPathFactory, config: EncoderDecoderConfig
) -> None:
    model, folder = built(config), tmp_path_factory.mktemp("model")
    save_model(model, folder, eos_id=1, pad_id=0)
    other = load_model(folder)
    assert other.config == load_config(folder) == config
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    assert all(x == y and torch.equal(p, q) for (x, p), (y, q) in pairs)


@pytest.mark.parametrize("config", STYLES.values(), ids=STYLES)
def test_decoding_starts_from_the_pad_id(config: EncoderDecoderConfig, tmp_path: Path) -> None:
    save_model(built(config), tmp_path, eos_id=1, pad_id=7)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text())["decoder_start_token_id"] == 7
    save_model(built(config), tmp_path)
    assert "decoder_start_token_id" not in json.loads((tmp_path / "generation_config.json").read_text())


# -- published files ------------------------------------------------------------------------------------------------

T5_V1_1 = {
    **{"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_ff": 1024, "d_kv": 64, "d_model": 512},
    **{"decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu"},
    **{"initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "num_decoder_layers": 8},
    **{"num_heads": 6, "num_layers": 8, "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 32},
    **{"tie_word_embeddings": False, "use_cache": True, "vocab_size": 32128},
}
BART_BASE = {
    **{"activation_dropout": 0.1, "activation_function": "gelu", "add_bias_logits": False, "model_type": "bart"},
    **{"add_final_layer_norm": False, "attention_dropout": 0.1, "d_model": 768, "decoder_attention_heads": 12},
    **{"decoder_ffn_dim": 3072, "decoder_layerdrop": 0.0, "decoder_layers": 6, "decoder_start_token_id": 2},
    **{"dropout": 0.1, "early_stopping": True, "encoder_attention_heads": 12, "encoder_ffn_dim": 3072},
    **{"encoder_layerdrop": 0.0, "encoder_layers": 6, "eos_token_id": 2, "forced_eos_token_id": 2, "init_std": 0.02},
    **{"is_encoder_decoder": True, "max_position_embeddings": 1024, "normalize_before": False, "pad_token_id": 1},
    **{"normalize_embedding": True, "scale_embedding": False, "vocab_size": 50265},
}
OPUS_MT = {
    **BART_BASE,
    **{"model_type": "marian", "activation_function": "swish", "attention_dropout": 0.0, "d_model": 512},
    **{"decoder_attention_heads": 8, "encoder_attention_heads": 8, "decoder_ffn_dim": 2048, "encoder_ffn_dim": 2048},
    **{"max_position_embeddings": 512, "normalize_embedding": False, "scale_embedding": True, "vocab_size": 58101},
    **{"static_position_embeddings": True, "decoder_vocab_size": 58101, "pad_token_id": 58100, "eos_token_id": 0},
}


def read(folder: Path, content: dict[str, Any]) -> Any:
    (folder / "config.json").write_text(json.dumps(content))
    return load_config(folder)


def test_published_configs_are_read(tmp_path: Path) -> None:
    config = read(tmp_path, T5_V1_1)
    assert (config.activation, config.tie_embeddings, config.scale_logits) == ("geglu_tanh", False, False)
    assert config.n_params() == 76_961_152
    plain = {**T5_V1_1, "feed_forward_proj": "left out", "tie_word_embeddings": "left out", "num_decoder_layers": None}
    config = read(tmp_path, {name: value for name, value in plain.items() if value != "left out"})
    assert (config.activation, config.scale_logits, config.decoder_layers) == ("relu", True, 8)
    config = read(tmp_path, BART_BASE)
    assert (config.position, config.embedding_norm, config.dropout) == ("learned", True, 0.1)
    config = read(tmp_path, OPUS_MT)
    assert (config.position, config.activation, config.scale_embedding) == ("sinusoidal", "silu", True)
    assert (config.embedding_norm, config.head_bias) == (False, True)


@pytest.mark.parametrize("decoder_layers", [6, 3])
def test_a_distilled_bart_has_fewer_decoder_layers(decoder_layers: int, tmp_path: Path) -> None:
    sizes = {"d_model": 1024, "encoder_layers": 12, "decoder_layers": decoder_layers, "vocab_size": 50264}
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 16)
    widths = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 4096)
    config = read(tmp_path, {**BART_BASE, **sizes, **heads, **widths, "extra_pos_embeddings": 2})
    assert (config.n_layers, config.decoder_layers) == (12, decoder_layers)
    assert config.problems() == []


def test_a_dropout_is_said_once_if_it_is_not_carried_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The attention may have its own; there is none inside of feed-forward layers."""
    save_model(built(bart()), tmp_path, eos_id=1, pad_id=0)
    edit_json(tmp_path / "config.json", dropout=0.1, attention_dropout=0.0, activation_dropout=0.0, llmkit="left out")
    model = load_model(tmp_path)
    assert (model.config.dropout, model.config.attention_dropout) == (0.1, 0.0)
    assert model.decoder.blocks[0].cross_attention.dropout == 0.0
    save_model(model, tmp_path / "again", eos_id=1, pad_id=0)
    assert load_config(tmp_path / "again") == model.config
    assert caplog.text == ""
    edit_json(tmp_path / "config.json", activation_dropout=0.2)
    assert load_config(tmp_path) == load_model(tmp_path).config == model.config
    assert caplog.text.count("activation_dropout is 0.2") == 1


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({**T5_V1_1, "feed_forward_proj": "gated-tanh"}, "feed_forward_proj"),
        ({**T5_V1_1, "d_model": "wide"}, "d_model"),
        ({**BART_BASE, "normalize_before": True}, "normalize_before"),
        ({**BART_BASE, "add_final_layer_norm": True}, "add_final_layer_norm"),
        ({**BART_BASE, "tie_word_embeddings": False}, "tie_word_embeddings"),
        ({**BART_BASE, "decoder_ffn_dim": 7}, "decoder_ffn_dim"),
        ({**BART_BASE, "normalize_embedding": False}, "normalize_embedding"),
        ({**OPUS_MT, "normalize_embedding": True}, "normalize_embedding"),
        ({**OPUS_MT, "share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings"),
        ({**OPUS_MT, "decoder_vocab_size": 9}, "decoder_vocab_size"),
    ],
)
def test_a_config_that_computes_otherwise_is_refused(content: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, content)
    assert name in caught.value.where


def test_old_files_repeat_the_embedding_and_keep_a_table_of_no_use(tmp_path: Path) -> None:
    for config in (t5(), bart(), marian()):
        model, folder = built(config), tmp_path / str(config.hf_architecture())
        save_model(model, folder, eos_id=1, pad_id=0)
        prefix = "" if config.position == "relative" else "model."
        shared = load_file(folder / WEIGHTS)[f"{prefix}shared.weight"]
        names = ["lm_head.weight", f"{prefix}encoder.embed_tokens.weight", f"{prefix}decoder.embed_tokens.weight"]
        extra: dict[str, Tensor | None] = dict.fromkeys(names, shared)
        if config.position == "relative":
            extra["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(8, 4)
        if config.position == "sinusoidal":
            extra["model.encoder.embed_positions.weight"] = torch.ones(40, 24)
        edit_weights(folder, extra)
        edit_json(folder / "config.json", llmkit="left out")
        ids = random_ids(config, 1, 9)
        assert torch.equal(load_model(folder)(whole(ids), ids), model(whole(ids), ids))
        edit_weights(folder, {names[1]: shared + 1})
        with pytest.raises(CheckpointError, match=r"encoder.embed_tokens.weight differs"):
            load_model(folder)


def test_a_bias_that_the_model_has_not_must_be_zero(tmp_path: Path) -> None:
    config = bart(head_bias=False, mlp_bias=False)
    model = built(config)
    save_model(model, tmp_path, eos_id=1, pad_id=0)
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors["final_logits_bias"].shape == (1, 61)
    assert float(tensors["final_logits_bias"].abs().max()) == 0.0
    assert tensors["model.encoder.embed_positions.weight"].shape == (42, 24)
    assert load_model(tmp_path).output_bias is None
    edit_weights(tmp_path, {"final_logits_bias": torch.ones(1, 61)})
    with pytest.raises(CheckpointError, match="final_logits_bias is not zero"):
        load_model(tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save_model(built(t5()), tmp_path, eos_id=1, pad_id=0)
    edit_weights(tmp_path, {"decoder.block.1.layer.1.EncDecAttention.k.weight": None})
    with pytest.raises(CheckpointError, match=r"decoder.block.1.layer.1.EncDecAttention.k.weight: missing"):
        load_model(tmp_path)
