"""The encoder against ``transformers`` on random weights: logits, gradients, and folders in both directions."""

from __future__ import annotations

import json
import random
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
from llmkit.interfaces import NO_DOCUMENT
from llmkit.models.encoder_config import EncoderConfig
from llmkit.models.hf import load_config, load_model, save_model
from llmkit.models.hf.bert import HEADS
from llmkit.models.hf.families import family_of
from llmkit.models.hf.family import Family
from llmkit.models.hf.roberta import family as roberta_family
from llmkit.models.hf.rows import export
from tests.unit.models.test_encoder_config import bert, distil, electra, modern, roberta
from tests.unit.models.tiny import built

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers

N_CONFIGS = 10
LOGITS, GRADIENTS = 1e-5, 1e-4
PAD = 3


def odd_bert(seed: int, **changes: Any) -> EncoderConfig:
    draw = random.Random(seed)
    n_heads = draw.choice([1, 2, 3, 5])
    values = {
        "vocab_size": draw.randint(7, 131),
        "max_seq_len": draw.randint(9, 37),
        "d_model": n_heads * draw.randint(3, 9),
        "n_heads": n_heads,
        "n_layers": draw.randint(1, 3),
        "d_ff": draw.choice([None, 7, 50]),
        "activation": ["gelu", "gelu_tanh", "relu", "silu"][seed % 4],
        "tie_embeddings": draw.random() < 0.5,
        "norm_eps": draw.choice([1e-12, 1e-3]),
        "n_segments": draw.choice([1, 2, 3]),
    }
    return bert(**{**values, **changes})


def odd_masked_bert(seed: int) -> EncoderConfig:
    return odd_bert(seed, pooler=False, n_segments=2)


def odd_roberta(seed: int) -> EncoderConfig:
    """Of two segments only what a BERT does not compute."""
    return exact(odd_bert(seed, pooler=False, n_segments=1 if seed % 4 == 0 else 1 + seed % 2))


def exact(config: EncoderConfig) -> EncoderConfig:
    """With the exact GELU before the output matrix."""
    return replace(config, transform_activation=None if config.activation == "gelu" else "gelu")


def odd_distil(seed: int) -> EncoderConfig:
    return odd_bert(seed, pooler=False, n_segments=0, norm_eps=1e-12)


