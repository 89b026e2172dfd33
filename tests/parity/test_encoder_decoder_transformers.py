"""Encoder-decoders against ``transformers`` on random weights: logits, gradients, text, and folders both ways."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmkit.generation import generate
from llmkit.interfaces import NO_DOCUMENT, TokenIds, Tokens
from llmkit.models.encoder_decoder_config import EncoderDecoderConfig
from llmkit.models.hf import load_config, load_model, save_model
from llmkit.models.hf.families import family_of
from llmkit.models.hf.rows import export
from tests.token_ids import token_ids
from tests.unit.byte_tokenizer import ByteTokenizer
from tests.unit.models.tiny_seq2seq import bart, built, logits_of, marian, packed, padded, random_ids, t5, whole
from tests.unit.test_generation_seq2seq import GREEDY

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers

N_CONFIGS = 10
LOGITS, GRADIENTS = 1e-5, 1e-4
PAD, EOS = 0, 1


def odd_t5(seed: int) -> EncoderDecoderConfig:
    draw = random.Random(seed)
    tied, buckets = draw.random() < 0.5, draw.choice([4, 7, 8, 32])
    return t5(
        vocab_size=draw.randint(5, 131),
        max_seq_len=draw.randint(14, 37),
        d_model=draw.randint(5, 33),
        n_layers=draw.randint(1, 3),
        n_decoder_layers=draw.choice([None, 1, 2]),
        n_heads=draw.choice([1, 2, 3, 5]),
        d_head=draw.randint(2, 9),
        d_ff=draw.choice([None, 7, 50]),
        activation=["relu", "geglu_tanh", "gelu", "gelu_tanh", "silu", "reglu", "swiglu", "geglu"][seed % 8],
        norm_eps=draw.choice([1e-6, 1e-3]),
        n_position_buckets=buckets,
        max_position_distance=draw.choice([buckets, 20, 128]),
        tie_embeddings=tied,
        scale_logits=tied,
    )


def odd_bart(seed: int, make: Callable[..., EncoderDecoderConfig] = bart) -> EncoderDecoderConfig:
    draw = random.Random(seed)
    n_heads = draw.choice([1, 2, 3, 5])
    return make(
        vocab_size=draw.randint(5, 131),
        max_seq_len=draw.randint(14, 37),
        d_model=n_heads * draw.randint(3, 9),
        n_layers=draw.randint(1, 3),
        n_decoder_layers=draw.choice([None, 1, 2]),
        n_heads=n_heads,
        d_ff=draw.choice([None, 7, 50]),
        activation=["gelu", "relu", "silu", "gelu_tanh"][seed % 4],
        norm_bias=draw.random() < 0.7,
        attention_bias=draw.random() < 0.7,
        mlp_bias=draw.random() < 0.7,
        head_bias=draw.random() < 0.7,
        scale_embedding=draw.random() < 0.5,
    )


def odd_marian(seed: int) -> EncoderDecoderConfig:
    return odd_bart(seed, marian)


FAMILIES: dict[str, Callable[[int], EncoderDecoderConfig]] = {"t5": odd_t5, "bart": odd_bart, "marian": odd_marian}
CASES = [
    pytest.param(make(seed), name, id=f"{name}-{seed}") for name, make in FAMILIES.items() for seed in range(N_CONFIGS)
]


def theirs(folder: Path) -> Any:
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager")


def texts(config: EncoderDecoderConfig) -> tuple[Tokens, torch.Tensor]:
    """Sources of different lengths, padded, and targets; no padding id but the decoder's start."""
    ids = 2 + random_ids(config, 3, 13) % (config.vocab_rows - 2)
    lengths = [13, 6, 1]
    source = padded(ids, lengths)
    assert source.document_ids is not None
    target = 2 + random_ids(config, 3, 11, seed=1) % (config.vocab_rows - 2)
    return Tokens(
        ids.masked_fill(source.document_ids == NO_DOCUMENT, PAD), source.position_ids, source.document_ids
    ), target


