"""Pseudo-perplexity against transformers, one masked token at a time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from llmkit.data.token_shards import ShardWriter, TokenShards, Vocabulary
from llmkit.engine.pseudo_perplexity import pseudo_perplexity
from llmkit.errors import ConfigError
from llmkit.models.hf import load_model
from tests.token_ids import token_ids

transformers = pytest.importorskip("transformers")
CLS, SEP, MASK, V = 2, 3, 4, 61
IDS = token_ids(V, bos_id=CLS, eos_id=SEP, pad_id=0, mask_id=MASK)
DOCUMENTS = [[10, 11, 12, 13, 14, 15], [20, 21, 22], [30, 31, 32, 33, 34, 35, 36]]


def shards(folder: Path) -> TokenShards:
    words = Vocabulary(V, CLS, SEP)
    with ShardWriter(folder / "0.bin", words) as writer:
        writer.add(DOCUMENTS, 100)
    return TokenShards([folder / "0.bin"], words)


def test_each_token_is_masked_alone(tmp_path: Path) -> None:
    """Documents packed in one window against each document by itself in ``BertForMaskedLM``."""
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40
    )
    torch.manual_seed(0)
    theirs = transformers.BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(4)  # far from even probabilities
    theirs.save_pretrained(tmp_path / "model")
    nll, n = 0.0, 0
    for document in DOCUMENTS:
        row = [CLS, *document, SEP]
        for place, token in enumerate(document, 1):
            masked = torch.tensor([[*row[:place], MASK, *row[place + 1 :]]])
            with torch.no_grad():
                nll -= float(theirs(masked).logits[0, place].double().log_softmax(-1)[token])
            n += 1
    model = load_model(tmp_path / "model")
    with torch.inference_mode():
        found = pseudo_perplexity(model, [shards(tmp_path)], IDS, 64, 1000, torch.device("cpu"))
    assert found["val/pseudo_ppl_n_tokens"] == n == 16
    assert found["val/pseudo_ppl"] == pytest.approx(math.exp(nll / n), rel=1e-4)


def test_a_vocabulary_without_a_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no mask"):
        pseudo_perplexity(None, [shards(tmp_path)], token_ids(V), 64, 10, torch.device("cpu"))
