"""Low-rank adapters: what they compute, what is trained, merging, and files of models that only llmkit has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmkit.errors import CheckpointError, ConfigError
from llmkit.interfaces import Batch, Tokens
from llmkit.models.adapter_config import LoraConfig
from llmkit.models.adapters import adapters, attach, merge, trainable_report
from llmkit.models.head_config import HeadConfig
from llmkit.models.heads import attach_head
from llmkit.models.hf import load_model, save_model
from llmkit.models.hf.peft import load_adapter, save_adapter
from llmkit.models.hf.peft_names import compress, value_for
from tests.unit.models import tiny_seq2seq
from tests.unit.models.lstm_reference import lstm, seq2seq
from tests.unit.models.test_encoder_config import bert, modern
from tests.unit.models.tiny import built, gpt2, llama, random_ids

LORA = LoraConfig(3, 6, 0.0, ["all_linear"], use_rslora=False, use_dora=False, train_embeddings=False, train_head=True)
STYLES: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
MODELS: dict[str, Any] = {
    "llama": llama(n_kv_heads=2),
    "gpt2": gpt2(),
    "bert": bert(),
    "modernbert": modern(),
    "albert": bert(share_layers=True),
    "t5": tiny_seq2seq.t5(),
    "bart": tiny_seq2seq.bart(),
    "lstm": lstm(),
    "lstm_seq2seq": seq2seq(),
}
any_model = pytest.mark.parametrize("name", MODELS)
any_style = pytest.mark.parametrize("style", STYLES)


def config_of(**changes: Any) -> LoraConfig:
    return LoraConfig(**{**vars(LORA), **changes})


def adapted(name: str, seed: int = 0, **changes: Any) -> Any:
    """In evaluation mode; B and magnitudes as after training."""
    model: Any = built(MODELS[name]).eval()
    attach(model, config_of(**changes), seed)
    shake(model)
    return model


def shake(model: nn.Module, seed: int = 1, by: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def batch_of(config: Any) -> Batch:
    ids = random_ids(config, 2, 9)
    positions = torch.arange(9).expand(2, 9)
    source = Tokens(ids, positions, None) if config.kind == "encoder_decoder" else None
    segments = torch.zeros_like(ids)
    return Batch(ids, ids, positions, None, ids.numel(), segment_ids=segments, source=source)


def states(model: Any) -> Tensor:
    result: Tensor = model.hidden_states(batch_of(model.config))
    return result


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


# -- what is computed -----------------------------------------------------------------------------------------------


@any_style
@any_model
def test_an_attached_model_computes_what_it_did(name: str, style: str) -> None:
    """To the last bit, but for the lengths of DoRA. Attention has other kernels where gradients are asked for."""
    model: Any = built(MODELS[name]).eval()
    with torch.no_grad():
        before = states(model)
        attach(model, config_of(**STYLES[style]), seed=0)
        assert adapters(model)
        assert difference(states(model), before) <= (1e-5 if style == "dora" else 0)


@any_style
@any_model
def test_merged_equals_unmerged(name: str, style: str) -> None:
    model = adapted(name, **STYLES[style])
    names, after, n = list(adapters(model)), states(model), trainable_report(model)[1]
    plain: Any = built(MODELS[name]).eval()
    assert difference(after, states(plain)) > 1e-3
    assert merge(model) == len(names)
    assert difference(states(model), after) <= 1e-5
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert trainable_report(model)[1] == trainable_report(plain)[1] < n
    attach(model, LORA, seed=0)  # a second one is possible now


@settings(derandomize=True, max_examples=30, deadline=None)
@given(
    n_in=st.integers(1, 9),
    n_out=st.integers(1, 9),
    r=st.integers(1, 5),
    alpha=st.floats(0.5, 40),
    rs=st.booleans(),
    dora=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_formula(n_in: int, n_out: int, r: int, alpha: float, rs: bool, dora: bool, bias: bool, seed: int) -> None:
    """One layer in fp64 against ``(W + s B A) x + b``, rows brought to the length m for DoRA."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(n_in, n_out, bias=bias).double()
    model = nn.ModuleDict({"one": layer})
    weight, b = layer.weight.detach().clone(), layer.bias.detach().clone() if bias else None
    attach(model, config_of(r=r, alpha=alpha, targets=["one"], use_rslora=rs, use_dora=dora), seed)
    shake(model, seed, by=0.5)
    one: Any = layer
    full = weight + alpha / (r**0.5 if rs else r) * one.lora_B @ one.lora_A
    if dora:
        full = full * (one.lora_magnitude / (full**2).sum(1).sqrt())[:, None]
    x = torch.randn(4, n_in, dtype=torch.float64, generator=generator)
    assert torch.allclose(layer(x), F.linear(x, full, b), rtol=1e-9, atol=1e-9)