def their_logits(other: Any, source: Tokens, target: torch.Tensor) -> torch.Tensor:
    real = torch.ones_like(source.input_ids) if source.document_ids is None else source.document_ids != NO_DOCUMENT
    logits: torch.Tensor = other(
        input_ids=source.input_ids, attention_mask=real.long(), decoder_input_ids=target
    ).logits
    return logits


@pytest.mark.parametrize(("config", "model_type"), CASES)
def test_logits_and_gradients_equal_transformers(config: EncoderDecoderConfig, model_type: str, tmp_path: Path) -> None:
    """Saved by us, opened by ``AutoModelForSeq2SeqLM``; sources with padding, loss as a mean over all targets."""
    assert config.problems() == []
    ours = built(config)
    save_model(ours, tmp_path, eos_id=EOS, pad_id=PAD)
    other = theirs(tmp_path)
    assert (type(other).__name__, other.config.model_type) == (config.hf_architecture(), model_type)
    source, target = texts(config)
    logits = {"ours": ours(source, target), "theirs": their_logits(other, source, target)}
    assert float((logits["ours"] - logits["theirs"]).detach().abs().max()) <= LOGITS
    for values in logits.values():
        F.cross_entropy(values[:, :-1].flatten(0, 1), target[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    named = dict(other.named_parameters())
    rows = [row for row in family_of(config).rows(config, list(gradients)) if row.parts[0] in gradients]
    assert {part for row in rows for part in row.parts} == {name for name, _ in ours.named_parameters()}
    for row in rows:
        if row.name in named:  # the bias of the logits is a constant to them
            assert float((export(row, gradients) - named[row.name].grad).abs().max()) <= GRADIENTS, row.name


@pytest.mark.parametrize(("config", "model_type"), CASES)
def test_a_folder_of_transformers_gives_the_same_logits(
    config: EncoderDecoderConfig, model_type: str, tmp_path: Path
) -> None:
    """The other direction: their config and weights, none of our keys."""
    ours = {**family_of(config).write(config), "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
    torch.manual_seed(0)
    other = transformers.AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.for_model(model_type, **ours))
    if not config.tie_embeddings:  # transformers 5 ties what it makes itself, and opens untied files as they are
        other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.detach().clone())
        other.all_tied_weights_keys.pop("lm_head.weight")
    with torch.no_grad():
        named = {**dict(other.named_parameters()), **{n: t for n, t in other.named_buffers() if "logits" in n}}
        for tensor in dict.fromkeys(named.values()):  # each once, in an order that every run has
            if tensor.requires_grad or tensor.shape[0] == 1:
                tensor.add_(0.2 * torch.randn(tensor.shape))
    other.save_pretrained(tmp_path)
    model, (source, target) = load_model(tmp_path), texts(config)
    expected = their_logits(other.eval(), source, target)
    assert family_of(load_config(tmp_path)).write(model.config) == family_of(config).write(config)
    assert float((model(source, target) - expected).detach().abs().max()) <= LOGITS


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_saved_again_by_transformers_is_still_ours(name: str, tmp_path: Path) -> None:
    for seed in range(4):
        config = FAMILIES[name](seed)
        ours, folder = built(config), tmp_path / str(seed)
        save_model(ours, folder, eos_id=EOS, pad_id=PAD)
        assert load_config(folder) == config
        theirs(folder).save_pretrained(folder / "again")
        again, (source, target) = load_model(folder / "again"), texts(config)
        assert float((again(source, target) - ours(source, target)).detach().abs().max()) <= LOGITS


@pytest.mark.parametrize("name", FAMILIES)
def test_sharded_folders_and_generation_settings_are_read_by_transformers(name: str, tmp_path: Path) -> None:
    model = built(FAMILIES[name](1))
    save_model(model, tmp_path, eos_id=EOS, pad_id=PAD, max_shard_bytes=6000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    other, (source, target) = theirs(tmp_path), texts(model.config)
    assert float((model(source, target) - their_logits(other, source, target)).detach().abs().max()) <= LOGITS
    for ends in (other.generation_config, other.config):
        assert (ends.decoder_start_token_id, ends.eos_token_id, ends.pad_token_id) == (PAD, EOS, PAD)


class Spelling(ByteTokenizer):
    """Spells ids out, and has pad, end and no begin token."""

    vocab_size, bos_id, eos_id, pad_id = 90, None, EOS, PAD

    def encode(self, text: str) -> list[int]:
        return [3 + byte % 80 for byte in text.encode()]

    def decode(self, ids: Any) -> str:
        return "".join(f"{i}," for i in ids)

    def token_ids(self) -> TokenIds:
        return token_ids(self.vocab_size, eos_id=EOS, pad_id=PAD)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_greedy_text_equals_that_of_transformers(name: str, seed: int, tmp_path: Path) -> None:
    """Four prompts of different lengths at once, up to the end token or 20 ids; also with a repetition penalty."""
    config = replace(FAMILIES[name](seed), vocab_size=90, max_seq_len=40)
    model, tokenizer, prompts = built(config, std=0.3), Spelling(), ["", "a", "Once upon", "a rather longer prompt"]
    save_model(model, tmp_path, eos_id=EOS, pad_id=PAD)
    other = theirs(tmp_path)
    rows = [[*tokenizer.encode(prompt), EOS] for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    for penalty in (1.0, 1.5):
        expected = other.generate(
            ids,
            attention_mask=real,
            max_new_tokens=20,
            do_sample=False,
            num_beams=1,
            repetition_penalty=penalty,
            use_cache=config.decoder_layers <= config.n_layers,  # their cache has as many layers as the encoder
        )
        settings = replace(GREEDY, max_new_tokens=20, repetition_penalty=penalty)
        for text, row in zip(generate(model, tokenizer, prompts, settings, device="cpu"), expected, strict=True):
            assert int(row[0]) == PAD
            theirs_ = row[1:].tolist()
            stop = theirs_.index(EOS) if EOS in theirs_ else len(theirs_)
            assert text == tokenizer.decode([PAD, *theirs_[:stop]])[len(tokenizer.decode([PAD])) :]


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_equal_documents_one_by_one(name: str, tmp_path: Path) -> None:
    """Our packing on both sides against their unpacked runs."""
    model = built(FAMILIES[name](2))
    save_model(model, tmp_path, eos_id=EOS, pad_id=PAD)
    other = theirs(tmp_path)
    source, target = (2 + random_ids(model.config, 1, 9, seed=seed) % (model.config.vocab_rows - 2) for seed in (3, 4))
    alone = [
        their_logits(other, whole(source[:, :5]), target[:, :3]),
        their_logits(other, whole(source[:, 5:]), target[:, 3:]),
    ]
    together = logits_of(model, packed(source, [5, 4]), packed(target, [3, 6]))
    assert float((together - torch.cat(alone, dim=1)).detach().abs().max()) <= LOGITS


def test_first_weights_have_the_deviations_of_transformers() -> None:
    """T5's own, where its code gives them; the untied head starts smaller here."""
    config = t5(d_model=64, n_heads=8, d_head=16, d_ff=96, vocab_size=512, n_position_buckets=32)
    ours = config.build()
    ours.init_weights(0)
    torch.manual_seed(0)
    other = transformers.T5ForConditionalGeneration(transformers.T5Config(**family_of(config).write(config)))
    theirs, state = dict(other.named_parameters()), dict(ours.named_parameters())
    for row in family_of(config).rows(config, list(state)):
        a, b = state[row.parts[0]], theirs[row.name]
        if a.dim() == 2:
            rel = 8 / math.sqrt(2 * min(a.numel(), b.numel()))
            assert float(a.detach().std()) == pytest.approx(float(b.detach().std()), rel=rel), row.name
        else:
            assert torch.equal(a, b), row.name
