"""The decoder's promises: isolation, determinism, the cache, recomputation, and what fp32 must stay fp32."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.errors import ConfigError
from llmkit.interfaces import NO_DOCUMENT, Batch
from llmkit.models.config import DecoderConfig
from llmkit.models.decoder import Decoder
from tests.unit.models.tiny import built, check_states_at, gpt2, llama, random_ids

STYLES = {
    "llama": llama(),
    "gpt2": gpt2(),
    "gqa": llama(n_kv_heads=2, d_head=10, attention_bias=True, tie_embeddings=False),
    "qk_norm": llama(qk_norm="head", n_kv_heads=1, activation="geglu"),
    "mixed": gpt2(norm="rmsnorm", norm_bias=False, activation="swiglu", n_kv_heads=2),
    "rotary_layernorm": llama(norm="layernorm", activation="gelu", mlp_bias=True),
    "gemma2": llama(
        **{"norm_position": "both", "activation": "geglu_tanh", "attention_windows": (4, None), "n_kv_heads": 2},
        **{"attention_softcap": 2.0, "logit_softcap": 3.0, "scale_embedding": True, "attention_scale_dim": 9},
    ),
    "gemma3": llama(
        **{"n_layers": 3, "norm_position": "both", "qk_norm": "head", "attention_windows": (3, 5, None)},
        **{"local_rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 8.0}},
    ),
    "olmo2": llama(norm_position="post", qk_norm="all", n_kv_heads=2),
    "neox": gpt2(position="rotary", rope_theta=1e4, rotary_fraction=0.5, d_head=8, parallel_residual=True),
    "mistral": llama(attention_windows=(5,), attention_bias=True),
    "dynamic": llama(rope_scaling={"type": "dynamic", "factor": 4.0, "original_len": 8}),
    "yarn": gpt2(position="rotary", rope_theta=1e4, rope_scaling={"type": "yarn", "factor": 4.0, "original_len": 8}),
    "learned_windows": gpt2(activation="relu", attention_windows=(None, 6), attention_out_bias=False),
}
all_styles = pytest.mark.parametrize("config", STYLES.values(), ids=STYLES)


def packed(ids: Tensor, lengths: list[int], padding: int = 0) -> dict[str, Tensor]:
    """Arguments for rows of documents of these lengths, filled up with padding."""
    positions = torch.cat([torch.arange(n) for n in lengths] + [torch.zeros(padding, dtype=torch.int64)])
    documents = torch.cat(
        [torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((padding,), NO_DOCUMENT, dtype=torch.int64)]
    )
    rows = ids.shape[0]
    return {
        "input_ids_BT": ids,
        "position_ids_BT": positions.expand(rows, -1),
        "document_ids_BT": documents.expand(rows, -1),
    }


@contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
        yield


# -- isolation ------------------------------------------------------------------------------------------------------


@all_styles
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_document_changes_nothing_in_the_next(config: DecoderConfig, dtype: torch.dtype | None) -> None:
    """Document 1 of a pack replaced: the logits of documents 0 and 2 and of padding stay the same, bit for bit."""
    model, ids, lengths = built(config), random_ids(config, 2, 30), [7, 9, 10]
    other = ids.clone()
    other[:, 7:16] = (other[:, 7:16] + 1) % config.vocab_rows
    with autocast(dtype), torch.no_grad():
        a, b = model(**packed(ids, lengths, 4)), model(**packed(other, lengths, 4))
    elsewhere = [*range(7), *range(16, 30)]
    assert float((a[:, elsewhere] - b[:, elsewhere]).abs().max()) == 0.0
    assert float((a[:, 7:16] - b[:, 7:16]).abs().max()) > 0.01


@all_styles
def test_a_packed_document_equals_one_alone(config: DecoderConfig) -> None:
    model, ids, lengths = built(config), random_ids(config, 2, 30), [7, 9, 10]
    whole = model(**packed(ids, lengths, 4))
    for start, stop in ((0, 7), (7, 16), (16, 26)):
        torch.testing.assert_close(whole[:, start:stop], model(ids[:, start:stop]), atol=1e-5, rtol=0)


@all_styles
def test_the_gradients_of_a_document_stay_in_it(config: DecoderConfig) -> None:
    model, ids = built(config), random_ids(config, 1, 20)
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(lambda module, args, out: embedded.append(out) or out.retain_grad())
    model(**packed(ids, [8, 12]))[:, 8:].square().sum().backward()
    assert embedded[0].grad is not None
    assert float(embedded[0].grad[:, :8].abs().max()) == 0.0
    assert float(embedded[0].grad[:, 8:].abs().min()) > 0.0


@all_styles
def test_rows_of_padding_alone_give_numbers(config: DecoderConfig) -> None:
    model, ids = built(config), random_ids(config, 2, 6)
    documents = torch.tensor([[NO_DOCUMENT] * 6, [NO_DOCUMENT] * 3 + [0] * 3])
    logits = model(ids, torch.zeros(2, 6, dtype=torch.int64), documents)
    logits.sum().backward()
    assert bool(logits.isfinite().all())
    assert all(bool(p.grad is not None and p.grad.isfinite().all()) for p in model.parameters())


# -- numbers --------------------------------------------------------------------------------------------------------


def test_hidden_states_of_a_batch_give_the_logits() -> None:
    config = llama(tie_embeddings=False)
    model, ids = built(config), random_ids(config, 2, 9)
    arguments = packed(ids, [4, 5])
    batch = Batch(ids, ids, arguments["position_ids_BT"], arguments["document_ids_BT"], 18)
    assert torch.equal(F.linear(model.hidden_states(batch), model.output_weight_VD), model(**arguments))
    assert model.logit_softcap is None
    capped = built(llama(tie_embeddings=False, logit_softcap=2.0))
    assert capped.logit_softcap == 2.0
    torch.testing.assert_close(capped(**arguments), 2 * (model(**arguments) / 2).tanh(), atol=1e-6, rtol=0)
    torch.testing.assert_close(model(**arguments, last_only=True), model(**arguments)[:, -1:], atol=1e-6, rtol=0)
    assert model.head is not None
    assert model.output_weight_VD is model.head.weight
    tied = built(llama())
    assert tied.output_weight_VD is tied.embedding.weight


@all_styles
def test_bf16_autocast_stays_near_fp32_with_fp32_norms(config: DecoderConfig) -> None:
    model, ids = built(config, std=0.1), random_ids(config, 2, 16)
    exact = model(ids).detach()
    inputs: list[torch.dtype] = []
    model.norm.register_forward_hook(lambda module, args, out: inputs.extend((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids).detach()
    assert inputs == [torch.float32, torch.bfloat16]  # the residual stream is fp32, products are bf16
    assert float((rounded - exact).abs().max()) < 0.05 * float(exact.abs().max())


def by_hand(config: DecoderConfig, x: Tensor) -> Tensor:
    """The first block without positions, in float64, as the papers write it."""
    block = built(config).double().blocks[0]
    f, g = (lambda x: block.attention(x, None, None)), block.mlp
    n1, n2 = block.attention_norm, block.mlp_norm
    if config.parallel_residual:
        return x + f(n1(x)) + g(n2(x))
    if config.norm_position == "pre":
        x = x + f(n1(x))
        return x + g(n2(x))
    if config.norm_position == "post":
        x = x + n1(f(x))
        return x + n2(g(x))
    x = x + block.attention_post_norm(f(n1(x)))
    return x + block.mlp_post_norm(g(n2(x)))


@pytest.mark.parametrize(
    "changes",
    [{}, {"norm_position": "post"}, {"norm_position": "both"}, {"parallel_residual": True}],
    ids=["pre", "post", "both", "parallel"],
)
def test_norms_stand_where_the_config_says(changes: dict[str, Any]) -> None:
    config = gpt2(**changes)
    model = built(config).double()
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(model.blocks[0](x, None, None), by_hand(config, x), atol=1e-6, rtol=1e-6)


def test_keys_of_queries_and_keys_are_normed_by_head_or_whole() -> None:
    """Before the heads are cut (OLMo 2) or in each of them (Qwen3)."""
    x = torch.randn(1, 3, 24, generator=torch.Generator().manual_seed(0))
    for kind, widths in (("head", (6, 6)), ("all", (24, 12))):
        attention = built(llama(qk_norm=kind, n_kv_heads=2)).blocks[0].attention
        assert (attention.q_norm.weight.shape[0], attention.k_norm.weight.shape[0]) == widths
        heads = attention._heads(attention.k(x), attention.k_norm) / attention.k_norm.weight.view(-1, 6)
        squares = heads.square().mean((-2, -1) if kind == "all" else -1)
        torch.testing.assert_close(squares, torch.ones_like(squares), atol=1e-3, rtol=0)


def test_a_layer_sees_as_far_as_its_window_and_no_further() -> None:
    """Two layers of windows 3 and 2 reach back 3 tokens; a null in the list reaches all."""
    for windows, reach in (((3, 2), 3), ((3,), 4), ((2, None), 11)):
        config = llama(attention_windows=windows, tie_embeddings=False)
        model, ids = built(config), torch.arange(12)[None]
        model(ids)[:, -1].square().sum().backward()
        felt = model.embedding.weight.grad[:12].abs().amax(1) > 0
        assert felt.tolist() == [t >= 11 - reach for t in range(12)]


def test_windows_no_shorter_than_the_sequence_change_nothing() -> None:
    config = llama(attention_windows=(12, None))
    ids = random_ids(config, 1, 12)
    assert torch.equal(built(config)(ids), built(llama())(ids))


def test_local_layers_have_their_own_theta_and_no_scaling() -> None:
    """All layers local: the same as a model of that theta alone."""
    scaling = {"type": "linear", "factor": 8.0}
    config = llama(attention_windows=(5,), local_rope_theta=50.0, rope_scaling=scaling)
    ids = random_ids(config, 1, 12)
    assert torch.equal(built(config)(ids), built(llama(attention_windows=(5,), rope_theta=50.0))(ids))
    shared = llama(attention_windows=(5,), rope_scaling=scaling)  # without it they are scaled like the others
    assert not torch.allclose(built(shared)(ids), built(llama(attention_windows=(5,)))(ids))


def test_embeddings_are_scaled_and_positions_are_not() -> None:
    plain, scaled = gpt2(tie_embeddings=False), gpt2(tie_embeddings=False, scale_embedding=True)
    ids, model = random_ids(plain, 1, 9), built(plain)
    with torch.no_grad():
        model.embedding.weight.mul_(24**0.5)
    torch.testing.assert_close(built(scaled)(ids), model(ids), atol=1e-5, rtol=0)


def test_the_scale_of_scores_is_the_roots() -> None:
    ids = random_ids(llama(), 1, 9)
    assert torch.equal(built(llama(attention_scale_dim=6))(ids), built(llama())(ids))
    narrow, model = llama(attention_scale_dim=24), built(llama())
    with torch.no_grad():
        for block in model.blocks:
            block.attention.q.weight.mul_(0.5)
    torch.testing.assert_close(built(narrow)(ids), model(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [llama(), gpt2()], ids=["llama", "gpt2"])
def test_norms_keep_their_statistics_in_fp32(config: DecoderConfig) -> None:
    """A mean far from 0 in bf16: statistics in bf16 would lose the deviation."""
    x = (100 + torch.randn(4, 24, generator=torch.Generator().manual_seed(0))).bfloat16()
    norm = built(config).norm
    exact = norm(x.float())
    assert torch.equal(norm.bfloat16().float()(x.float()), norm(x.float()))
    torch.testing.assert_close(norm(x).float(), exact, atol=0.02, rtol=0.02)


# -- weights --------------------------------------------------------------------------------------------------------


def parameters(model: Decoder) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_seed_gives_the_same_weights_and_touches_no_other_random_state() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    models = [gpt2().build() for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        model.init_weights(seed)
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (parameters(model) for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


@pytest.mark.parametrize(("scaled", "expected"), [(True, 0.05 / math.sqrt(2 * 8)), (False, 0.05)])
def test_the_initialisation_has_the_published_deviations(scaled: bool, expected: float) -> None:
    model = gpt2(d_model=64, n_layers=8, init_std=0.05, residual_init_scale=scaled).build()
    model.init_weights(0)
    for name, parameter in parameters(model).items():
        if parameter.dim() == 1:
            assert parameter.unique().tolist() == [0.0 if name.endswith("bias") else 1.0]
        else:
            wanted = expected if name.endswith((".o.weight", ".down.weight")) else 0.05
            assert float(parameter.std()) == pytest.approx(wanted, rel=0.05), name
            assert abs(float(parameter.mean())) < 4 * wanted / math.sqrt(parameter.numel())


def test_fresh_weights_predict_every_token_alike() -> None:
    config = gpt2(vocab_size=512)
    model = config.build()
    model.init_weights(0)
    ids = random_ids(config, 4, 32)
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert float(loss.detach()) == pytest.approx(math.log(512), abs=0.05)


def test_building_does_not_wake_the_compiler() -> None:
    """Importing it takes longer than training the first steps of a small model."""
    code = (
        "import sys\n"
        "from tests.unit.models.tiny import gpt2, llama, random_ids\n"
        "for config in (gpt2(), llama()):\n"
        "    model = config.build()\n"
        "    model.init_weights(0)\n"
        "    model(random_ids(config, 1, 4)).sum().backward()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_but_parameters_is_stored() -> None:
    model = llama().build()
    assert list(model.buffers()) == []
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


# -- dropout and recomputation --------------------------------------------------------------------------------------


def test_dropout_works_in_training_mode_only() -> None:
    config = gpt2(dropout=0.5)
    model, ids = built(config), random_ids(config, 2, 8)
    whole = built(gpt2())(ids)
    torch.manual_seed(0)
    assert not torch.allclose(model.train()(ids), model(ids))
    assert torch.equal(model.eval()(ids), whole)


def test_dropout_is_on_embeddings_attention_weights_and_what_blocks_add(monkeypatch: pytest.MonkeyPatch) -> None:
    model, places = built(llama(dropout=0.25)), []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.25
            module.register_forward_hook(lambda *_, name=name: places.append(name))
    attention = F.scaled_dot_product_attention

    def watched(*args: Any, dropout_p: float, **kwargs: Any) -> Tensor:
        places.append(str(dropout_p))
        return attention(*args, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    model(random_ids(model.config, 1, 4))
    assert places == [
        "dropout",
        *(place for i in range(2) for place in ["0.25", f"blocks.{i}.dropout", f"blocks.{i}.dropout"]),
    ]


@all_styles
@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_at_places_are_those_of_the_whole_pass(config: DecoderConfig, checkpointing: bool) -> None:
    model, ids = built(config), random_ids(config, 2, 20)
    model.set_activation_checkpointing(checkpointing)
    view = packed(ids, [9, 11])
    check_states_at(model, Batch(ids, ids, view["position_ids_BT"], view["document_ids_BT"], 0))


RECOMPUTED = {
    **{"llama": llama(dropout=0.3), "gpt2": gpt2(dropout=0.3), "plain": llama()},
    "gemma2": replace(STYLES["gemma2"], dropout=0.3),
    "dynamic": STYLES["dynamic"],
}


@pytest.mark.parametrize("config", RECOMPUTED.values(), ids=RECOMPUTED)
def test_activation_checkpointing_changes_neither_loss_nor_gradients(config: DecoderConfig) -> None:
    ids, results = random_ids(config, 2, 20), []
    for on in (False, True):
        model = built(config)
        model.set_activation_checkpointing(on)
        torch.manual_seed(3)
        loss = model(**packed(ids, [9, 11])).square().mean()
        loss.backward()
        results.append([loss.detach(), torch.rand(3), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


COMPILED = {
    "gqa": llama(n_kv_heads=2),
    "gemma2": replace(STYLES["gemma2"], n_layers=4, attention_windows=(4, 6)),
    "gemma3": replace(STYLES["gemma3"], n_layers=6),
    "neox": STYLES["neox"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "checkpointing"), [(COMPILED["gqa"], True), *((config, False) for config in COMPILED.values())]
)
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_blocks_keep_names_numbers_and_isolation(config: DecoderConfig, checkpointing: bool) -> None:
    """Blocks with other windows, norms and angles share the compilation too."""
    torch._dynamo.reset()
    plain, model = built(config), built(config)
    model.set_activation_checkpointing(checkpointing)
    model.compile_blocks()
    assert list(model.state_dict()) == list(plain.state_dict())
    ids, lengths = random_ids(config, 2, 26), [7, 9, 10]
    counts = torch._dynamo.utils.counters["stats"]
    before = counts["unique_graphs"]
    a, b = plain(**packed(ids, lengths)), model(**packed(ids, lengths))
    assert counts["unique_graphs"] - before == 1
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for loss in (a.square().mean(), b.square().mean()):
        loss.backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)
    other = ids.clone()
    other[:, :7] = (other[:, :7] + 1) % 61
    changed = model(**packed(other, lengths))
    assert float((changed[:, 7:] - b[:, 7:]).detach().abs().max()) == 0.0
    torch.testing.assert_close(model(ids, cache=model.new_cache(2, 26)), plain(ids), atol=1e-5, rtol=1e-5)


# -- cache ----------------------------------------------------------------------------------------------------------


def without_dynamic(config: DecoderConfig) -> DecoderConfig:
    """Under dynamic scaling a key keeps the angle of the length it was read at: no cache gives what the whole gives."""
    dynamic = config.rope_scaling is not None and config.rope_scaling["type"] == "dynamic"
    return replace(config, rope_scaling=None) if dynamic else config


@all_styles
def test_a_cache_gives_the_logits_of_the_whole(config: DecoderConfig) -> None:
    config = without_dynamic(config)
    model, ids = built(config), random_ids(config, 2, 20)
    whole, cache = model(ids), model.new_cache(2, 20)
    parts = [model(ids[:, start:stop], cache=cache) for start, stop in ((0, 6), (6, 7), (7, 8), (8, 13), (13, 20))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)
    assert cache.length == cache.max_len == 20


def test_under_dynamic_scaling_each_step_has_the_angles_of_its_length() -> None:
    """Up to the trained length like the whole; after it, keys in the cache keep their angles."""
    config = STYLES["dynamic"]
    model, ids = built(config), random_ids(config, 1, 12)
    cache = model.new_cache(1, 12)
    steps = torch.cat([model(ids[:, t : t + 1], cache=cache) for t in range(12)], dim=1)
    torch.testing.assert_close(steps[:, :8], model(ids[:, :8]), atol=1e-5, rtol=0)
    assert float((steps[:, 8:] - model(ids)[:, 8:]).detach().abs().max()) > 1e-3
    one = model.new_cache(1, 12)  # in one pass there is one length
    torch.testing.assert_close(model(ids, cache=one), model(ids), atol=1e-5, rtol=0)


@all_styles
def test_a_cache_keeps_documents_and_padding_apart(config: DecoderConfig) -> None:
    config = without_dynamic(config)
    model, ids = built(config), random_ids(config, 2, 12)
    documents = torch.tensor([[NO_DOCUMENT] * 3 + [0] * 9, [0] * 12])
    positions = (torch.arange(12) - torch.tensor([[3], [0]])).clamp(min=0)
    whole, cache = model(ids, positions, documents), model.new_cache(2, 12)
    first = model(ids[:, :6], positions[:, :6], documents[:, :6], cache)
    parts = ((6, 7), (7, 8), (8, 11), (11, 12))
    rest = [model(ids[:, a:b], positions[:, a:b], None, cache) for a, b in parts]
    torch.testing.assert_close(torch.cat([first, *rest], dim=1), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole[:1, 3:], model(ids[:1, 3:]), atol=1e-5, rtol=0)


def test_a_sequence_longer_than_the_model_is_refused() -> None:
    config = llama(max_seq_len=8)
    model = built(config)
    with pytest.raises(ConfigError, match="9 tokens do not fit into 8"):
        model(random_ids(config, 1, 9))
    cache = model.new_cache(1, 16)
    model(random_ids(config, 1, 8), cache=cache)
    with pytest.raises(ConfigError, match="9 tokens do not fit into 8"):
        model(random_ids(config, 1, 1), cache=cache)


def test_a_model_of_any_size_is_built_without_memory() -> None:
    sizes: dict[str, Any] = {"d_model": 8192, "n_layers": 80, "n_heads": 64, "d_ff": 28672}
    with torch.device("meta"):
        model = llama(**sizes).build()
    assert all(parameter.is_meta for parameter in model.parameters())