def test_dora_gives_the_length_no_gradient() -> None:
    """The gradient of A and B is that of ``m / c (W + s B A) x`` with c a constant (Liu et al. 2024, section 4.3)."""
    layer: Any = nn.Linear(5, 4).double()
    attach(nn.ModuleDict({"one": layer}), config_of(targets=["one"], use_dora=True), seed=0)
    shake(layer)
    x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer(x).pow(2).sum().backward()
    a, b, m = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude))
    matrix = layer.weight + 2 * b @ a
    (x @ (matrix * (m / matrix.norm(dim=1).detach())[:, None]).T + layer.bias).pow(2).sum().backward()
    for ours, theirs in ((layer.lora_A, a), (layer.lora_B, b), (layer.lora_magnitude, m)):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_dropout_is_on_the_adapter_alone() -> None:
    model: Any = built(MODELS["llama"])
    attach(model, config_of(dropout=0.9), seed=0)
    assert torch.equal(states(model.train()), states(model.eval()))  # B is zero
    shake(model)
    assert not torch.equal(states(model.train()), states(model.eval()))
    assert torch.equal(states(model.eval()), states(model.eval()))


def test_a_is_drawn_from_the_seed_and_b_is_zero() -> None:
    models = [built(MODELS["bert"]) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        attach(model, LORA, seed)
    one, same, other = (dict(model.named_parameters()) for model in models)
    for name in (name for name in one if name.endswith("lora_A")):
        assert torch.equal(one[name], same[name])
        assert not torch.equal(one[name], other[name])
        assert float(one[name].detach().abs().max()) <= one[name].shape[1] ** -0.5
        assert not one[name.replace("lora_A", "lora_B")].any()


def test_weights_of_16_bits_get_adapters_of_32() -> None:
    model: Any = built(MODELS["llama"]).bfloat16()
    attach(model, config_of(use_dora=True), seed=0)
    shake(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    after = states(model)
    assert after.dtype == torch.bfloat16
    merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert difference(states(model), after) <= 0.1 * float(after.detach().abs().max())


def test_under_autocast() -> None:
    model = adapted("llama", use_dora=True)
    full = states(model)
    with torch.autocast("cpu", torch.bfloat16):
        half = states(model)
    assert half.dtype == torch.bfloat16
    assert difference(half.float(), full) <= 0.05 * float(full.detach().abs().max())


@any_style
def test_activation_checkpointing_gives_the_same_gradients(style: str) -> None:
    """Where nothing that enters a block needs a gradient, adapters still get theirs."""
    found = []
    for on in (False, True):
        model = adapted("llama", **STYLES[style])
        model.set_activation_checkpointing(on)
        states(model).pow(2).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert None not in found[0].values()
    assert all(torch.allclose(found[0][name], found[1][name]) for name in found[0])


def test_a_cache_sees_the_same_model() -> None:
    model = adapted("llama", use_dora=True)
    ids = random_ids(model.config, 2, 8)
    cache = model.new_cache(2, 8)
    with torch.no_grad():
        steps = torch.cat([model(ids[:, i : i + 1], cache=cache) for i in range(8)], dim=1)
        assert difference(steps, model(ids)) <= 1e-5


# -- what is trained ------------------------------------------------------------------------------------------------


@any_style
@any_model
def test_all_adapters_move_and_nothing_else(name: str, style: str) -> None:
    """B after one step, A after two; A gets no gradient while B is zero."""
    model: Any = built(MODELS[name])
    attach(model, config_of(**STYLES[style]), seed=0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        (states(model) - 1).pow(2).mean().backward()
        optimizer.step()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        expected = {n for n in before if n.endswith(("lora_B", "lora_A") if step else "lora_B")}
        assert expected <= moved | no_effect(model)
        assert moved <= {n for n in before if ".lora_" in n}


def no_effect(model: Any) -> set[str]:
    """Parameters whose gradient is exactly zero."""
    return {n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()}


def test_the_report_counts_each_parameter_once() -> None:
    model: Any = built(MODELS["llama"])
    n = sum(p.numel() for p in model.parameters())
    attach(model, config_of(targets=["q", "mlp.down"]), seed=0)
    config = model.config
    D, width, ff = config.d_model, config.n_heads * config.head_width, config.ff_width
    added = config.n_layers * LORA.r * ((D + width) + (ff + D))
    assert trainable_report(model) == (added, n + added)


def test_all_linear_leaves_the_heads_alone() -> None:
    for name, outside in (("bert", ("transform", "pooler", "pair_head")), ("modernbert", ("transform",))):
        model: Any = built(MODELS[name])
        attach(model, LORA, seed=0)
        assert {name.partition(".")[0] for name in adapters(model)} == {"blocks"}
        assert all(hasattr(model, module) for module in outside)
    untied: Any = built(llama(tie_embeddings=False))
    attach(untied, LORA, seed=0)
    assert len(adapters(untied)) == 7 * untied.config.n_layers


def test_trained_whole() -> None:
    model: Any = built(bert())
    attach_head(model, HeadConfig("class", ("a", "b")), seed=0)
    attach(model, config_of(train_embeddings=True), seed=0)
    whole = {n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n}
    assert whole == {"embedding.weight", *(f"task_head.{n}" for n, _ in model.task_head.named_parameters())}
    for name, expected in (("llama", {"embedding.weight"}), ("bert", {"embedding.weight", "output_bias"})):
        model = built(MODELS[name])
        attach(model, config_of(train_embeddings=True), seed=0)
        assert {n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n} == expected
    model = built(llama(tie_embeddings=False))
    attach(model, config_of(train_embeddings=True), seed=0)
    assert model.head.weight.requires_grad


@pytest.mark.parametrize("target", ["query", "head", "c_attn", "norm"])
def test_a_target_that_fits_nothing(target: str) -> None:
    with pytest.raises(ConfigError, match=target) as caught:
        attach(built(llama(tie_embeddings=False)), config_of(targets=["q", target]), seed=0)
    assert "down, gate, k, o, q, up, v" in caught.value.fix


def test_two_adapters_at_once() -> None:
    model = adapted("llama")
    with pytest.raises(ConfigError, match="already"):
        attach(model, LORA, seed=0)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"r": 0}, "r"),
        ({"alpha": 0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": []}, "targets"),
        ({"targets": ["all_linear", "q"]}, "targets"),
    ],
)
def test_problems(change: dict[str, Any], field: str) -> None:
    assert LORA.problems() == []
    assert [name for name, _ in config_of(**change).problems()] == [field]


# -- files ----------------------------------------------------------------------------------------------------------


@any_style
@any_model
def test_a_folder_gives_the_adapter_back(name: str, style: str, tmp_path: Path) -> None:
    """Also of models that no other library knows; on a fresh base and on one that is attached already."""
    changes = {"train_embeddings": style == "lora", **STYLES[style]}
    model = adapted(name, **changes)
    save_adapter(model, tmp_path, "base")
    for attached in (False, True):
        again: Any = built(MODELS[name]).eval()
        if attached:
            attach(again, config_of(**changes), seed=9)
        load_adapter(again, tmp_path)
        ours, theirs = dict(model.named_parameters()), dict(again.named_parameters())
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[n], theirs[n], rtol=1e-6, atol=1e-7) for n in ours)
        assert {n for n in ours if ours[n].requires_grad} == {n for n in theirs if theirs[n].requires_grad}


