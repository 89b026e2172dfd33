"""Encoder-decoders as others publish them: mT5, bare models, other heads, start tokens, and 64 greedy steps."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmkit.errors import CheckpointError
from llmkit.interfaces import NO_DOCUMENT, Tokens
from llmkit.models.encoder_decoder import EncoderDecoder
from llmkit.models.encoder_decoder_config import EncoderDecoderConfig
from llmkit.models.hf import load_config, load_model, save_model
from llmkit.models.hf.families import family_of
from llmkit.models.hf.rows import export
from llmkit.models.hf.t5 import MT5_FAMILY
from tests.parity.test_encoder_decoder_transformers import (
    EOS,
    FAMILIES,
    GRADIENTS,
    LOGITS,
    PAD,
    odd_bart,
    odd_t5,
    texts,
    their_logits,
    theirs,
)
from tests.unit.models.tiny_seq2seq import T5_GATED, bart, built, marian, random_ids, t5

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers

N_CONFIGS, N_STEPS, START = 10, 64, 2
IDS = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}


def odd_mt5(seed: int) -> EncoderDecoderConfig:
    activation = ["geglu_tanh", "relu", "swiglu"][seed % 3]
    return replace(odd_t5(seed), tie_embeddings=False, scale_logits=False, activation=activation)


def made(name: str, model_type: str, config: EncoderDecoderConfig, *, untied: bool = False, **keys: Any) -> Any:
    """A model of transformers, its weights shaken."""
    settings = {**family_of(config).write(config), **IDS, **keys}
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.AutoConfig.for_model(model_type, **settings)).eval()
    if untied:  # transformers 5 ties what it makes itself, and opens untied files as they are
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.all_tied_weights_keys.pop("lm_head.weight")
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.add_(0.2 * torch.randn(tensor.shape))
    return model


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")


# -- mT5 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(N_CONFIGS))
def test_mt5_is_read(seed: int, tmp_path: Path) -> None:
    """Logits and gradients; also as transformers 5 makes it, where the head is the embedding and not in the file."""
    config = odd_mt5(seed)
    tied = seed % 2 == 0
    other = made("MT5ForConditionalGeneration", "mt5", config, untied=not tied, initializer_factor=0.3)
    other.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mt5"
    ours, (source, target) = load_model(tmp_path), texts(config)
    assert family_of(ours.config).write(ours.config) == family_of(config).write(config)
    logits = {"ours": ours(source, target), "theirs": their_logits(other, source, target)}
    assert float((logits["ours"] - logits["theirs"]).detach().abs().max()) <= LOGITS
    for values in logits.values():
        F.cross_entropy(values[:, :-1].flatten(0, 1), target[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    if tied:  # one tensor to them
        gradients["embedding.weight"] = gradients["embedding.weight"] + gradients.pop("head.weight")
    named = dict(other.named_parameters())
    for row in MT5_FAMILY.rows(ours.config, list(gradients)):
        assert float((export(row, gradients) - named[row.name].grad).abs().max()) <= GRADIENTS, row.name


def test_mt5_is_written_as_t5(tmp_path: Path) -> None:
    """Which computes the same, and which more tools know."""
    config = odd_mt5(0)
    made("MT5ForConditionalGeneration", "mt5", config, untied=True).save_pretrained(tmp_path / "mt5")
    model, (source, target) = load_model(tmp_path / "mt5"), texts(config)
    save_model(model, tmp_path / "t5", eos_id=EOS, pad_id=PAD)
    other = theirs(tmp_path / "t5")
    assert type(other).__name__ == "T5ForConditionalGeneration"
    assert float((model(source, target) - their_logits(other, source, target)).detach().abs().max()) <= LOGITS


def test_a_t5_of_version_1_1_as_transformers_makes_it(tmp_path: Path) -> None:
    config = EncoderDecoderConfig(**T5_GATED)
    other = made("T5ForConditionalGeneration", "t5", config, initializer_factor=0.3)
    other.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model, (source, target) = load_model(tmp_path), texts(config)
    assert torch.equal(model.head.weight, model.embedding.weight)
    assert not model.config.tie_embeddings
    assert float((model(source, target) - their_logits(other, source, target)).detach().abs().max()) <= LOGITS


# -- bare models and other heads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model_type", "config", "aside"),
    [
        ("BartModel", "bart", bart(), None),
        ("MarianModel", "marian", marian(), None),
        ("BartForSequenceClassification", "bart", bart(), "classification_head.dense.weight"),
        ("BartForQuestionAnswering", "bart", bart(), "qa_outputs.weight"),
        ("T5Model", "t5", t5(), None),
        ("T5ForQuestionAnswering", "t5", t5(), "qa_outputs.weight"),
    ],
)
def test_the_backbone_of_other_models_is_read(
    name: str,
    model_type: str,
    config: EncoderDecoderConfig,
    aside: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The bias of the logits is the only thing that is new, and zero; T5 has none."""
    other = made(name, model_type, config)
    other.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "llmkit.models"):
        model, (source, target) = load_model(tmp_path), texts(config)
    assert ("the head is not in the files; it is new: output_bias" in caplog.text) == (model_type != "t5")
    assert (aside is None) == ("left aside" not in caplog.text)
    assert (aside or "") in caplog.text
    assert model.output_bias is None or not model.output_bias.any()
    real = source.document_ids != NO_DOCUMENT
    backbone = getattr(other, other.base_model_prefix, other)
    inputs = {"input_ids": source.input_ids, "attention_mask": real.long(), "decoder_input_ids": target}
    states = backbone(**inputs, output_hidden_states=True).decoder_hidden_states[-1]
    logits = F.linear(model.output_states(states), model.output_weight_VD)
    assert float((model(source, target) - logits).detach().abs().max()) <= LOGITS


