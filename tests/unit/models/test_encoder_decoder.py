"""The encoder-decoder's promises: isolation on both sides, packing, the cache, recomputation, its first weights."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.errors import ConfigError
from llmkit.interfaces import NO_DOCUMENT, Batch, Tokens
from llmkit.models.encoder_decoder import EncoderDecoder
from llmkit.models.encoder_decoder_config import EncoderDecoderConfig
from tests.unit.models.tiny_seq2seq import (
    STYLES,
    bart,
    batch_of,
    built,
    logits_of,
    marian,
    packed,
    padded,
    random_ids,
    t5,
    whole,
)

all_styles = pytest.mark.parametrize("config", STYLES.values(), ids=STYLES)

SOURCE, TARGET = [7, 9, 10], [5, 11, 3]  # documents of both sides; rows have 30 and 22 columns


def two_sides(config: EncoderDecoderConfig) -> tuple[Tokens, Tokens]:
    return packed(random_ids(config, 2, 30), SOURCE), packed(random_ids(config, 2, 22, seed=1), TARGET)


def changed(tokens: Tokens, columns: slice, config: EncoderDecoderConfig) -> Tokens:
    ids = tokens.input_ids.clone()
    ids[:, columns] = (ids[:, columns] + 1) % config.vocab_rows
    return replace(tokens, input_ids=ids)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


# -- isolation ------------------------------------------------------------------------------------------------------


@all_styles
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("side", ["source", "target"])
@torch.no_grad()
def test_a_document_changes_nothing_in_others(
    config: EncoderDecoderConfig, dtype: torch.dtype | None, side: str
) -> None:
    """Document 1 of a side replaced: the logits of documents 0 and 2 and of padding stay the same, bit for bit."""
    model, (source, target) = built(config), two_sides(config)
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
        before = logits_of(model, source, target)
        if side == "source":
            after = logits_of(model, changed(source, slice(7, 16), config), target)
        else:
            after = logits_of(model, source, changed(target, slice(5, 16), config))
    assert difference(before[:, :5], after[:, :5]) == difference(before[:, 16:], after[:, 16:]) == 0.0
    assert difference(before[:, 5:16], after[:, 5:16]) > 0.01


@all_styles
def test_packed_documents_equal_documents_alone_and_padded(config: EncoderDecoderConfig) -> None:
    model, (source, target) = built(config), two_sides(config)
    together = logits_of(model, source, target)
    starts, columns = (0, 7, 16), (0, 5, 16)
    for start, n, column, m in zip(starts, SOURCE, columns, TARGET, strict=True):
        ids, target_ids = source.input_ids[:, start : start + n], target.input_ids[:, column : column + m]
        alone = model(whole(ids), target_ids)
        torch.testing.assert_close(together[:, column : column + m], alone, atol=1e-5, rtol=0)
        fill = random_ids(config, 2, 4, seed=7)
        wide, wide_target = padded(torch.cat((ids, fill), 1), [n, n]), padded(torch.cat((target_ids, fill), 1), [m, m])
        torch.testing.assert_close(logits_of(model, wide, wide_target)[:, :m], alone, atol=1e-5, rtol=0)


@all_styles
def test_packed_and_padded_batches_give_the_same_gradients(config: EncoderDecoderConfig) -> None:
    """Losses summed over the real targets; to a millionth of the largest gradient."""
    gradients = []
    source, target = two_sides(config)
    for is_packed in (True, False):
        model = built(config)
        if is_packed:
            assert target.document_ids is not None
            real = target.document_ids != NO_DOCUMENT
            model.hidden_states(batch_of(source, target))[real].square().sum().backward()
        else:
            for start, n, column, m in zip((0, 7, 16), SOURCE, (0, 5, 16), TARGET, strict=True):
                ids = F.pad(source.input_ids[:, start : start + n], (0, 3))
                alone = whole(target.input_ids[:, column : column + m])
                model.hidden_states(batch_of(padded(ids, [n, n]), alone)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    largest = max(float(a.abs().max()) for a in gradients[0].values())
    for name, a in gradients[0].items():
        assert difference(a, gradients[1][name]) <= 1e-6 * largest, name


@all_styles
def test_the_gradients_of_a_target_stay_in_its_document(config: EncoderDecoderConfig) -> None:
    model, (source, target) = built(config), two_sides(config)
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(lambda module, args, out: embedded.append(out) or out.retain_grad())
    logits_of(model, source, target)[:, 5:16].square().sum().backward()
    for tensor, inside in zip(embedded, (slice(7, 16), slice(5, 16)), strict=True):
        assert tensor.grad is not None
        outside = tensor.grad.clone()
        outside[:, inside] = 0
        assert float(outside.abs().max()) == 0.0
        assert float(tensor.grad[:, inside].abs().min()) > 0.0


@all_styles
def test_a_target_without_a_source_gets_nothing_from_others(config: EncoderDecoderConfig) -> None:
    """Document 1 has no source, and a row is padding on one side alone: numbers everywhere, and 0 from elsewhere."""
    model, target = built(config), packed(random_ids(config, 2, 12, seed=1), [4, 5])
    ids = random_ids(config, 2, 9)
    documents = torch.tensor([[0] * 9, [0] * 4 + [2] * 5])
    positions = torch.tensor([list(range(9)), [*range(4), *range(5)]])
    source = Tokens(ids, positions, documents)
    logits = logits_of(model, source, target)
    logits.square().mean().backward()
    assert bool(logits.isfinite().all())
    assert all(bool(p.grad is not None and p.grad.isfinite().all()) for p in model.parameters())
    other = logits_of(model, changed(source, slice(0, 9), config), target)
    assert difference(logits[:, 4:], other[:, 4:]) == 0.0
    assert difference(logits[:, :4], other[:, :4]) > 0.01


# -- numbers --------------------------------------------------------------------------------------------------------


@all_styles
def test_hidden_states_of_a_batch_give_the_logits(config: EncoderDecoderConfig) -> None:
    model, (source, target) = built(config), two_sides(config)
    states = model.output_states(model.hidden_states(batch_of(source, target)).flatten(0, 1))
    logits = F.linear(states, model.output_weight_VD, model.output_bias_V).unflatten(0, (2, 22))
    assert torch.equal(logits, logits_of(model, source, target))
    memory = model.encode(source)
    last = model.decode(memory, target.input_ids, target.position_ids, target.document_ids, last_only=True)
    torch.testing.assert_close(last, logits[:, -1:], atol=1e-6, rtol=0)


def test_the_head_shares_the_embedding_only_when_tied() -> None:
    tied, untied = built(bart()), built(bart(tie_embeddings=False, head_bias=False))
    assert tied.output_weight_VD is tied.embedding.weight
    assert tied.output_bias_V is tied.output_bias is not None
    assert untied.head is not None
    assert untied.output_weight_VD is untied.head.weight
    assert untied.output_bias_V is None


def test_a_batch_without_a_source_is_refused() -> None:
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ConfigError, match="nothing to read"):
        built(t5()).hidden_states(Batch(ids, ids, ids, None, 3))


@all_styles
def test_bf16_autocast_stays_near_fp32_with_an_fp32_stream(config: EncoderDecoderConfig) -> None:
    model, (source, target) = built(config, std=0.1), two_sides(config)
    exact = logits_of(model, source, target).detach()
    streams: list[torch.dtype] = []
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        block.register_forward_hook(lambda module, args, out: streams.extend((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden_states(batch_of(source, target))
        rounded = logits_of(model, source, target).detach()
    assert set(streams) == {torch.float32}
    assert hidden.dtype == torch.bfloat16
    assert difference(rounded, exact) < 0.05 * float(exact.abs().max())


@all_styles
def test_a_model_of_bf16_weights_runs(config: EncoderDecoderConfig) -> None:
    model, (source, target) = built(config, std=0.1), two_sides(config)
    exact = logits_of(model, source, target).detach()
    rounded = logits_of(model.bfloat16(), source, target).detach()
    assert rounded.dtype == torch.bfloat16
    assert difference(rounded.float(), exact) < 0.1 * float(exact.abs().max())


# -- weights --------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_weights_and_touches_no_other_random_state() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    models = [t5().build() for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        model.init_weights(seed)
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


@pytest.mark.parametrize("make", [bart, marian])
def test_one_deviation_for_all_matrices(make: Any) -> None:
    model = make(d_model=64, init_std=0.05, max_seq_len=64).build()
    model.init_weights(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert parameter.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.05, rel=0.08), name


@pytest.mark.parametrize("config", [t5(vocab_size=512, d_model=64), bart(vocab_size=512)], ids=["t5", "bart"])
def test_fresh_weights_are_far_from_certain(config: EncoderDecoderConfig) -> None:
    """T5's logits start with unit variance, so its loss half a nat above the uniform one."""
    model = config.build()
    model.init_weights(0)
    ids = random_ids(config, 8, 32)
    loss = F.cross_entropy(model(whole(ids), ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    expected = math.log(512) + (0.5 if config.scale_logits else 0.0)
    assert float(loss.detach()) == pytest.approx(expected, abs=0.15)


def test_nothing_but_parameters_is_stored() -> None:
    for config in STYLES.values():
        model = config.build()
        assert list(model.buffers()) == []
        assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_a_model_of_any_size_is_built_without_memory() -> None:
    sizes: dict[str, Any] = {"d_model": 4096, "n_layers": 24, "n_decoder_layers": 24, "n_heads": 64, "d_head": 64}
    with torch.device("meta"):
        model = t5(**sizes, d_ff=10240, vocab_size=32128).build()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.max_seq_len == 40


# -- dropout and recomputation --------------------------------------------------------------------------------------


@all_styles
def test_dropout_works_in_training_mode_only(config: EncoderDecoderConfig) -> None:
    model, (source, target) = built(replace(config, dropout=0.5)), two_sides(config)
    exact = logits_of(built(config), source, target)
    torch.manual_seed(0)
    assert not torch.allclose(logits_of(model.train(), source, target), logits_of(model, source, target))
    assert torch.equal(logits_of(model.eval(), source, target), exact)


@all_styles
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(
    config: EncoderDecoderConfig, dropout: float
) -> None:
    (source, target), results = two_sides(config), []
    for on in (False, True):
        model = built(replace(config, dropout=dropout))
        model.set_activation_checkpointing(on)
        torch.manual_seed(3)
        loss = logits_of(model, source, target).square().mean()
        loss.backward()
        results.append([loss.detach(), torch.rand(3), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", [t5(), bart()], ids=["t5", "bart"])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_blocks_keep_names_numbers_and_isolation(config: EncoderDecoderConfig, checkpointing: bool) -> None:
    plain, model, (source, target) = built(config), built(config), two_sides(config)
    model.set_activation_checkpointing(checkpointing)
    model.compile_blocks()
    assert list(model.state_dict()) == list(plain.state_dict())
    a, b = logits_of(plain, source, target), logits_of(model, source, target)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for loss in (a.square().mean(), b.square().mean()):
        loss.backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)
    other = logits_of(model, changed(source, slice(7, 16), config), target)
    assert difference(other[:, :5], b[:, :5]) == difference(other[:, 16:], b[:, 16:]) == 0.0


# -- cache ----------------------------------------------------------------------------------------------------------


def in_parts(model: EncoderDecoder, source: Tokens, ids: Tensor, stops: tuple[int, ...]) -> Tensor:
    memory = model.encode(source)
    cache, start, parts = model.new_cache(memory, ids.shape[1]), 0, []
    for stop in stops:
        parts.append(model.decode(memory, ids[:, start:stop], cache=cache))
        start = stop
    assert cache.length == cache.max_len == ids.shape[1]
    return torch.cat(parts, dim=1)


@all_styles
def test_a_cache_gives_the_logits_of_the_whole(config: EncoderDecoderConfig) -> None:
    model, ids = built(config), random_ids(config, 2, 20, seed=1)
    for source in (whole(random_ids(config, 2, 13)), padded(random_ids(config, 2, 13), [13, 4])):
        torch.testing.assert_close(
            in_parts(model, source, ids, (6, 7, 8, 13, 20)), model(source, ids), atol=1e-5, rtol=0
        )


@all_styles
def test_a_cache_keeps_documents_and_padding_apart(config: EncoderDecoderConfig) -> None:
    """Targets with padding on the left: no call of ours makes them, but the cache is a cache."""
    model, ids, source = built(config), random_ids(config, 2, 12), padded(random_ids(config, 2, 9, seed=1), [9, 5])
    documents = torch.tensor([[NO_DOCUMENT] * 3 + [0] * 9, [0] * 12])
    positions = (torch.arange(12) - torch.tensor([[3], [0]])).clamp(min=0)
    memory = model.encode(source)
    exact, cache = model.decode(memory, ids, positions, documents), model.new_cache(memory, 12)
    first = model.decode(memory, ids[:, :8], positions[:, :8], documents[:, :8], cache)
    rest = [model.decode(memory, ids[:, t : t + 1], positions[:, t : t + 1], None, cache) for t in range(8, 12)]
    torch.testing.assert_close(torch.cat([first, *rest], dim=1), exact, atol=1e-5, rtol=0)
    alone = model(Tokens(source.input_ids[:1], source.position_ids[:1], None), ids[:1, 3:])
    torch.testing.assert_close(exact[:1, 3:], alone, atol=1e-5, rtol=0)


def test_keys_and_values_of_the_source_are_computed_once() -> None:
    model, source = built(t5()), whole(random_ids(t5(), 1, 9))
    calls: list[int] = []
    for attention in model.decoder.cross_attentions():
        attention.k.register_forward_hook(lambda module, args, out: calls.append(args[0].shape[1]))
    memory = model.encode(source)
    cache = model.new_cache(memory, 5)
    for _ in range(5):
        model.decode(memory, torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    assert calls == [9] * len(model.decoder.blocks)


def test_a_target_longer_than_the_model_is_refused() -> None:
    model, source = built(t5(max_seq_len=8)), whole(random_ids(t5(), 1, 5))
    with pytest.raises(ConfigError, match="9 tokens do not fit into 8"):
        model(source, random_ids(t5(), 1, 9))
