"""Encoders without the head of masked LM: the bare model, and models with another head, against ``transformers``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmkit.errors import CheckpointError
from llmkit.interfaces import NO_DOCUMENT
from llmkit.models.encoder_config import EncoderConfig
from llmkit.models.hf import load_config, load_model, save_model
from tests.parity.test_encoder_transformers import LOGITS, MAKERS, PAD, inputs, our_logits, table, their_logits
from tests.unit.models.test_encoder_config import bert, distil, electra, modern, roberta
from tests.unit.models.tiny import built

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers

HEAD_NAMES = ["output_bias", "transform.dense.bias", "transform.dense.weight", "transform.norm.weight"]
BARE = {
    "BertModel": bert(pooler=False),
    "RobertaModel": roberta(),
    "DistilBertModel": distil(),
    "ElectraModel": electra(),
    "ModernBertModel": modern(transform_bias=True),
}
OTHER_HEADS = {
    "BertForTokenClassification": (bert(pooler=False), "classifier.weight"),
    "BertForMultipleChoice": (bert(pooler=False), "classifier.weight"),
    "RobertaForTokenClassification": (roberta(), "classifier.weight"),
    "DistilBertForTokenClassification": (distil(), "classifier.weight"),
    "ElectraForPreTraining": (electra(), "discriminator_predictions.dense.weight"),
    "ElectraForTokenClassification": (electra(), "classifier.weight"),
}


def saved(name: str, config: EncoderConfig, folder: Path) -> Any:
    """A model of transformers with weights in which nothing is zero or one, and the folder it writes."""
    family = table(config)
    settings = {**family.write(config), "bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
    settings.pop("architectures", None)
    torch.manual_seed(0)
    made = getattr(transformers, name)(transformers.AutoConfig.for_model(family.model_types[0], **settings)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    made.save_pretrained(folder)
    return made


def hidden_states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    documents = torch.where(batch["real"], 0, NO_DOCUMENT)
    positions = torch.arange(documents.shape[1])[None]
    states: Tensor = model._hidden(batch["ids"], positions, documents, batch["segments"])
    return states[batch["real"]]


def their_states(model: Any, config: EncoderConfig, batch: dict[str, Tensor]) -> Tensor:
    arguments = {"token_type_ids": batch["segments"]} if config.n_segments else {}
    out = model.base_model(batch["ids"], attention_mask=batch["real"].long(), **arguments)
    states: Tensor = out.last_hidden_state[batch["real"]]
    return states


def check_new_head(model: Any, folder: Path) -> None:
    """Matrices drawn by the seed, biases 0, norms 1; and the whole can be saved and opened again."""
    head = {name: p for name, p in model.named_parameters() if name.startswith(("transform.", "output_bias"))}
    assert head.keys() >= set(HEAD_NAMES)
    assert not head["output_bias"].any()
    assert not head["transform.dense.bias"].any()
    assert bool((head["transform.norm.weight"] == 1).all())
    again, other = (load_model(folder, seed=seed).transform.dense.weight for seed in (0, 1))
    assert torch.equal(again, head["transform.dense.weight"])
    assert not torch.equal(other, again)
    assert 0.015 < float(again.detach().std()) < 0.025
    save_model(model, folder / "ours", pad_id=PAD)
    back = load_model(folder / "ours")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), back.parameters(), strict=True))


@pytest.mark.parametrize("name", BARE)
def test_a_bare_encoder_gets_a_new_head(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = BARE[name]
    other = saved(name, config, tmp_path)
    assert table(load_config(tmp_path)).write(load_config(tmp_path)) == table(config).write(config)
    model, batch = load_model(tmp_path), inputs(config)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert all(part in warning for part in HEAD_NAMES)
    difference = hidden_states(model, batch) - their_states(other, config, batch)
    assert float(difference.detach().abs().max()) <= LOGITS
    check_new_head(model, tmp_path)


@pytest.mark.parametrize("name", OTHER_HEADS)
def test_other_heads_are_left_aside(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, tensor = OTHER_HEADS[name]
    other = saved(name, config, tmp_path)
    assert tensor in load_file(tmp_path / "model.safetensors")
    with caplog.at_level(logging.INFO, "llmkit.models"):
        model, batch = load_model(tmp_path), inputs(config)
    (aside,) = [record.getMessage() for record in caplog.records if "left aside" in record.getMessage()]
    assert tensor in aside
    difference = hidden_states(model, batch) - their_states(other, config, batch)
    assert float(difference.detach().abs().max()) <= LOGITS
    check_new_head(model, tmp_path)


@pytest.mark.parametrize("name", MAKERS)
def test_half_a_head_is_an_error(name: str, tmp_path: Path) -> None:
    config = MAKERS[name](1)
    save_model(built(config), tmp_path, pad_id=PAD)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    (lost,) = [row.name for row in table(config).outer_rows if row.parts == ("transform.dense.weight",)]
    del tensors[lost]
    path.unlink()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"tensor {lost}: missing"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "name"), [("xlm-roberta", "XLMRobertaForMaskedLM"), ("camembert", "CamembertForMaskedLM")]
)
def test_roberta_under_other_names(model_type: str, name: str, tmp_path: Path) -> None:
    config = roberta(norm_eps=1e-5)
    settings = {**table(config).write(config), "pad_token_id": PAD}
    torch.manual_seed(0)
    other = getattr(transformers, name)(transformers.AutoConfig.for_model(model_type, **settings)).eval()
    other.save_pretrained(tmp_path)
    model, batch = load_model(tmp_path), inputs(config)
    assert other.config.model_type == model_type
    difference = our_logits(model, batch)[0] - their_logits(other, batch)[0]
    assert float(difference[batch["real"]].detach().abs().max()) <= LOGITS