def test_resume_before_the_first_step(tmp_path: Path) -> None:
    """B of zeros does not say which parts of a fused matrix have an adapter; the attached model does."""
    model: Any = built(MODELS["gpt2"])
    attach(model, config_of(targets=["q", "v"]), seed=3)
    save_adapter(model, tmp_path, "base")
    again: Any = built(MODELS["gpt2"])
    attach(again, config_of(targets=["q", "v"]), seed=4)
    load_adapter(again, tmp_path)
    ours, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_only_the_adapter_is_saved(tmp_path: Path) -> None:
    model = adapted("llama")
    save_adapter(model, tmp_path, "base")
    held = sum(tensor.numel() for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
    assert held == trainable_report(model)[0]
    keys = json.loads((tmp_path / "adapter_config.json").read_text())
    assert keys["target_modules"] == sorted(
        [*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
    )
    assert (keys["r"], keys["rank_pattern"], keys["base_model_name_or_path"]) == (3, {}, "base")


def edit(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


def rewrite(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    "other method": (rewrite(peft_type="IA3"), "IA3"),
    "biases": (rewrite(bias="all"), "bias"),
    "changed base": (rewrite(init_lora_weights="pissa"), "pissa"),
    "no rank": (rewrite(r=0), "r must be at least 1"),
    "odd alpha": (rewrite(alpha_pattern={"q_proj": -1}), "alpha_pattern"),
    "no B": (edit(lambda t: t.pop(f"{Q}B.weight")), "lora_B.weight is missing"),
    "unknown module": (edit(lambda t: t.update({f"{Q}C.weight": torch.ones(2)})), "lora_C"),
    "no prefix": (edit(lambda t: t.update({"x": torch.ones(2)})), "does not begin"),
    "A of another width": (edit(lambda t: t.update({f"{Q}A.weight": torch.ones(3, 5)})), "lora_A.weight has the shape"),
    "B of another height": (edit(lambda t: t.update({f"{Q}B.weight": torch.ones(5, 3)})), "the shape"),
    "B of another rank": (edit(lambda t: t.update({f"{Q}B.weight": torch.ones(24, 4)})), "the shape"),
    "not finite": (edit(lambda t: t[f"{Q}A.weight"].fill_(float("nan"))), "not finite"),
    "a norm": (edit(lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(24)})), "trained whole"),
    "no magnitude": (rewrite(use_dora=True), "lora_magnitude_vector is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder(case: str, tmp_path: Path) -> None:
    save_adapter(adapted("llama"), tmp_path, "base")
    spoil, message = BAD[case]
    spoil(tmp_path)
    model: Any = built(MODELS["llama"]).eval()
    before = states(model)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, tmp_path)
    assert not adapters(model)
    assert torch.equal(states(model), before)


def test_an_attached_model_of_another_shape(tmp_path: Path) -> None:
    save_adapter(adapted("llama"), tmp_path, "base")
    for changes, message in (({"r": 4}, "rank"), ({"alpha": 1}, "scale"), ({"targets": ["q"]}, "only the file")):
        model: Any = built(MODELS["llama"])
        attach(model, config_of(**changes), seed=0)
        with pytest.raises(CheckpointError, match=message):
            load_adapter(model, tmp_path)


def test_a_model_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapter"):
        save_adapter(built(llama()), tmp_path, "base")


def test_a_merged_model_is_an_ordinary_folder(tmp_path: Path) -> None:
    model = adapted("gpt2", use_dora=True)
    after = states(model)
    merge(model)
    save_model(model, tmp_path)
    assert difference(states(load_model(tmp_path).eval()), after) <= 1e-5


def test_endings_say_no_more_than_is_meant() -> None:
    known = ["x.0.a.dense", "x.1.a.dense", "x.0.dense", "x.1.dense", "pooler.dense"]
    assert compress({"x.0.a.dense": 1, "x.1.a.dense": 1}, known) == {"a.dense": 1}
    assert compress({"x.0.dense": 1, "x.1.dense": 1}, known) == {"x.0.dense": 1, "x.1.dense": 1}
    assert compress({"x.0.a.dense": 1, "x.1.a.dense": 2}, known) == {"x.0.a.dense": 1, "x.1.a.dense": 2}


def test_patterns_are_endings_or_whole_names() -> None:
    assert value_for("model.layers.0.q", {"k": 1, "layers.0.q": 2}, 0) == 2
    assert value_for("model.layers.0.q", {"^layers.0.q": 1, r"^model\.layers\.0\.q": 3}, 0) == 3
    assert value_for("model.layers.0.q", {"0.qq": 1, "ers.0.q": 1}, 0) == 0
