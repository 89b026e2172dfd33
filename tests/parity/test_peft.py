"""Adapters against the library ``peft``: its logits with our files, our logits with its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmkit.interfaces import NO_DOCUMENT
from llmkit.models.adapter_config import LoraConfig
from llmkit.models.adapters import adapters, attach, merge
from llmkit.models.head_config import HeadConfig
from llmkit.models.heads import attach_head
from llmkit.models.hf import load_model, save_model
from llmkit.models.hf.peft import load_adapter, save_adapter
from llmkit.models.resize import resize_embeddings
from tests.parity.odd_decoders import odd_gemma2, odd_gpt2, odd_gpt_neox, odd_llama, odd_olmo2, odd_phi3, odd_qwen3
from tests.unit.models import tiny_seq2seq
from tests.unit.models.test_encoder_config import bert, distil, electra, modern, roberta
from tests.unit.models.tiny import built, gpt2, llama, random_ids
from tests.unit.models.wrapped import built as built_wrapped
from tests.unit.models.wrapped import config as wrapped

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers and peft

TOLERANCE = 1e-5
PAD = 3
PLAIN = LoraConfig(4, 8, 0.0, ["all_linear"], use_rslora=False, use_dora=False, train_embeddings=False, train_head=True)
STYLES = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
DECODERS = {
    "gpt2": odd_gpt2(1),
    "gpt_neox": odd_gpt_neox(1),
    "llama": odd_llama(1),
    "qwen3": odd_qwen3(1),
    "olmo2": odd_olmo2(1),
    "gemma2": odd_gemma2(1),
    "phi3": odd_phi3(1),
}
ENCODERS = {"bert": bert(), "roberta": roberta(), "distilbert": distil(), "electra": electra(), "modernbert": modern()}
SEQ2SEQS = {name: tiny_seq2seq.STYLES[name] for name in ("t5", "t5_gated", "bart", "marian")}
EVERY = {**DECODERS, **ENCODERS, **SEQ2SEQS}
FUSED = ("gpt2", "gpt_neox", "phi3", "modernbert")
SOON = {*((name, "lora") for name in EVERY), ("gpt2", "rslora"), ("gpt2", "dora"), ("gpt_neox", "dora"), ("t5", "dora")}
CASES = [
    pytest.param(name, style, marks=() if (name, style) in SOON else pytest.mark.slow)
    for name in EVERY
    for style in STYLES
]


def config_of(**changes: Any) -> LoraConfig:
    return LoraConfig(**{**vars(PLAIN), **changes})


def shaken(model: torch.nn.Module, seed: int = 1) -> None:
    """Adapters, and all else that is trained, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def ours_on(model: Any, ids: Tensor) -> Tensor:
    """Logits; encoders and encoder-decoders read and write the same ids."""
    with torch.no_grad():
        if model.config.kind == "encoder_decoder":
            return model(tiny_seq2seq.whole(ids), ids)
        return model(ids)


