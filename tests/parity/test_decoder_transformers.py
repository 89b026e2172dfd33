"""Decoders against ``transformers`` on random weights: logits, gradients, folders in both directions, greedy text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.generation import generate
from llmkit.models.config import DecoderConfig
from llmkit.models.hf import load_config, load_model, save_model
from llmkit.models.hf.families import family_of
from llmkit.models.hf.rows import export
from tests.parity.odd_decoders import FAMILIES, odd_llama, odd_rotary
from tests.unit.models.tiny import built, random_ids
from tests.unit.test_generation_seq2seq import GREEDY

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers

N_CONFIGS = 10
LOGITS, GRADIENTS = 1e-5, 1e-4
CASES = [
    pytest.param(make(seed), name, id=f"{name}-{seed}") for name, make in FAMILIES.items() for seed in range(N_CONFIGS)
]
SCALINGS = ("linear", "dynamic", "llama3", "yarn")


def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def difference(ours: Tensor, other: Tensor) -> float:
    return float((ours - other).detach().abs().max())


@pytest.mark.parametrize(("config", "model_type"), CASES)
def test_logits_and_gradients_equal_transformers(config: DecoderConfig, model_type: str, tmp_path: Path) -> None:
    """Saved by us, opened by ``AutoModelForCausalLM``; loss as a mean of the cross entropy of the next token."""
    ours = built(config)
    save_model(ours, tmp_path)
    other = theirs(tmp_path)
    assert (type(other).__name__, other.config.model_type) == (config.hf_architecture(), model_type)
    ids = random_ids(config, 2, config.max_seq_len)
    logits = {"ours": ours(ids), "theirs": other(ids).logits}
    assert difference(logits["ours"], logits["theirs"]) <= LOGITS
    for values in logits.values():
        F.cross_entropy(values[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    named = {name.replace("lm_head", "embed_out"): p for name, p in other.named_parameters()} | dict(
        other.named_parameters()
    )
    rows = [row for row in family_of(config).rows(config, list(gradients)) if row.parts[0] in gradients]
    assert {part for row in rows for part in row.parts} >= {name for name, _ in ours.named_parameters()}
    for row in rows:
        given = export(replace(row, offset=0.0), gradients)
        assert difference(given, named[row.name].grad) <= GRADIENTS, row.name


@pytest.mark.parametrize(("config", "model_type"), CASES)
def test_a_folder_of_transformers_gives_the_same_logits(config: DecoderConfig, model_type: str, tmp_path: Path) -> None:
    """The other direction: their config and weights, none of our keys."""
    ours = family_of(config).write(config)
    other = random_model(model_type, ours)
    other.save_pretrained(tmp_path)
    model, ids = load_model(tmp_path), random_ids(config, 2, config.max_seq_len)
    assert family_of(load_config(tmp_path)).write(model.config) == ours
    assert difference(model(ids), other(ids).logits) <= LOGITS


def random_model(model_type: str, settings: dict[str, Any]) -> Any:
    """A model of theirs with weights in which nothing is zero or one."""
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **deepcopy(settings), **ids)
    other = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return other.eval()


# -- greedy text ----------------------------------------------------------------------------------------------------


class Characters:
    """One character an id, so that texts are ids; ``eos_id`` is never written."""

    bos_id, eos_id, pad_id = None, 10**6, 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(character) - ord("一") for character in text] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(ord("一") + i) for i in ids)


def assert_same_text(config: DecoderConfig, folder: Path, n_steps: int = 64) -> None:
    """Two prompts at once with our cache, each of them alone with theirs."""
    model, tokenizer = built(config, std=0.3), Characters(config.vocab_rows)
    save_model(model, folder)
    prompts = [random_ids(config, 1, length, seed=length) for length in (5, 12)]
    texts = [tokenizer.decode(ids[0].tolist()) for ids in prompts]
    settings = replace(GREEDY, max_new_tokens=n_steps)
    ours: Any = generate(model, tokenizer, texts, settings, device="cpu")  # type: ignore[arg-type]
    for text, ids in zip(ours, prompts, strict=True):
        expected = theirs(folder).generate(ids, max_new_tokens=n_steps, do_sample=False, use_cache=True)
        assert len(text) == n_steps
        assert text == tokenizer.decode(expected[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_equals_that_of_transformers(name: str, seed: int, tmp_path: Path) -> None:
    """64 steps: windows are passed, and so are the trained lengths of scaled positions."""
    config = FAMILIES[name](seed)
    assert_same_text(replace(config, vocab_size=97, max_seq_len=80), tmp_path)


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_positions_beyond_the_trained_length(kind: str, tmp_path: Path) -> None:
    for seed in range(3):
        draw = random.Random(seed)
        config = odd_llama(seed, **odd_rotary(draw, kind))
        config = replace(config, vocab_size=97, max_seq_len=80)
        assert_same_text(config, tmp_path / f"text-{seed}", n_steps=64 if seed < 1 else 20)
        model, ids = built(config), random_ids(config, 1, 80)
        save_model(model, tmp_path / f"logits-{seed}")
        assert difference(model(ids), theirs(tmp_path / f"logits-{seed}")(ids).logits) <= LOGITS


# -- other ways in and out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mistral", "phi3", "qwen2"])
def test_a_model_that_is_as_simple_as_a_llama_becomes_one(name: str, tmp_path: Path) -> None:
    """Their file, our model, our file: it may be of a simpler family that computes the same."""
    simple = {"mistral": "llama", "phi3": "llama", "qwen2": "qwen2"}
    config = replace(FAMILIES[name](3), attention_windows=None, rotary_fraction=1.0, rope_scaling=None)
    their_way = next(f for f in (family_of(FAMILIES[name](3)),) if f.model_types == (name,))
    other = random_model(name, their_way.write(config))
    other.save_pretrained(tmp_path / "theirs")
    model, ids = load_model(tmp_path / "theirs"), random_ids(config, 1, 9)
    save_model(model, tmp_path / "ours")
    again = theirs(tmp_path / "ours")
    assert again.config.model_type == simple[name]
    assert difference(model(ids), other(ids).logits) <= LOGITS
    assert difference(again(ids).logits, other(ids).logits) <= LOGITS


def test_a_gpt2_whose_scores_are_computed_in_another_order_is_the_same(tmp_path: Path) -> None:
    """``reorder_and_upcast_attn``, which the published models with scores scaled by layer have too."""
    config = replace(FAMILIES["gpt2"](0), scale_attention_by_layer=True, n_layers=3)
    other = random_model("gpt2", {**family_of(config).write(config), "reorder_and_upcast_attn": True})
    assert other.transformer.h[0].attn.reorder_and_upcast_attn
    other.save_pretrained(tmp_path)
    model, ids = load_model(tmp_path), random_ids(config, 2, config.max_seq_len)
    assert model.config.scale_attention_by_layer
    assert difference(model(ids), other(ids).logits) <= LOGITS


@pytest.mark.parametrize("name", FAMILIES)
def test_sharded_folders_and_generation_settings_are_read_by_transformers(name: str, tmp_path: Path) -> None:
    model = built(FAMILIES[name](1))
    save_model(model, tmp_path, bos_id=1, eos_id=2, pad_id=0, max_shard_bytes=3000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    other, ids = theirs(tmp_path), random_ids(model.config, 1, 9)
    assert difference(model(ids), other(ids).logits) <= LOGITS
    ends = other.generation_config
    assert (ends.bos_token_id, ends.eos_token_id, ends.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_equal_documents_one_by_one(name: str, tmp_path: Path) -> None:
    """Our packing against their unpacked runs."""
    model = built(FAMILIES[name](2))
    save_model(model, tmp_path)
    ids = random_ids(model.config, 1, 9)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    alone = torch.cat([theirs(tmp_path)(part).logits for part in (ids[:, :4], ids[:, 4:])], dim=1)
    assert difference(model(ids, positions, documents), alone) <= LOGITS
