"""The encoder's promises: isolation, windows, shared layers, heads, recomputation, and what fp32 must stay fp32."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from safetensors.torch import load_file
from torch import Tensor

from llmkit.errors import ConfigError
from llmkit.interfaces import NO_DOCUMENT, Batch
from llmkit.models.encoder import Encoder
from llmkit.models.encoder_config import EncoderConfig
from llmkit.models.hf import load_config, load_model, save_model
from tests.unit.models.test_encoder_config import bert, electra, encoder_configs, modern
from tests.unit.models.tiny import built, check_states_at, random_ids

STYLES = {
    "bert": bert(),
    "modern": modern(),
    "albert": bert(n_layers=4, share_layers=True, n_segments=0),
    "shared_modern": modern(share_layers=True, local_window=5),
    "mixed": bert(norm_position="pre", activation="swiglu", n_layers=3, global_every=2, local_window=6),
    "electra": electra(),
    "wide_modern": modern(d_embedding=30, tie_embeddings=False),
    "post_rotary": modern(norm_position="post", tie_embeddings=False, local_rope_theta=None, head_bias=False),
}
all_styles = pytest.mark.parametrize("config", STYLES.values(), ids=STYLES)


def packed(ids: Tensor, lengths: list[int], padding: int = 0) -> dict[str, Tensor]:
    """Arguments for rows of documents of these lengths, filled up with padding; segments change within documents."""
    positions = torch.cat([torch.arange(n) for n in lengths] + [torch.zeros(padding, dtype=torch.int64)])
    documents = torch.cat(
        [torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((padding,), NO_DOCUMENT, dtype=torch.int64)]
    )
    rows = ids.shape[0]
    return {
        "input_ids_BT": ids,
        "position_ids_BT": positions.expand(rows, -1),
        "document_ids_BT": documents.expand(rows, -1),
        "segment_ids_BT": (positions > 3).long().expand(rows, -1),
    }


@contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
        yield


# -- isolation ------------------------------------------------------------------------------------------------------


@all_styles
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_document_changes_nothing_in_the_others(config: EncoderConfig, dtype: torch.dtype | None) -> None:
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
def test_a_packed_document_equals_one_alone_and_one_padded(config: EncoderConfig) -> None:
    model, ids, lengths = built(config), random_ids(config, 2, 30), [7, 9, 10]
    arguments = packed(ids, lengths, 4)
    whole = model(**arguments)
    for start, stop in ((0, 7), (7, 16), (16, 26)):
        segments = arguments["segment_ids_BT"][:, start:stop]
        alone = model(ids[:, start:stop], segment_ids_BT=segments)
        torch.testing.assert_close(whole[:, start:stop], alone, atol=1e-5, rtol=0)
        rows = torch.cat([ids[:, start:stop], ids[:, :5]], dim=1)
        padded = model(**packed(rows, [stop - start], 5))[:, : stop - start]
        torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)


@all_styles
def test_the_gradients_of_packed_documents_equal_those_of_padded_ones(config: EncoderConfig) -> None:
    """The same three documents in one row, and in three rows of the longest one's length."""
    lengths, ids = [7, 9, 10], random_ids(config, 1, 26)
    pieces = ids.split(lengths, dim=1)
    rows = [packed(F.pad(piece, (0, 10 - n)), [n], 10 - n) for piece, n in zip(pieces, lengths, strict=True)]
    padded = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    results = []
    for arguments in (packed(ids, lengths), padded):
        model = built(config, std=0.1)
        real = arguments["document_ids_BT"] != NO_DOCUMENT
        model(**arguments)[real].square().mean().backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double())
    assert float((results[0] - results[1]).norm() / results[1].norm()) <= 1e-6


@all_styles
def test_the_gradients_of_a_document_stay_in_it(config: EncoderConfig) -> None:
    model, ids = built(config), random_ids(config, 1, 20)
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(lambda module, args, out: embedded.append(out) or out.retain_grad())
    model(**packed(ids, [8, 12]))[:, 8:].square().sum().backward()
    assert embedded[0].grad is not None
    assert float(embedded[0].grad[:, :8].abs().max()) == 0.0
    assert float(embedded[0].grad[:, 8:].abs().min()) > 0.0


