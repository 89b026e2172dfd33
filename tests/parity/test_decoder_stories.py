"""A real checkpoint: the 260 K parameter story model, continued token by token as ``transformers`` does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmkit.generation import generate
from llmkit.models.hf import load_model, save_model
from llmkit.tokenizers.load import load_tokenizer
from tests.unit.generation_settings import GREEDY

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers

PROMPT = "Once upon a time"


@pytest.fixture
def folder(data_dir: Path) -> Path:
    folder = data_dir / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    return folder


def test_200_greedy_tokens_equal_transformers(folder: Path, tmp_path: Path) -> None:
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    assert tokenizer.bos_id is not None
    start = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(PROMPT)]])
    other = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = other.generate(start, max_new_tokens=200, do_sample=False)[0]
    settings = replace(GREEDY, max_new_tokens=200)
    (text,) = generate(model, tokenizer, [PROMPT], settings, device="cpu")
    assert len(expected) == 200 + start.shape[1]
    assert PROMPT + text == tokenizer.decode(expected.tolist())
    with torch.no_grad():
        assert float((model(expected[None]) - other(expected[None]).logits).abs().max()) <= 1e-4
    save_model(model, tmp_path, bos_id=1, eos_id=2)
    assert all(torch.equal(a, b) for a, b in zip(load_model(tmp_path).parameters(), model.parameters(), strict=True))