def theirs_on(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        inner = model.config
        more = {"decoder_input_ids": ids} if getattr(inner, "is_encoder_decoder", False) else {}
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    return out.prediction_logits if "prediction_logits" in out else out.logits


def opened(folder: Path) -> Any:
    """The class that the folder names."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(folder, attn_implementation="eager").eval()


def base_of(name: str, folder: Path) -> Any:
    model = built(EVERY[name]).eval()
    save_model(model, folder, pad_id=PAD)
    return model


def ids_for(config: Any) -> Tensor:
    return random_ids(config, 2, min(config.max_seq_len, 12)).clamp(min=min(PAD + 1, config.vocab_rows - 1))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize(("name", "style"), CASES)
def test_peft_opens_our_adapter(name: str, style: str, tmp_path: Path) -> None:
    """And so do we, on a base that is read again; the merged model says the same."""
    model = base_of(name, tmp_path / "base")
    ids = ids_for(model.config)
    before = ours_on(model, ids)
    attach(model, config_of(**STYLES[style]), seed=0)
    assert difference(ours_on(model, ids), before) <= TOLERANCE
    shaken(model)
    after = ours_on(model, ids)
    assert difference(after, before) > 1e-2
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    other = peft.PeftModel.from_pretrained(opened(tmp_path / "base"), tmp_path / "adapter").eval()
    assert difference(theirs_on(other, ids), after) <= TOLERANCE
    again = load_model(tmp_path / "base").eval()
    read = load_adapter(again, tmp_path / "adapter")
    assert (read.r, read.alpha, read.use_dora, read.use_rslora) == (4, 8, style == "dora", style == "rslora")
    assert {n: (m.rank, m.lora_scale) for n, m in adapters(again).items()} == {
        n: (m.rank, pytest.approx(m.lora_scale)) for n, m in adapters(model).items()
    }
    assert difference(ours_on(again, ids), after) <= TOLERANCE
    merge(again)
    assert difference(ours_on(again, ids), after) <= TOLERANCE
    assert difference(theirs_on(other.merge_and_unload(), ids), after) <= TOLERANCE


@pytest.mark.parametrize(("name", "style"), CASES)
def test_we_open_an_adapter_of_peft(name: str, style: str, tmp_path: Path) -> None:
    """Ranks and scales of some modules differ, as its patterns allow."""
    model = base_of(name, tmp_path / "base")
    other = opened(tmp_path / "base")
    linear = peft.tuners.tuners_utils._maybe_include_all_linear_layers
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False, **STYLES[style])
    names = sorted(linear(settings, other).target_modules)
    inside = [n for n in names if not n.startswith(("cls", "lm_head", "head", "vocab", "generator"))]
    settings.target_modules = inside
    settings.rank_pattern, settings.alpha_pattern = {inside[0]: 6}, {inside[0]: 7, f"^model.layers.0.{inside[-1]}": 9}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        other = peft.get_peft_model(other, settings).eval()
    if style == "dora":
        with torch.no_grad():
            for n, parameter in other.named_parameters():
                parameter.mul_(1.1 if "magnitude" in n else 1.0)
    other.save_pretrained(tmp_path / "adapter")
    ids = ids_for(model.config)
    load_adapter(model, tmp_path / "adapter")
    assert difference(ours_on(model, ids), theirs_on(other, ids)) <= TOLERANCE
    save_adapter(model, tmp_path / "again", tmp_path / "base")
    third = peft.PeftModel.from_pretrained(opened(tmp_path / "base"), tmp_path / "again").eval()
    assert difference(theirs_on(third, ids), theirs_on(other, ids)) <= TOLERANCE


@pytest.mark.parametrize("style", STYLES)
def test_gradients_equal_those_of_peft(style: str, tmp_path: Path) -> None:
    model = base_of("llama", tmp_path / "base")
    attach(model, config_of(**STYLES[style]), seed=0)
    shaken(model)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    other = opened(tmp_path / "base")
    other = peft.PeftModel.from_pretrained(other, tmp_path / "adapter", is_trainable=True).eval()
    ids = ids_for(model.config)
    model(ids).pow(2).mean().backward()
    other(input_ids=ids).logits.pow(2).mean().backward()
    ours = {f"blocks.{n}": p.grad for n, p in model.blocks.named_parameters() if p.requires_grad}
    theirs = {n: p.grad for n, p in other.named_parameters() if p.requires_grad}
    assert len(ours) == len(theirs) > 0
    for name, gradient in ours.items():
        _, layer, part, matrix, kind = name.split(".")
        module = {"attention": "self_attn"}.get(part, part)
        ending = {"lora_magnitude": "lora_magnitude_vector"}.get(kind, kind)
        (found,) = [g for n, g in theirs.items() if f"layers.{layer}.{module}.{matrix}_proj.{ending}." in n]
        assert difference(gradient, found) <= TOLERANCE, name


# -- parts of the model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["q", "v"], ["v"], ["attention.o", "mlp.up"]])
@pytest.mark.parametrize("name", FUSED)
def test_parts_of_fused_matrices(name: str, targets: list[str], tmp_path: Path) -> None:
    """Only the parts that have an adapter come back with one, at their own rank."""
    model = base_of(name, tmp_path / "base")
    attach(model, config_of(targets=targets, use_dora=name == "phi3"), seed=0)
    shaken(model)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    other = peft.PeftModel.from_pretrained(opened(tmp_path / "base"), tmp_path / "adapter").eval()
    ids = ids_for(model.config)
    assert difference(theirs_on(other, ids), ours_on(model, ids)) <= TOLERANCE
    again = load_model(tmp_path / "base").eval()
    load_adapter(again, tmp_path / "adapter")
    assert difference(ours_on(again, ids), ours_on(model, ids)) <= TOLERANCE
    if name != "phi3":  # a magnitude needs an adapter on every part
        assert adapters(again).keys() == adapters(model).keys()


def test_names_are_those_of_the_base_folder(tmp_path: Path) -> None:
    """A Phi-3 without windows would be saved as a Llama; its adapter still fits the Phi-3 that it was trained on."""
    config = odd_phi3(1)
    base = transformers.AutoConfig.for_model(
        "phi3",
        **{"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3},
        **{
            "vocab_size": config.vocab_size,
            "max_position_embeddings": 32,
            "pad_token_id": None,
            "sliding_window": None,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        other = transformers.AutoModelForCausalLM.from_config(base, attn_implementation="eager").eval()
    other.save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base").eval()
    attach(model, PLAIN, seed=0)
    shaken(model)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    assert "self_attn.qkv_proj" in json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_modules"]
    ids = ids_for(model.config)
    assert (
        difference(theirs_on(peft.PeftModel.from_pretrained(other, tmp_path / "adapter"), ids), ours_on(model, ids))
        <= TOLERANCE
    )
    again = load_model(tmp_path / "base").eval()
    load_adapter(again, tmp_path / "adapter")
    assert difference(ours_on(again, ids), ours_on(model, ids)) <= TOLERANCE


HEADED = {
    **{
        f"{name}-class": (name, "class")
        for name in ("llama", "gpt2", "bert", "roberta", "distilbert", "electra", "modernbert")
    },
    **{f"{name}-span": (name, "span") for name in ("bert", "modernbert")},
}


@pytest.mark.parametrize("case", HEADED)
def test_task_heads_travel_with_the_adapter(case: str, tmp_path: Path) -> None:
    """The base has a head of its own, fresh; the adapter brings the trained one."""
    name, kind = HEADED[case]
    model = built(EVERY[name]).eval()
    attach_head(model, HeadConfig(kind, ("no", "yes", "may be") if kind == "class" else ()), seed=0)
    save_model(model, tmp_path / "base", pad_id=PAD)
    attach(model, PLAIN, seed=0)
    assert all(parameter.requires_grad for parameter in model.task_head.parameters())
    shaken(model)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    other = peft.PeftModel.from_pretrained(opened(tmp_path / "base"), tmp_path / "adapter").eval()
    ids = ids_for(model.config)
    again = load_model(tmp_path / "base").eval()
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        out = other(input_ids=ids, attention_mask=torch.ones_like(ids))
        ours, ours_again = (head_logits(m, ids, kind) for m in (model, again))
    theirs = out.logits if kind == "class" else torch.stack((out.start_logits, out.end_logits), dim=-1)
    assert difference(ours, theirs) <= TOLERANCE
    assert difference(ours, ours_again) <= TOLERANCE


def head_logits(model: Any, ids: Tensor, kind: str) -> Tensor:
    positions, documents = torch.arange(ids.shape[1]).expand(ids.shape), torch.zeros_like(ids)
    assert NO_DOCUMENT not in documents
    rest = (None,) if model.config.kind == "decoder" else (torch.zeros_like(ids),)
    states = model._hidden(ids, positions, documents, *rest)
    place = -1 if model.config.kind == "decoder" else 0
    return model.task_head(states[:, place] if kind == "class" else states)


@pytest.mark.parametrize(
    "name", ["gpt2 tied", "llama tied", "llama untied", "bert", "t5", "bart", "distilbert", "modernbert"]
)
def test_trained_embeddings_of_a_grown_vocabulary(name: str, tmp_path: Path) -> None:
    """The adapter holds the larger table; peft's base is resized first, ours grows by itself."""
    kind, _, tied = name.partition(" ")
    make = {"gpt2": gpt2, "llama": llama}.get(kind)
    model: Any = built(make(tie_embeddings=tied == "tied") if make else EVERY[kind]).eval()
    save_model(model, tmp_path / "base", pad_id=PAD)
    n = model.config.vocab_rows + 5
    resize_embeddings(model, n)
    attach(model, config_of(train_embeddings=True), seed=0)
    shaken(model)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    ids = ids_for(model.config)
    ids[:, 0] = n - 1
    other = opened(tmp_path / "base")
    other.resize_token_embeddings(n, mean_resizing=False)
    other = peft.PeftModel.from_pretrained(other, tmp_path / "adapter").eval()
    known = slice(0, n - 5 if name == "bart" else n)  # the bias of its new ids is zero there
    assert difference(theirs_on(other, ids)[..., known], ours_on(model, ids)[..., known]) <= TOLERANCE
    again = load_model(tmp_path / "base").eval()
    load_adapter(again, tmp_path / "adapter")
    assert difference(ours_on(again, ids), ours_on(model, ids)) <= TOLERANCE


WRAPPED = {
    "conv1d": wrapped("causal_lm", "gpt2", n_embd=16, n_layer=2, n_head=2),
    "opt": wrapped(
        "causal_lm",
        "opt",
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=32,
        word_embed_proj_dim=8,
    ),
    "t5": wrapped("seq2seq_lm", "t5", d_model=16, num_layers=2, num_heads=2, d_ff=32, d_kv=8),
    "mpnet": wrapped(
        "masked_lm", "mpnet", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    ),
}


@pytest.mark.parametrize(
    ("name", "style"),
    [
        pytest.param(name, style, marks=pytest.mark.slow if style == "rslora" else ())
        for name in WRAPPED
        for style in STYLES
    ],
)
def test_wrapped_models(name: str, style: str, tmp_path: Path) -> None:
    model = built_wrapped(WRAPPED[name])
    save_model(model, tmp_path / "base", pad_id=PAD)
    attach(model, config_of(train_embeddings=style == "lora", **STYLES[style]), seed=0)
    shaken(model)
    ids = ids_for(model.config)
    after = theirs_on(model.hf, ids)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    other = peft.PeftModel.from_pretrained(opened(tmp_path / "base"), tmp_path / "adapter").eval()
    assert difference(theirs_on(other, ids), after) <= TOLERANCE
    again = load_model(tmp_path / "base").eval()
    load_adapter(again, tmp_path / "adapter")
    assert difference(theirs_on(again.hf, ids), after) <= TOLERANCE
    merge(again)
    assert difference(theirs_on(again.hf, ids), after) <= TOLERANCE
