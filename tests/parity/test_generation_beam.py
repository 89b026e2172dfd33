"""Greedy and beam search against ``transformers`` on random weights: equal ids, 64 steps, prompts of many lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit.generation import generate_from_ids
from llmkit.interfaces import TokenIds
from llmkit.models.hf import save_model
from llmkit.settings import GenerationConfig
from tests.token_ids import token_ids
from tests.unit.byte_tokenizer import ByteTokenizer
from tests.unit.generation_settings import GREEDY as BASE
from tests.unit.models import tiny, tiny_seq2seq

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers

V, PAD, EOS, STEPS = 61, 0, 1, 64
GREEDY = replace(BASE, max_new_tokens=STEPS)
BEAMS = replace(GREEDY, n_beams=4)
SETTINGS = {
    "greedy": GREEDY,
    "no bigram twice": replace(GREEDY, no_repeat_ngram_size=2),
    "no trigram twice, penalty": replace(GREEDY, no_repeat_ngram_size=3, repetition_penalty=1.2),
    "beams": BEAMS,
    "many beams": replace(BEAMS, n_beams=7),
    "long texts": replace(BEAMS, length_penalty=2.0),
    "short texts": replace(BEAMS, length_penalty=0.2),
    "beams, no bigram twice, penalty": replace(BEAMS, n_beams=3, no_repeat_ngram_size=2, repetition_penalty=1.3),
    "every id once": replace(BEAMS, no_repeat_ngram_size=1, max_new_tokens=40),
}
ROOM: dict[str, Any] = {"vocab_size": V, "max_seq_len": 96}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny.built(tiny.llama(**ROOM, n_kv_heads=2)),
    "gpt2": lambda: tiny.built(tiny.gpt2(**ROOM)),
    "t5": lambda: tiny_seq2seq.built(tiny_seq2seq.t5(**ROOM, n_decoder_layers=None)),
    "bart": lambda: tiny_seq2seq.built(tiny_seq2seq.bart(**ROOM)),
}


class Spelling(ByteTokenizer):
    """Texts are the ids themselves."""

    vocab_size, bos_id, eos_id, pad_id = V, None, EOS, PAD

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"{i}," for i in ids)

    def token_ids(self) -> TokenIds:
        return token_ids(V, bos_id=None, eos_id=EOS, pad_id=PAD)


def prompts(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, V, (n,), generator=generator).tolist() for n in (3, 11, 1, 7)]


def ours(model: Any, rows: list[list[int]], settings: GenerationConfig) -> list[list[int]]:
    texts = generate_from_ids(model, Spelling(), rows, settings, device="cpu")
    return [[int(word) for word in text.split(",")[:-1]] for (text,) in texts]


def theirs(model: Any, rows: list[list[int]], settings: GenerationConfig) -> list[list[int]]:
    """In one batch, or alone where the padding would count as text: for repeats."""
    alone = settings.no_repeat_ngram_size is not None or settings.repetition_penalty != 1
    found = []
    for batch in [[row] for row in rows] if alone else [rows]:
        width = max(map(len, batch))
        side = (lambda pad, row: row + pad) if model.config.is_encoder_decoder else (lambda pad, row: pad + row)
        ids = torch.tensor([side([PAD] * (width - len(row)), row) for row in batch])
        real = torch.tensor([side([0] * (width - len(row)), [1] * len(row)) for row in batch])
        out = model.generate(
            input_ids=ids,
            attention_mask=real,
            generation_config=transformers.GenerationConfig(
                max_new_tokens=settings.max_new_tokens,
                num_beams=settings.n_beams,
                length_penalty=settings.length_penalty,
                no_repeat_ngram_size=settings.no_repeat_ngram_size or 0,
                repetition_penalty=settings.repetition_penalty,
                do_sample=False,
                eos_token_id=EOS,
                pad_token_id=PAD,
                decoder_start_token_id=PAD,
                early_stopping=False,
            ),
        )
        found += out[:, 1 if model.config.is_encoder_decoder else width :].tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in found]


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    model = MODELS[request.param]().eval()
    with torch.no_grad():  # so that many texts end early
        if request.param == "bart":
            model.output_bias[EOS] += 4.0
        else:
            model.embedding.weight[EOS] *= 3.0
    save_model(model, folder, eos_id=EOS, pad_id=PAD)
    seq2seq = model.config.kind == "encoder_decoder"
    auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    return model, auto.from_pretrained(folder, attn_implementation="eager")


all_settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@all_settings
def test_ids_equal_those_of_transformers(pair: tuple[Any, Any], settings: GenerationConfig) -> None:
    model, other = pair
    rows = prompts(0)
    expected = theirs(other, rows, settings)
    assert ours(model, rows, settings) == expected
    if settings == BEAMS:
        assert len({len(row) for row in expected}) > 1  # texts end at different steps


@pytest.mark.slow
@all_settings
def test_ids_equal_those_of_transformers_for_many_prompts(pair: tuple[Any, Any], settings: GenerationConfig) -> None:
    """80 prompts each, with the cache and without."""
    model, other = pair
    for seed in range(1, 21):
        rows = prompts(seed)
        expected = theirs(other, rows, settings)
        assert ours(model, rows, settings) == expected
        assert ours(model, rows, replace(settings, use_cache=False)) == expected