def odd_electra(seed: int) -> EncoderConfig:
    """Narrower, wider and as wide embeddings as the blocks."""
    config = exact(odd_bert(seed, pooler=False))
    return replace(config, d_embedding=[5, 3 * config.d_model // 2, config.d_model][seed % 3])


def odd_modern(seed: int) -> EncoderConfig:
    """Windows from one token to more than a row."""
    draw = random.Random(seed)
    n_heads, every = draw.choice([1, 2, 3, 5]), draw.choice([1, 2, 3, 4])
    return modern(
        vocab_size=draw.randint(7, 131),
        max_seq_len=draw.randint(9, 37),
        d_model=2 * n_heads * draw.randint(2, 5),
        n_heads=n_heads,
        n_layers=draw.randint(max(2, every), 5),  # fewer layers would not show how often one is global
        d_ff=draw.choice([None, 7, 50]),
        activation=["geglu", "swiglu", "geglu_tanh", "reglu"][seed % 4],
        norm_eps=draw.choice([1e-5, 1e-3]),
        rope_theta=draw.choice([100.0, 160000.0]),
        global_every=every,
        local_window=None if every == 1 else [1, 2, 3, 6, 7, 100][seed % 6],
        local_rope_theta=None if every == 1 else draw.choice([50.0, 10000.0, None]),
        norm_bias=draw.random() < 0.5,
        attention_bias=draw.random() < 0.5,
        mlp_bias=draw.random() < 0.5,
        transform_bias=draw.random() < 0.5,
        head_bias=draw.random() < 0.7,
        tie_embeddings=draw.random() < 0.7,
    )


MAKERS: dict[str, Callable[[int], EncoderConfig]] = {
    "BertForPreTraining": odd_bert,
    "BertForMaskedLM": odd_masked_bert,
    "RobertaForMaskedLM": odd_roberta,
    "DistilBertForMaskedLM": odd_distil,
    "ElectraForMaskedLM": odd_electra,
    "ModernBertForMaskedLM": odd_modern,
}
CASES = [
    pytest.param(make(seed), name, id=f"{name}-{seed}") for name, make in MAKERS.items() for seed in range(N_CONFIGS)
]
all_families = pytest.mark.parametrize("name", MAKERS)


def test_the_windows_are_odd_enough() -> None:
    """Rows longer than the window, and layers of both kinds, in more than half of the configs."""
    drawn = [odd_modern(seed) for seed in range(N_CONFIGS)]
    local = [c for c in drawn if c.reach is not None and 2 * c.reach + 1 < c.max_seq_len]
    assert len(local) >= 5
    assert {c.global_every for c in drawn} >= {1, 2, 3}


def table(config: EncoderConfig) -> Family:
    family = family_of(config)
    return family.for_padding(PAD) if family.for_padding else family


def theirs(folder: Path) -> Any:
    """The class that the folder names."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(folder, attn_implementation="eager").eval()


def inputs(config: EncoderConfig, seed: int = 0) -> dict[str, Tensor]:
    """Two rows of the full length, the second one with padding; segments at random."""
    generator = torch.Generator().manual_seed(seed)
    T = config.max_seq_len
    ids = torch.randint(PAD + 1, config.vocab_rows, (2, T), generator=generator)
    real = torch.arange(T) < torch.tensor([[T], [T - T // 3]])
    segments = torch.randint(0, max(config.n_segments, 1), (2, T), generator=generator)
    return {"ids": ids.where(real, PAD), "real": real, "segments": segments}


def their_logits(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    kind = model.config.model_type
    arguments = {} if kind in ("modernbert", "distilbert") else {"token_type_ids": batch["segments"]}
    out = model(batch["ids"], attention_mask=batch["real"].long(), **arguments)
    return (out.prediction_logits, out.seq_relationship_logits) if "prediction_logits" in out else (out.logits, None)


def our_logits(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    documents = torch.where(batch["real"], 0, NO_DOCUMENT)
    positions = torch.arange(documents.shape[1]) * batch["real"]
    arguments = (batch["ids"], positions, documents, batch["segments"])
    pairs = model.pair_logits(model._hidden(*arguments)[:, 0]) if model.config.pooler else None
    return model(*arguments), pairs


def loss(logits: Tensor, pairs: Tensor | None, batch: dict[str, Tensor]) -> Tensor:
    """Of both heads, over real tokens; any labels will do."""
    labels = batch["ids"].roll(1, 1)[batch["real"]]
    total = F.cross_entropy(logits[batch["real"]], labels)
    return total if pairs is None else total + F.cross_entropy(pairs, torch.tensor([0, 1]))


@pytest.mark.parametrize(("config", "name"), CASES)
def test_logits_and_gradients_equal_transformers(config: EncoderConfig, name: str, tmp_path: Path) -> None:
    """Saved by us, opened by the class that the folder names."""
    ours = built(config)
    save_model(ours, tmp_path, pad_id=PAD)
    other = theirs(tmp_path)
    assert type(other).__name__ == config.hf_architecture() == name
    assert type(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)).__name__.startswith(name[:4])
    batch = inputs(config)
    results = [our_logits(ours, batch), their_logits(other, batch)]
    (a, a_pairs), (b, b_pairs) = results
    assert float((a - b)[batch["real"]].detach().abs().max()) <= LOGITS
    assert (a_pairs is None) == (b_pairs is None) == (not config.pooler)
    if a_pairs is not None and b_pairs is not None:
        assert float((a_pairs - b_pairs).detach().abs().max()) <= LOGITS
    for result in results:
        loss(*result, batch).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert None not in gradients.values()
    named = dict(other.named_parameters())
    rows = table(config).rows(config, list(gradients))
    assert {part for row in rows for part in row.parts} == gradients.keys()
    for row in rows:
        if named[row.name].grad is None:
            assert (config.tie_embeddings, row.parts) == (False, ("output_bias",))  # they read the one in ``decoder``
        else:
            assert float((export(row, gradients) - named[row.name].grad).abs().max()) <= GRADIENTS, row.name


@pytest.mark.parametrize(("config", "name"), CASES)
def test_a_folder_of_transformers_gives_the_same_logits(config: EncoderConfig, name: str, tmp_path: Path) -> None:
    """The other direction: their config and weights, none of our keys."""
    family = table(config)
    ours = family.write(config)
    settings = {**ours, "bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
    settings.pop("architectures", None)
    torch.manual_seed(0)
    other = getattr(transformers, name)(transformers.AutoConfig.for_model(family.model_types[0], **settings)).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    other.save_pretrained(tmp_path)
    model, batch = load_model(tmp_path), inputs(config)
    assert table(load_config(tmp_path)).write(model.config) == ours
    (a, a_pairs), (b, b_pairs) = our_logits(model, batch), their_logits(other, batch)
    assert float((a - b)[batch["real"]].detach().abs().max()) <= LOGITS
    if a_pairs is not None and b_pairs is not None:
        assert float((a_pairs - b_pairs).detach().abs().max()) <= LOGITS


@pytest.mark.parametrize(("config", "name"), CASES[::3])
def test_a_folder_comes_back_exactly(config: EncoderConfig, name: str, tmp_path: Path) -> None:
    model = built(config)
    for arguments in ({"pad_id": PAD}, {"pad_id": None}, {"pad_id": 0, "max_shard_bytes": 3000}):
        save_model(model, tmp_path, bos_id=1, eos_id=2, **arguments)
        assert load_config(tmp_path) == config
        loaded = load_model(tmp_path)
        pairs = zip(model.named_parameters(), loaded.named_parameters(), strict=True)
        assert all(x == y and torch.equal(p, q) for (x, p), (y, q) in pairs)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    stored = [
        tensor.nbytes
        for path in tmp_path.glob("model-*")
        if path.suffix == ".safetensors"
        for tensor in load_file(path).values()
    ]
    assert index["metadata"]["total_size"] == sum(stored)
    batch = {**inputs(config), "real": torch.ones(2, config.max_seq_len, dtype=torch.bool)}
    batch["ids"] = batch["ids"].clamp(min=1)
    difference = our_logits(model, batch)[0] - their_logits(theirs(tmp_path), batch)[0]
    assert float(difference.detach().abs().max()) <= LOGITS


@all_families
def test_packed_documents_equal_documents_one_by_one(name: str, tmp_path: Path) -> None:
    """Our packing against their runs of each document alone."""
    model = built(MAKERS[name](2))
    save_model(model, tmp_path, pad_id=PAD)
    other = theirs(tmp_path)
    ids = torch.randint(PAD + 1, model.config.vocab_rows, (1, 9), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    pieces = [other(ids[:, columns]) for columns in (slice(0, 4), slice(4, 9))]
    alone = torch.cat([p.prediction_logits if "prediction_logits" in p else p.logits for p in pieces], dim=1)
    assert float((model(ids, positions, documents) - alone).detach().abs().max()) <= LOGITS


def test_layers_and_angles_in_the_spelling_of_before_are_read(tmp_path: Path) -> None:
    """As in the published ModernBERT: a number for the layers, two numbers for the angles."""
    model = built(modern(local_rope_theta=500.0, d_ff=40))
    save_model(model, tmp_path)

    def change(content: dict[str, Any]) -> None:
        for key in ("llmkit", "layer_types", "rope_parameters"):
            content.pop(key)

    edit(tmp_path, change)
    assert load_config(tmp_path) == model.config
    edit(tmp_path, lambda content: content.update(local_rope_theta=None))
    assert load_config(tmp_path).local_rope_theta == 10000.0


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")


def test_the_first_bert_files_are_read(tmp_path: Path) -> None:
    """Norms named gamma and beta, copies of tied tensors, a table of positions, and a pooler that the class has not."""
    model = built(bert(pooler=False))
    save_model(model, tmp_path, pad_id=PAD)

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if "LayerNorm" in name:
                tensors[name.replace("weight", "gamma").replace("bias", "beta")] = tensors.pop(name)
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
        tensors["bert.embeddings.position_ids"] = torch.arange(32)
        for module, _ in HEADS[2:]:
            tensors |= {f"{module}.weight": torch.ones(2, 24), f"{module}.bias": torch.ones(2)}

    edit_weights(tmp_path, rename)
    loaded = load_model(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))
    edit_weights(tmp_path, lambda tensors: tensors["cls.predictions.decoder.bias"].add_(1))
    with pytest.raises(CheckpointError, match=r"decoder\.bias differs from cls\.predictions\.bias"):
        load_model(tmp_path)


@pytest.mark.parametrize("config", [bert(tie_embeddings=False), roberta(tie_embeddings=False)])
def test_the_bias_of_an_untied_head_is_read_under_both_names(config: EncoderConfig, tmp_path: Path) -> None:
    """Before version 5 transformers had one bias and wrote it without ``decoder``; since then that one is not used."""
    model = built(config)
    save_model(model, tmp_path, pad_id=PAD)
    (twice,) = (name for name in load_file(tmp_path / "model.safetensors") if name.endswith("decoder.bias"))
    once = twice.replace("decoder.", "")
    edit_weights(tmp_path, lambda tensors: tensors[once].add_(1))
    assert torch.equal(load_model(tmp_path).output_bias, model.output_bias)
    edit_weights(tmp_path, lambda tensors: tensors.pop(twice))
    assert torch.equal(load_model(tmp_path).output_bias, model.output_bias + 1)
    edit_weights(tmp_path, lambda tensors: tensors.pop(twice.replace("bias", "weight")))
    with pytest.raises(CheckpointError, match=r"decoder\.weight: missing"):
        load_model(tmp_path)


def test_a_roberta_with_two_segments_becomes_a_bert(tmp_path: Path) -> None:
    """Which computes the same, and has no rows of no use in its position table."""
    settings = {**roberta_family(PAD).write(odd_bert(4, pooler=False, n_segments=2)), "pad_token_id": PAD}
    assert settings["type_vocab_size"] == 2
    torch.manual_seed(0)
    other = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**settings)).eval()
    other.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    save_model(model, tmp_path / "ours", pad_id=PAD)
    again, batch = theirs(tmp_path / "ours"), inputs(model.config)
    assert type(again).__name__ == "BertForMaskedLM"
    for logits in (our_logits(model, batch)[0], their_logits(again, batch)[0]):
        difference = (logits - their_logits(other, batch)[0])[batch["real"]]
        assert float(difference.detach().abs().max()) <= LOGITS


def test_a_roberta_whose_pad_id_was_changed_is_refused(tmp_path: Path) -> None:
    """The positions would begin elsewhere in the table."""
    save_model(built(roberta()), tmp_path, pad_id=PAD)
    assert load_file(tmp_path / "model.safetensors")["roberta.embeddings.position_embeddings.weight"].shape == (36, 24)
    edit(tmp_path, lambda content: content.update(pad_token_id=1))
    assert load_config(tmp_path).max_seq_len == 34  # what the file now says
    edit(tmp_path, lambda content: content.update(pad_token_id=1, max_position_embeddings=34))
    with pytest.raises(CheckpointError, match=r"position_embeddings\.weight has the shape \(36, 24\)"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (bert(), {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        (bert(), {"is_decoder": True}, "is_decoder is True"),
        (bert(), {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        (bert(), {"hidden_act": "tanh"}, "hidden_act is 'tanh'"),
        (roberta(), {"pad_token_id": "x"}, "pad_token_id must be an integer"),
        (distil(), {"activation": "quick_gelu"}, "activation is 'quick_gelu'"),
        (electra(), {"hidden_act": 3}, "hidden_act is 3"),
        (electra(), {"embedding_size": "x"}, "embedding_size must be an integer"),
        (modern(), {"classifier_activation": "relu"}, "classifier_activation is 'relu'"),
        (modern(), {"layer_types": ["sliding_attention"] * 4}, "layer_types must be full_attention in the first"),
        (modern(), {"rope_parameters": 3}, "rope_parameters must be an object"),
        (modern(), {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type is 'yarn'"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(
    config: EncoderConfig, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_model(built(config), tmp_path, pad_id=PAD)
    edit(tmp_path, lambda content: content.update(change))
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path)


def test_two_dropouts_become_one_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(built(bert(dropout=0.1)), tmp_path)
    edit(tmp_path, lambda content: content.update(attention_probs_dropout_prob=0.3))
    assert load_config(tmp_path).dropout == load_model(tmp_path).config.dropout == 0.1
    assert caplog.text.count("all places will use the first") == 1
