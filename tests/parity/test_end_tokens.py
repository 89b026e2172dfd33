"""Every end token of a folder ends a text, as in ``transformers``; its list and sampling settings stay in a copy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit.commands.training import write_model
from llmkit.errors import CheckpointError
from llmkit.generation import generate, generate_from_ids, stream_from_ids
from llmkit.models.hf import load_model
from llmkit.models.transformers_config import TransformersConfig
from tests.unit.generation_settings import GREEDY
from tests.unit.models.tiny import built, llama
from tests.unit.tokenizers.strings import trained

transformers = pytest.importorskip("transformers")

PROMPT = "The cat"
GREEDY_24 = {"max_new_tokens": 24, "do_sample": False}
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 30, "repetition_penalty": 1.1}
CHOSEN = TransformersConfig("causal_lm", None, {}, None, 64)  # type: ignore[arg-type]


def folder_with(tmp_path: Path, **settings: Any) -> Path:
    """A random model and a tokenizer, with more in ``generation_config.json``."""
    tokenizer = trained("bpe")
    write_model(built(llama(vocab_size=tokenizer.vocab_size, max_seq_len=64)), tokenizer, tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return tmp_path


def row() -> list[int]:
    tokenizer = trained("bpe")
    return [1, *tokenizer.encode(PROMPT)]


def continued(folder: Path) -> list[int]:
    """The library's own greedy ids after the prompt."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.update(**GREEDY_24, temperature=None, top_p=None, top_k=None, repetition_penalty=None)
    ids: list[int] = model.generate(torch.tensor([row()]))[0, len(row()) :].tolist()
    return ids


def settings_of(folder: Path) -> Any:
    """Of a folder, as a user of its model gets them."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config


def texts_of(model: Any) -> list[str]:
    """By each way to have a model write."""
    tokenizer, config = trained("bpe"), replace(GREEDY, max_new_tokens=24)
    ((from_ids,),) = generate_from_ids(model, tokenizer, [row()], config, device="cpu")
    beam = replace(config, n_beams=2)
    ((searched,),) = generate_from_ids(model, tokenizer, [row()], beam, device="cpu", end_ids=[3])
    assert searched is not None
    return [
        *generate(model, tokenizer, [PROMPT], config, device="cpu"),
        from_ids,
        "".join(stream_from_ids(model, tokenizer, row(), config, device="cpu")),
    ]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_any_of_the_end_tokens_ends_a_text(file: str, wrapped: bool, tmp_path: Path) -> None:
    long = continued(folder_with(tmp_path / "plain", eos_token_id=2))
    assert len(long) == 24
    assert len(set(long[:6])) == 6
    folder = folder_with(tmp_path / "listed", **SAMPLING)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | {"eos_token_id": [2, long[5]]}))
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    assert continued(folder) == long[:6]
    model = CHOSEN.load(folder, seed=0) if wrapped else load_model(folder)
    assert texts_of(model) == [trained("bpe").decode(long[:5])] * 3
    write_model(model, trained("bpe"), tmp_path / "copy")
    assert settings_of(tmp_path / "copy") == settings_of(folder)
    assert load_model(tmp_path / "copy").end_ids == (2, long[5])
    assert continued(tmp_path / "copy") == long[:6]
    if file == "generation_config.json":
        assert {name: getattr(settings_of(tmp_path / "copy"), name) for name in SAMPLING} == SAMPLING


def test_the_tokenizers_own_end_joins_the_list(tmp_path: Path) -> None:
    model = load_model(folder_with(tmp_path / "a", eos_token_id=9))
    write_model(model, trained("bpe"), tmp_path / "copy")
    assert settings_of(tmp_path / "copy").eos_token_id == [9, 2]
    write_model(load_model(folder_with(tmp_path / "b")), trained("bpe"), tmp_path / "copy")
    assert settings_of(tmp_path / "copy").eos_token_id == 2


@pytest.mark.parametrize("ends", ["2", [2, None], 2.0, [[2]], {"a": 2}, True])
def test_end_tokens_that_are_no_ids(ends: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="eos_token_id must be an id or a list of ids") as caught:
        load_model(folder_with(tmp_path, eos_token_id=ends))
    assert caught.value.where == str(tmp_path / "generation_config.json")