@all_styles
def test_rows_of_padding_alone_give_numbers(config: EncoderConfig) -> None:
    model, ids = built(config), random_ids(config, 2, 6)
    documents = torch.tensor([[NO_DOCUMENT] * 6, [NO_DOCUMENT] * 3 + [0] * 3])
    logits = model(ids, torch.zeros(2, 6, dtype=torch.int64), documents)
    logits.sum().backward()
    assert bool(logits.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


# -- what layers see ------------------------------------------------------------------------------------------------


def reached(config: EncoderConfig, column: int, **changes: Any) -> list[int]:
    """Columns whose logits change with the token of one column, the attention of the first, global layer silenced."""
    model, ids = built(config), random_ids(config, 1, 30)
    with torch.no_grad():
        model.blocks[0].attention.o.weight.zero_()
        other = ids.clone()
        other[0, column] = (other[0, column] + 1) % config.vocab_rows
        difference = model(ids, **changes) - model(other, **changes)
    return difference[0].abs().amax(-1).nonzero().flatten().tolist()


@pytest.mark.parametrize(("window", "reach"), [(8, 4), (7, 3), (1, 0), (100, 29)])
def test_a_local_layer_sees_half_a_window_on_either_side(window: int, reach: int) -> None:
    config = modern(n_layers=2, local_window=window)
    assert reached(config, 12) == list(range(max(0, 12 - reach), min(30, 13 + reach)))


def test_a_window_ends_with_its_document() -> None:
    documents = torch.tensor([[0] * 10 + [1] * 20])
    assert reached(modern(n_layers=2), 11, document_ids_BT=documents) == list(range(10, 16))


def test_layers_are_global_in_turn() -> None:
    assert [modern().is_global(layer) for layer in range(7)] == [True, False, False, True, False, False, True]
    assert len(reached(modern(n_layers=4), 12)) == 30  # layer 3 is global again


def test_local_and_global_layers_turn_by_their_own_theta() -> None:
    """One base for both is what null says; another base in either kind of layer gives other numbers."""
    ids, same = random_ids(modern(), 1, 30), {"rope_theta": 1e4, "local_rope_theta": None}
    plain = built(modern(**same))(ids)
    assert torch.equal(plain, built(modern(**{**same, "local_rope_theta": 1e4}))(ids))
    for other in ({**same, "local_rope_theta": 1e3}, {"rope_theta": 1e3, "local_rope_theta": 1e4}):
        assert not torch.allclose(plain, built(modern(**other))(ids), atol=1e-3)


def test_a_token_sees_both_sides() -> None:
    model, ids = built(bert()), random_ids(bert(), 1, 10)
    other = ids.clone()
    other[0, 5] = (other[0, 5] + 1) % 61
    assert bool(((model(ids) - model(other)).abs().amax(-1) > 1e-4).all())


def test_segments() -> None:
    """None is segment 0 everywhere; a table of one, or none, takes no notice."""
    ids, ones = random_ids(bert(), 1, 10), torch.ones(1, 10, dtype=torch.int64)
    model = built(bert())
    assert torch.equal(model(ids), model(ids, segment_ids_BT=0 * ones))
    assert not torch.allclose(model(ids), model(ids, segment_ids_BT=ones), atol=1e-3)
    for n_segments in (0, 1):
        model = built(bert(n_segments=n_segments))
        assert torch.equal(model(ids), model(ids, segment_ids_BT=ones))


def test_shared_layers_are_one_block_used_again() -> None:
    """The same as blocks of their own with equal weights, whose gradients add up."""
    for make in (bert, modern):
        shared, own = built(make(n_layers=3, share_layers=True)), make(n_layers=3, norm_position="post").build()
        assert len(shared.blocks) == 1
    shared = built(bert(n_layers=3, share_layers=True))
    own = bert(n_layers=3).build()
    state = shared.state_dict()
    own.load_state_dict({name: state[_of_block_0(name)] for name in own.state_dict()})
    ids = random_ids(bert(), 2, 20)
    a, b = shared(ids), own(ids)
    assert torch.equal(a, b)
    for loss in (a.square().mean(), b.square().mean()):
        loss.backward()
    sums: dict[str, Tensor] = {}
    for name, parameter in own.named_parameters():
        if parameter.grad is not None:
            sums[_of_block_0(name)] = sums.get(_of_block_0(name), torch.zeros(())) + parameter.grad
    for name, parameter in shared.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, sums[name], atol=1e-5, rtol=1e-4)