def test_an_encoder_alone_is_refused(tmp_path: Path) -> None:
    made("T5EncoderModel", "t5", t5()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"tensor decoder\..* missing"):
        load_model(tmp_path)


def test_tensors_that_old_files_also_hold(tmp_path: Path) -> None:
    """Versions of the stacks, copies of the embedding, sinusoids, and a bias of scores that nothing reads."""
    for config, name, extra in (
        (bart(), "bart", {"model.encoder.version": torch.tensor([3.0]), "model.decoder.version": torch.tensor([3.0])}),
        (marian(), "marian", {"model.encoder.embed_positions.weight": torch.ones(40, 24)}),
        (t5(), "t5", {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(8, 4)}),
    ):
        model, folder = built(config), tmp_path / name
        save_model(model, folder, eos_id=EOS, pad_id=PAD)
        copies = {copy: model.embedding.weight.detach().clone() for copy in family_of(config).copies}
        edit_weights(folder, lambda tensors, new={**extra, **copies}: tensors.update(new))
        again = load_model(folder)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


# -- start tokens ---------------------------------------------------------------------------------------------------


def test_a_start_token_comes_in_and_goes_out(tmp_path: Path) -> None:
    """Published BART begins its targets with its end token. Here they begin with the pad id, and the model reads 2."""
    config = bart()
    other = made("BartForConditionalGeneration", "bart", config, decoder_start_token_id=START)
    other.save_pretrained(tmp_path / "in")
    model = load_model(tmp_path / "in")
    assert model.config == replace(config, start_id=START)
    source, target = texts(config)
    started = torch.cat([torch.full((3, 1), PAD), target[:, 1:]], dim=1)
    expected = their_logits(other, source, torch.cat([torch.full((3, 1), START), target[:, 1:]], dim=1))
    assert float((model(source, started) - expected).detach().abs().max()) <= LOGITS
    save_model(model, tmp_path / "out", eos_id=EOS, pad_id=PAD)
    assert load_config(tmp_path / "out") == model.config
    back = theirs(tmp_path / "out")
    assert back.config.decoder_start_token_id == back.generation_config.decoder_start_token_id == START


def test_every_document_of_a_row_begins_with_the_start_token() -> None:
    config = bart(start_id=START)
    model = built(config)
    source, target = (random_ids(config, 1, 9, seed=seed) for seed in (3, 4))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    packed = Tokens(source, positions, documents)
    replaced = target.masked_fill(positions == 0, START)
    assert not torch.equal(replaced, target)
    assert torch.equal(model(packed, target, positions, documents), model(packed, replaced, positions, documents))
    plain = built(replace(config, start_id=None))
    assert torch.equal(model(packed, target, positions, documents), plain(packed, replaced, positions, documents))


# -- generation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model: EncoderDecoder, source: Tokens, n_steps: int) -> Tensor:
    """Ids without the start, through the cache; the end token is never taken."""
    memory = model.encode(source)
    cache = model.new_cache(memory, n_steps)
    last, found = torch.full((source.input_ids.shape[0], 1), PAD), []
    for _ in range(n_steps):
        logits = model.decode(memory, last, None, None, cache, last_only=True)[:, -1]
        logits[:, EOS] = float("-inf")
        last = logits.argmax(-1, keepdim=True)
        found.append(last)
    return torch.cat(found, dim=1)


def odd_started_bart(seed: int) -> EncoderDecoderConfig:
    return replace(odd_bart(seed), start_id=START)


GENERATING: dict[str, Callable[[int], EncoderDecoderConfig]] = {
    **FAMILIES,
    "bart_started": odd_started_bart,
    "t5_untied": odd_mt5,
}


@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, N_CONFIGS))])
def test_64_cached_tokens_equal_those_of_transformers(name: str, seed: int, tmp_path: Path) -> None:
    """Three sources of different lengths at once."""
    config = replace(GENERATING[name](seed), max_seq_len=N_STEPS + 2)
    model = built(config, std=0.3)
    save_model(model, tmp_path, eos_id=EOS, pad_id=PAD)
    source, _ = texts(config)
    assert source.document_ids is not None
    expected = theirs(tmp_path).generate(
        source.input_ids,
        attention_mask=(source.document_ids != NO_DOCUMENT).long(),
        max_new_tokens=N_STEPS,
        min_new_tokens=N_STEPS,
        do_sample=False,
        num_beams=1,
        use_cache=config.decoder_layers <= config.n_layers,  # their cache has as many layers as the encoder
    )
    assert int(expected[0, 0]) == (PAD if config.start_id is None else config.start_id)
    assert torch.equal(greedy(model, source, N_STEPS), expected[:, 1:])
