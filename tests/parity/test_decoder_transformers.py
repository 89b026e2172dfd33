"""The decoder against ``transformers`` on random weights: logits, gradients, and folders in both directions."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmkit.models.config import DecoderConfig
from llmkit.models.hf import load_config, load_model, save_model
from llmkit.models.hf.families import family_of
from llmkit.models.hf.save import export
from tests.unit.models.tiny import built, gpt2, llama, random_ids

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers

N_CONFIGS = 14
LOGITS, GRADIENTS = 1e-5, 1e-4


def odd_gpt2(seed: int) -> DecoderConfig:
    draw = random.Random(seed)
    n_heads, biases = draw.choice([1, 2, 3, 5]), draw.random() < 0.7
    return gpt2(
        vocab_size=draw.randint(3, 131),
        max_seq_len=draw.randint(9, 37),
        d_model=n_heads * draw.randint(3, 9),
        n_heads=n_heads,
        n_layers=draw.randint(1, 3),
        d_ff=draw.choice([None, 7, 50]),
        activation=draw.choice(["gelu", "gelu_tanh"]),
        norm_eps=draw.choice([1e-5, 1e-3]),
        norm_bias=biases,
        attention_bias=biases,
        mlp_bias=draw.random() < 0.7,
        tie_embeddings=draw.random() < 0.7,
    )


def odd_llama(seed: int, **changes: Any) -> DecoderConfig:
    draw = random.Random(seed)
    n_kv_heads, d_head = draw.choice([1, 2, 3]), 2 * draw.randint(2, 8)
    n_heads = n_kv_heads * draw.choice([1, 2, 3])
    values = {
        "vocab_size": draw.randint(3, 131),
        "max_seq_len": draw.randint(9, 37),
        "d_model": n_heads * draw.choice([d_head, 3, 5]),
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_head": d_head,
        "n_layers": draw.randint(1, 3),
        "d_ff": draw.choice([None, 7, 50]),
        "activation": draw.choice(["swiglu", "swiglu", "geglu"]),
        "norm_eps": draw.choice([1e-6, 1e-3]),
        "rope_theta": draw.choice([100.0, 10000.0, 500000.0]),
        "attention_bias": draw.random() < 0.5,
        "mlp_bias": draw.random() < 0.5,
        "tie_embeddings": draw.random() < 0.5,
    }
    return llama(**{**values, **changes})


def odd_qwen3(seed: int) -> DecoderConfig:
    return odd_llama(seed, qk_norm=True, mlp_bias=False)


FAMILIES: dict[str, Callable[[int], DecoderConfig]] = {"gpt2": odd_gpt2, "llama": odd_llama, "qwen3": odd_qwen3}
CASES = [
    pytest.param(make(seed), name, id=f"{name}-{seed}") for name, make in FAMILIES.items() for seed in range(N_CONFIGS)
]


def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


@pytest.mark.parametrize(("config", "model_type"), CASES)
def test_logits_and_gradients_equal_transformers(config: DecoderConfig, model_type: str, tmp_path: Path) -> None:
    """Saved by us, opened by ``AutoModelForCausalLM``; loss as a mean of the cross entropy of the next token."""
    ours = built(config)
    save_model(ours, tmp_path)
    other = theirs(tmp_path)
    assert (type(other).__name__, other.config.model_type) == (config.hf_architecture(), model_type)
    ids = random_ids(config, 2, config.max_seq_len)
    logits = {"ours": ours(ids), "theirs": other(ids).logits}
    assert float((logits["ours"] - logits["theirs"]).detach().abs().max()) <= LOGITS
    for values in logits.values():
        F.cross_entropy(values[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    named = dict(other.named_parameters())
    rows = [row for row in family_of(config).rows(config, list(gradients)) if row.parts[0] in gradients]
    assert {part for row in rows for part in row.parts} == {name for name, _ in ours.named_parameters()}
    for row in rows:
        assert float((export(row, gradients) - named[row.name].grad).abs().max()) <= GRADIENTS, row.name


@pytest.mark.parametrize(("config", "model_type"), CASES)
def test_a_folder_of_transformers_gives_the_same_logits(config: DecoderConfig, model_type: str, tmp_path: Path) -> None:
    """The other direction: their config and weights, none of our keys."""
    ours = family_of(config).write(config)
    settings = {**ours, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    torch.manual_seed(0)
    other = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    other.save_pretrained(tmp_path)
    model, ids = load_model(tmp_path), random_ids(config, 2, config.max_seq_len)
    assert family_of(load_config(tmp_path)).write(model.config) == ours
    assert float((model(ids) - other.eval()(ids).logits).detach().abs().max()) <= LOGITS


@pytest.mark.parametrize("name", FAMILIES)
def test_sharded_folders_and_generation_settings_are_read_by_transformers(name: str, tmp_path: Path) -> None:
    model = built(FAMILIES[name](1))
    save_model(model, tmp_path, bos_id=1, eos_id=2, pad_id=0, max_shard_bytes=3000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    other, ids = theirs(tmp_path), random_ids(model.config, 1, 9)
    assert float((model(ids) - other(ids).logits).detach().abs().max()) <= LOGITS
    ends = other.generation_config
    assert (ends.bos_token_id, ends.eos_token_id, ends.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_equal_documents_one_by_one(name: str, tmp_path: Path) -> None:
    """Our packing against their unpacked runs."""
    model = built(FAMILIES[name](2))
    save_model(model, tmp_path)
    other, ids = theirs(tmp_path), random_ids(model.config, 1, 9)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    alone = torch.cat([other(ids[:, :4]).logits, other(ids[:, 4:]).logits], dim=1)
    assert float((model(ids, positions, documents) - alone).detach().abs().max()) <= LOGITS