def _of_block_0(name: str) -> str:
    kind, _, rest = name.partition(".")
    return f"blocks.0.{rest.partition('.')[2]}" if kind == "blocks" else name


# -- heads ----------------------------------------------------------------------------------------------------------


@all_styles
def test_hidden_states_of_a_batch_give_the_logits(config: EncoderConfig) -> None:
    model, ids = built(config), random_ids(config, 2, 9)
    arguments = packed(ids, [4, 5])
    batch = Batch(ids, ids, arguments["position_ids_BT"], arguments["document_ids_BT"], 18, arguments["segment_ids_BT"])
    states = model.output_states(model.hidden_states(batch).flatten(0, 1))
    logits = F.linear(states, model.output_weight_VD, model.output_bias_V)
    torch.testing.assert_close(logits.unflatten(0, (2, 9)), model(**arguments), atol=1e-6, rtol=0)
    assert (model.output_weight_VD is model.embedding.weight) == config.tie_embeddings
    assert (model.output_bias_V is not None) == config.head_bias


def test_the_pair_head_reads_first_tokens_by_the_formula() -> None:
    model, hidden = built(bert()), torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    pooled = torch.tanh(hidden @ model.pooler.weight.T + model.pooler.bias)
    expected = pooled @ model.pair_head.weight.T + model.pair_head.bias
    torch.testing.assert_close(model.pair_logits(hidden), expected)
    with pytest.raises(ConfigError, match="no head for sentence pairs") as error:
        built(modern()).pair_logits(hidden)
    assert error.value.where == "model.pooler"


