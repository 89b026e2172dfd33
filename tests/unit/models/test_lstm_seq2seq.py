"""The LSTM encoder-decoder against a plain one, its isolation on both sides, and its cache."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.errors import ConfigError
from llmkit.generation import generate
from llmkit.interfaces import NO_DOCUMENT, Batch, TokenIds, Tokens
from llmkit.models.lstm_seq2seq import LSTMSeq2Seq
from llmkit.models.lstm_seq2seq_config import LSTMSeq2SeqConfig
from llmkit.settings import GenerationConfig
from tests.token_ids import token_ids
from tests.unit.byte_tokenizer import ByteTokenizer
from tests.unit.models.lstm_reference import random_weights, seq2seq, seq2seq_logits
from tests.unit.models.test_decoder import autocast
from tests.unit.models.test_lstm import way  # noqa: F401  (a fixture)
from tests.unit.models.tiny import random_ids

STYLES = {
    "two_layers": seq2seq(),
    "wide": seq2seq(d_hidden=40, n_layers=1, tie_embeddings=False),
    "narrow": seq2seq(d_hidden=10, n_layers=3),
}
all_styles = pytest.mark.parametrize("config", STYLES.values(), ids=STYLES)

# Rows of ids of the source and of the target. The last target document of row 0 has no source; the documents of row 1
# stand in another order in the source.
SOURCE = torch.tensor([[0] * 5 + [1] * 9 + [2] * 4 + [NO_DOCUMENT] * 2, [3] * 11 + [2] + [NO_DOCUMENT] * 8])
TARGET = torch.tensor([[0] * 4 + [1] * 6 + [5] * 3, [2] * 3 + [3] * 6 + [NO_DOCUMENT] * 4])


def built(config: LSTMSeq2SeqConfig, seed: int = 0) -> LSTMSeq2Seq:
    model: LSTMSeq2Seq = random_weights(config.build(), seed)
    return model


def ids_of(config: LSTMSeq2SeqConfig) -> tuple[Tensor, Tensor]:
    return random_ids(config, 2, 20, seed=1), random_ids(config, 2, 13, seed=2)


def tokens(ids: Tensor, documents: Tensor | None) -> Tokens:
    return Tokens(ids, torch.zeros_like(ids), documents)


def packed_logits(model: LSTMSeq2Seq, source: Tensor, target: Tensor) -> Tensor:
    return model(tokens(source, SOURCE), target, torch.zeros_like(target), TARGET)


def pick(ids: Tensor, documents: Tensor, row: int, document: int) -> list[int]:
    return ids[row][documents[row] == document].tolist()


# -- numbers --------------------------------------------------------------------------------------------------------


@all_styles
@pytest.mark.usefixtures("way")
def test_logits_and_gradients_are_those_of_the_formulas(config: LSTMSeq2SeqConfig) -> None:
    """Packed rows against every pair of documents alone, token by token."""
    model, (source, target) = built(config), ids_of(config)
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    logits, got, expected = packed_logits(model, source, target), [], []
    for row in range(2):
        for document in sorted({*TARGET[row].tolist()} - {NO_DOCUMENT}):
            sides = pick(source, SOURCE, row, document), pick(target, TARGET, row, document)
            expected.append(seq2seq_logits(weights, config, *sides))
            got.append(logits[row][TARGET[row] == document])
    torch.testing.assert_close(torch.cat(got), torch.cat(expected), atol=1e-6, rtol=1e-6)
    torch.cat(got).square().mean().backward()
    torch.cat(expected).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, atol=1e-6, rtol=1e-5, msg=name)


@all_styles
def test_rows_of_one_document_need_no_document_ids(config: LSTMSeq2SeqConfig) -> None:
    model, (source, target) = built(config), ids_of(config)
    weights = dict(model.named_parameters())
    pairs = zip(source.tolist(), target.tolist(), strict=True)
    expected = torch.stack([seq2seq_logits(weights, config, *pair) for pair in pairs])
    zeros = torch.zeros_like(source), torch.zeros_like(target)
    for on_source, on_target in ((None, None), (zeros[0], None), (None, zeros[1]), zeros):
        logits = model(tokens(source, on_source), target, None, on_target)
        torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)


def test_a_padded_source_equals_a_short_one() -> None:
    model, (source, target) = built(seq2seq()), ids_of(seq2seq())
    padding = torch.where(torch.arange(20) < 14, 0, NO_DOCUMENT).expand(2, -1)
    expected = model(tokens(source[:, :14], None), target)
    torch.testing.assert_close(model(tokens(source, padding), target), expected, atol=1e-6, rtol=1e-6)


def test_hidden_states_of_a_batch_give_the_logits() -> None:
    model, (source, target) = built(seq2seq()), ids_of(seq2seq())
    batch = Batch(target, target, torch.zeros_like(target), TARGET, 0, source=tokens(source, SOURCE))
    hidden = model.hidden_states(batch)
    logits = F.linear(model.output_states(hidden), model.output_weight_VD)
    assert torch.equal(logits, packed_logits(model, source, target))
    assert model.output_bias_V is None
    with pytest.raises(ConfigError, match="nothing to read"):
        model.hidden_states(Batch(target, target, target, None, 0))


@all_styles
def test_bf16_autocast_stays_near_fp32(config: LSTMSeq2SeqConfig) -> None:
    model, sides = built(config), ids_of(config)
    exact = packed_logits(model, *sides).detach()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = packed_logits(model, *sides)
    rounded.float().sum().backward()
    assert rounded.dtype == torch.bfloat16
    assert float((rounded - exact).abs().max().detach()) < 0.03 * float(exact.abs().max())


# -- isolation ------------------------------------------------------------------------------------------------------


@all_styles
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.usefixtures("way")
def test_a_source_document_changes_nothing_but_its_target(config: LSTMSeq2SeqConfig, dtype: torch.dtype | None) -> None:
    model, (source, target) = built(config), ids_of(config)
    other = torch.where(SOURCE == 1, (source + 1) % config.vocab_rows, source)
    with autocast(dtype), torch.no_grad():
        difference = (packed_logits(model, source, target) - packed_logits(model, other, target)).abs()
    assert float(difference[TARGET != 1].max()) == 0.0
    assert float(difference[TARGET == 1].amax(-1).min()) > 1e-3


@all_styles
@pytest.mark.usefixtures("way")
def test_a_target_document_changes_nothing_in_the_next(config: LSTMSeq2SeqConfig) -> None:
    model, (source, target) = built(config), ids_of(config)
    other = torch.where(TARGET == 1, (target + 1) % config.vocab_rows, target)
    with torch.no_grad():
        difference = (packed_logits(model, source, target) - packed_logits(model, source, other)).abs()
    assert float(difference[TARGET != 1].max()) == 0.0
    assert float(difference[TARGET == 1].amax(-1).min()) > 1e-3


@pytest.mark.usefixtures("way")
def test_the_gradients_of_a_document_stay_in_it() -> None:
    model, (source, target) = built(seq2seq()), ids_of(seq2seq())
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(lambda module, args, out: embedded.append(out) or out.retain_grad())
    hidden = model.hidden_states(Batch(target, target, target, TARGET, 0, source=tokens(source, SOURCE)))
    hidden[TARGET == 1].square().sum().backward()
    for side, documents in zip(embedded, (SOURCE, TARGET), strict=True):
        assert side.grad is not None
        assert float(side.grad[documents != 1].abs().max()) == 0.0
        assert float(side.grad[documents == 1].abs().min()) > 0.0


def test_rows_of_padding_alone_give_numbers() -> None:
    model, (source, target) = built(seq2seq()), ids_of(seq2seq())
    nothing = torch.full_like(source, NO_DOCUMENT), torch.full_like(target, NO_DOCUMENT)
    for documents in (nothing, (nothing[0], TARGET), (SOURCE, nothing[1])):
        model.zero_grad()
        logits = model(tokens(source, documents[0]), target, torch.zeros_like(target), documents[1])
        logits.sum().backward()
        assert bool(logits.isfinite().all())
        assert all(bool(p.grad is not None and p.grad.isfinite().all()) for p in model.parameters())


# -- weights and recomputation --------------------------------------------------------------------------------------


def test_fresh_weights_come_from_the_seed() -> None:
    models = [seq2seq().build() for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        model.init_weights(seed)
    first, same, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["encoder.back.0.weight_hh_l0"], other["encoder.back.0.weight_hh_l0"])
    assert first["encoder.back.0.bias_ih_l0"].tolist() == [0.0] * 12 + [1.0] * 12 + [0.0] * 24
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in seq2seq(d_model=8192).build().parameters())


def test_recomputation_changes_no_number() -> None:
    sides, results = ids_of(seq2seq()), []
    for on in (False, True):
        model = built(seq2seq())
        model.set_activation_checkpointing(on)
        loss = packed_logits(model, *sides).square().sum()
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    assert model.encoder.recompute
    assert model.decoder.recompute
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dropout_is_between_layers_and_at_both_ends() -> None:
    model, sides, places = built(seq2seq(dropout=0.25)), ids_of(seq2seq()), []
    for name, module in model.named_modules():
        assert not isinstance(module, torch.nn.LSTM) or module.dropout == 0
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.25
            module.register_forward_hook(lambda *_, name=name: places.append(name))
    packed_logits(model, *sides)
    assert places == ["dropout", "encoder.dropout", "dropout", "decoder.dropout", "dropout"]


def test_the_attention_alone_is_compiled() -> None:
    model = built(seq2seq())
    model.compile_blocks()
    assert [name for name, m in model.named_modules() if m._compiled_call_impl is not None] == ["attention"]


# -- cache ----------------------------------------------------------------------------------------------------------


@all_styles
@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_gives_the_logits_of_the_whole(config: LSTMSeq2SeqConfig, padded: bool) -> None:
    """Token by token, as text is generated; the sources may be of several lengths."""
    model, (source, target) = built(config), ids_of(config)
    documents = torch.where(torch.arange(20) < torch.tensor([[20], [9]]), 0, NO_DOCUMENT) if padded else None
    memory = model.encode(tokens(source, documents))
    whole, cache = model.decode(memory, target), model.new_cache(memory, 13)
    cuts = (0, 1, 2, 6, 7, 13)
    parts = [model.decode(memory, target[:, a:b], cache=cache) for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-6, rtol=1e-6)
    assert cache.length == cache.max_len == 13
    last = model.decode(memory, target, last_only=True)
    torch.testing.assert_close(last, whole[:, -1:], atol=1e-6, rtol=1e-6)


@all_styles
@pytest.mark.usefixtures("way")
def test_a_cache_keeps_documents_apart(config: LSTMSeq2SeqConfig) -> None:
    model, (source, target) = built(config), ids_of(config)
    whole, memory = packed_logits(model, source, target), model.encode(tokens(source, SOURCE))
    cache, positions, cuts = model.new_cache(memory, 13), torch.zeros_like(target), (0, 1, 3, 4, 5, 10, 13)
    parts = [model.decode(memory, target[:, a:b], positions[:, a:b], TARGET[:, a:b], cache) for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-6, rtol=1e-6)


class Bytes(ByteTokenizer):
    def token_ids(self) -> TokenIds:
        return token_ids(self.vocab_size, bos_id=self.bos_id, eos_id=self.eos_id, pad_id=self.pad_id)


@all_styles
def test_generated_text_is_the_same_with_and_without_a_cache(config: LSTMSeq2SeqConfig) -> None:
    """Prompts of several lengths, so that some sources end with padding; and each row as if it were alone."""
    model = built(replace(config, vocab_size=Bytes.vocab_size, max_seq_len=64))
    prompts, texts = ["One", "", "A longer prompt, and"], []
    for use_cache in (True, False):
        settings = GenerationConfig(
            **{"max_new_tokens": 24, "temperature": 0.0, "top_k": None, "top_p": None, "repetition_penalty": 9.0},
            **{"no_repeat_ngram_size": None, "n_beams": 1, "length_penalty": 1.0},
            **{"stop": [], "seed": 0, "use_cache": use_cache},
        )
        texts.append(generate(model, Bytes(), prompts, settings, device="cpu"))
    assert texts[0] == texts[1]
    assert texts[0] == [generate(model, Bytes(), [prompt], settings, device="cpu")[0] for prompt in prompts]
    assert len(set(texts[0])) == 3


def test_a_sequence_longer_than_the_model_is_refused() -> None:
    config = seq2seq(max_seq_len=8)
    model, (source, target) = built(config), ids_of(config)
    with pytest.raises(ConfigError, match="9 tokens do not fit into 8"):
        model(tokens(source[:, :8], None), target[:, :9])