@all_styles
def test_bf16_autocast_stays_near_fp32_with_an_fp32_stream(config: EncoderConfig) -> None:
    """What is added up over the layers is fp32, products are bf16."""
    model, ids = built(config, std=0.1), random_ids(config, 2, 16)
    exact = model(ids).detach()
    streams: list[torch.dtype] = []
    products: list[torch.dtype] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: streams.extend((args[0].dtype, out.dtype)))
        block.attention.register_forward_hook(lambda module, args, out: products.extend((args[0].dtype, out.dtype)))
        block.mlp.register_forward_hook(lambda module, args, out: products.extend((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids).detach()
        batch = Batch(ids, ids, torch.arange(16).expand(2, -1), None, 32)
        assert model.hidden_states(batch).dtype == torch.bfloat16
    assert set(streams) == {torch.float32}
    assert set(products) == {torch.bfloat16}
    assert float((rounded - exact).abs().max()) < 0.05 * float(exact.abs().max())


@all_styles
def test_weights_in_bf16_run_without_autocast(config: EncoderConfig) -> None:
    model, ids = built(config, std=0.1), random_ids(config, 2, 16)
    exact = model(ids).detach()
    rounded = model.bfloat16()(**packed(ids, [9, 7])).detach()
    assert rounded.dtype == torch.bfloat16
    assert float((model(ids).detach().float() - exact).abs().max()) < 0.1 * float(exact.abs().max())


# -- weights --------------------------------------------------------------------------------------------------------


def parameters(model: Encoder) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_seed_gives_the_same_weights_and_touches_no_other_random_state() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    models = [bert().build() for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        model.init_weights(seed)
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (parameters(model) for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


@pytest.mark.parametrize(("scaled", "expected"), [(True, 0.05 / math.sqrt(2 * 8)), (False, 0.05)])
@pytest.mark.parametrize("share_layers", [False, True])
def test_the_initialisation_has_the_published_deviations(scaled: bool, expected: float, share_layers: bool) -> None:
    changes: dict[str, Any] = {"d_model": 64, "n_layers": 8, "init_std": 0.05, "share_layers": share_layers}
    model = bert(**changes, n_segments=40, residual_init_scale=scaled).build()
    model.init_weights(0)
    for name, parameter in parameters(model).items():
        if parameter.dim() == 1:
            assert parameter.unique().tolist() == [0.0 if name.endswith("bias") else 1.0]
        else:
            wanted = expected if name.endswith((".o.weight", ".down.weight")) else 0.05
            assert abs(float(parameter.std()) - wanted) < 4 * wanted / math.sqrt(2 * parameter.numel()), name
            assert abs(float(parameter.mean())) < 4 * wanted / math.sqrt(parameter.numel()), name


@pytest.mark.parametrize("config", [bert(vocab_size=512), modern(vocab_size=512)], ids=["bert", "modern"])
def test_fresh_weights_predict_every_token_alike(config: EncoderConfig) -> None:
    model = config.build()
    model.init_weights(0)
    ids = random_ids(config, 4, 32)
    loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    assert float(loss.detach()) == pytest.approx(math.log(512), abs=0.1)


def test_nothing_but_parameters_is_stored() -> None:
    for config in STYLES.values():
        model = config.build()
        assert list(model.buffers()) == []
        assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_a_model_of_any_size_is_built_without_memory() -> None:
    with torch.device("meta"):
        model = modern(d_model=8192, n_layers=80, n_heads=64).build()
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_sequence_longer_than_the_model_is_refused() -> None:
    config = bert(max_seq_len=8)
    with pytest.raises(ConfigError, match="9 tokens do not fit into 8"):
        built(config)(random_ids(config, 1, 9))


@settings(derandomize=True, max_examples=25, deadline=None)
@given(config=encoder_configs())
def test_every_config_and_weight_comes_back(tmp_path_factory: pytest.TempPathFactory, config: EncoderConfig) -> None:
    """From a folder in the format of Hugging Face, or in our own where no architecture has these options."""
    folder, model = tmp_path_factory.mktemp("model"), built(config)
    save_model(model, folder)
    loaded = load_model(folder)
    assert load_config(folder) == loaded.config == config
    pairs = zip(model.named_parameters(), loaded.named_parameters(), strict=True)
    assert all(x == y and torch.equal(p, q) for (x, p), (y, q) in pairs)


def test_shared_layers_are_saved_once_in_our_own_format(tmp_path: Path) -> None:
    model = built(STYLES["albert"])
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llmkit_encoder"
    assert (
        sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values()) == model.config.n_params()
    )


# -- dropout and recomputation --------------------------------------------------------------------------------------


def test_dropout_works_in_training_mode_only() -> None:
    config = bert(dropout=0.5)
    model, ids = built(config), random_ids(config, 2, 8)
    whole = built(bert())(ids)
    torch.manual_seed(0)
    assert not torch.allclose(model.train()(ids), model(ids))
    assert torch.equal(model.eval()(ids), whole)


@pytest.mark.parametrize("make", [bert, modern])
def test_dropout_is_on_embeddings_attention_weights_and_what_blocks_add(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, places = built(make(dropout=0.25, n_layers=2)), []
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
def test_states_at_places_are_those_of_the_whole_pass(config: EncoderConfig, checkpointing: bool) -> None:
    model, ids = built(config), random_ids(config, 2, 20)
    model.set_activation_checkpointing(checkpointing)
    view = packed(ids, [9, 11])
    check_states_at(model, Batch(ids, ids, view["position_ids_BT"], view["document_ids_BT"], 0))


@pytest.mark.parametrize("config", [*STYLES.values(), bert(dropout=0.3), modern(dropout=0.3)])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(config: EncoderConfig) -> None:
    ids, results = random_ids(config, 2, 20), []
    for on in (False, True):
        model = built(config)
        model.set_activation_checkpointing(on)
        torch.manual_seed(3)
        loss = model(**packed(ids, [9, 11])).square().mean()
        loss.backward()
        results.append([loss.detach(), torch.rand(3), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("config", [modern(), bert(share_layers=True)], ids=["modern", "albert"])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_blocks_keep_names_numbers_and_isolation(config: EncoderConfig) -> None:
    plain, model = built(config), built(config)
    model.compile_blocks()
    assert list(model.state_dict()) == list(plain.state_dict())
    ids, lengths = random_ids(config, 2, 26), [7, 9, 10]
    a, b = plain(**packed(ids, lengths)), model(**packed(ids, lengths))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for loss in (a.square().mean(), b.square().mean()):
        loss.backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)
    other = ids.clone()
    other[:, :7] = (other[:, :7] + 1) % 61
    changed = model(**packed(other, lengths))
    assert float((changed[:, 7:] - b[:, 7:]).detach().abs().max()) == 0.0
