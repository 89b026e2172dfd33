"""The LSTM language model against a plain one, its isolation, its cache, and what it must not change."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.errors import ConfigError
from llmkit.generation import generate
from llmkit.interfaces import NO_DOCUMENT, Batch
from llmkit.models import lstm_layers
from llmkit.models.lstm import LSTMLanguageModel
from llmkit.models.lstm_config import LSTMConfig
from llmkit.settings import GenerationConfig
from tests.unit.byte_tokenizer import ByteTokenizer
from tests.unit.models.lstm_reference import lm_logits, lstm, random_weights
from tests.unit.models.test_decoder import autocast, packed
from tests.unit.models.tiny import random_ids

STYLES = {
    "attention": lstm(),
    "window": lstm(attention_window=3, tie_embeddings=False),
    "wide": lstm(d_hidden=40, n_layers=1),
    "plain": lstm(attention=False, n_layers=3),
    "projected": lstm(attention=False, d_hidden=10),
}
all_styles = pytest.mark.parametrize("config", STYLES.values(), ids=STYLES)
LENGTHS = [7, 9, 10]  # of the documents in a row of 30 with 4 of padding


@pytest.fixture(params=["stretches", "packed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two ways to keep documents apart, and not the other."""
    monkeypatch.setattr(lstm_layers, "MIN_STRETCH", 0 if request.param == "stretches" else 10**6)
    monkeypatch.delattr(lstm_layers, "_run_packed" if request.param == "stretches" else "_run_stretches")


def built(config: LSTMConfig, seed: int = 0) -> LSTMLanguageModel:
    model: LSTMLanguageModel = random_weights(config.build(), seed)
    return model


def documents_of(ids: Tensor, lengths: list[int]) -> list[list[list[int]]]:
    """Ids of each document of each row."""
    return [[part.tolist() for part in row[: sum(lengths)].split(lengths)] for row in ids]


# -- numbers --------------------------------------------------------------------------------------------------------


@all_styles
@pytest.mark.usefixtures("way")
def test_logits_and_gradients_are_those_of_the_formulas(config: LSTMConfig) -> None:
    """Packed rows against every document alone, token by token."""
    model, ids = built(config), random_ids(config, 2, 30)
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    expected = [torch.cat([lm_logits(weights, config, d) for d in row]) for row in documents_of(ids, LENGTHS)]
    logits = model(**packed(ids, LENGTHS, 4))[:, :26]
    torch.testing.assert_close(logits, torch.stack(expected), atol=1e-6, rtol=1e-6)
    logits.square().mean().backward()
    torch.stack(expected).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, atol=1e-6, rtol=1e-5, msg=name)


@all_styles
def test_rows_of_one_document_need_no_document_ids(config: LSTMConfig) -> None:
    model, ids = built(config), random_ids(config, 3, 12)
    expected = torch.stack([lm_logits(dict(model.named_parameters()), config, row.tolist()) for row in ids])
    torch.testing.assert_close(model(ids), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model(ids, None, torch.zeros_like(ids)), model(ids), atol=1e-6, rtol=1e-6)


def test_hidden_states_of_a_batch_give_the_logits() -> None:
    config = lstm(tie_embeddings=False)
    model, ids = built(config), random_ids(config, 2, 9)
    arguments = packed(ids, [4, 5])
    batch = Batch(ids, ids, arguments["position_ids_BT"], arguments["document_ids_BT"], 18)
    hidden = model.hidden_states(batch)
    assert torch.equal(F.linear(model.output_states(hidden), model.output_weight_VD), model(**arguments))
    torch.testing.assert_close(model(**arguments, last_only=True), model(**arguments)[:, -1:], atol=1e-6, rtol=0)
    assert model.output_bias_V is None
    assert model.head is not None
    assert model.output_weight_VD is model.head.weight
    tied = built(lstm())
    assert tied.output_weight_VD is tied.embedding.weight


@all_styles
def test_bf16_autocast_stays_near_fp32(config: LSTMConfig) -> None:
    """On a CPU the recurrence itself stays in fp32."""
    model, ids = built(config), random_ids(config, 2, 26)
    exact = model(**packed(ids, LENGTHS)).detach()
    kinds: list[torch.dtype] = []
    model.lstm.register_forward_hook(lambda module, args, out: kinds.append(out[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**packed(ids, LENGTHS))
        model(ids)
    rounded.float().sum().backward()
    assert kinds == [torch.float32] * 2
    assert rounded.dtype == torch.bfloat16
    assert float((rounded - exact).abs().max().detach()) < 0.03 * float(exact.abs().max())


def test_weights_in_bf16_run() -> None:
    model, ids = built(lstm()), random_ids(lstm(), 2, 26)
    exact = model(**packed(ids, LENGTHS)).detach()
    rounded = model.bfloat16()(**packed(ids, LENGTHS)).detach()
    assert float((rounded - exact).abs().max()) < 0.05 * float(exact.abs().max())


# -- isolation ------------------------------------------------------------------------------------------------------


@all_styles
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.usefixtures("way")
def test_a_document_changes_nothing_in_the_next(config: LSTMConfig, dtype: torch.dtype | None) -> None:
    """Document 1 of a pack replaced: the logits of documents 0 and 2 and of padding stay the same, bit for bit."""
    model, ids = built(config), random_ids(config, 2, 30)
    other = ids.clone()
    other[:, 7:16] = (other[:, 7:16] + 1) % config.vocab_rows
    with autocast(dtype), torch.no_grad():
        a, b = model(**packed(ids, LENGTHS, 4)), model(**packed(other, LENGTHS, 4))
    elsewhere = [*range(7), *range(16, 30)]
    assert float((a[:, elsewhere] - b[:, elsewhere]).abs().max()) == 0.0
    assert float((a[:, 7:16] - b[:, 7:16]).abs().max()) > 0.01


@all_styles
@pytest.mark.usefixtures("way")
def test_the_gradients_of_a_document_stay_in_it(config: LSTMConfig) -> None:
    model, ids = built(config), random_ids(config, 1, 20)
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(lambda module, args, out: embedded.append(out) or out.retain_grad())
    hidden = model.hidden_states(Batch(ids, ids, ids, packed(ids, [8, 12])["document_ids_BT"], 0))
    hidden[:, 8:].square().sum().backward()
    assert embedded[0].grad is not None
    assert float(embedded[0].grad[:, :8].abs().max()) == 0.0
    assert float(embedded[0].grad[:, 8:].abs().min()) > 0.0


@all_styles
def test_nothing_is_seen_of_the_future(config: LSTMConfig) -> None:
    model, ids = built(config), random_ids(config, 2, 12)
    other = ids.clone()
    other[:, 6] = (other[:, 6] + 1) % 61
    difference = (model(ids) - model(other)).detach().abs()
    assert float(difference[:, :6].max()) == 0.0
    assert float(difference[:, 6:].amax(-1).min()) > 0.0


@all_styles
def test_rows_of_padding_alone_give_numbers(config: LSTMConfig) -> None:
    model, ids = built(config), random_ids(config, 2, 6)
    nothing = torch.full((2, 6), NO_DOCUMENT)
    half = torch.tensor([[NO_DOCUMENT] * 6, [NO_DOCUMENT] * 3 + [0] * 3])
    for documents in (nothing, half):
        model.zero_grad()
        logits = model(ids, torch.zeros_like(ids), documents)
        logits.sum().backward()
        assert bool(logits.isfinite().all())
        assert all(bool(p.grad is not None and p.grad.isfinite().all()) for p in model.parameters())


# -- weights --------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_weights_and_touches_no_other_random_state() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    models = [lstm().build() for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        model.init_weights(seed)
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_the_initialisation_is_the_cited_one() -> None:
    model = lstm(d_model=48, d_hidden=32, tie_embeddings=False, init_range=0.07).build()
    model.init_weights(0)
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if name.endswith("bias_ih_l0"):
            assert value.tolist() == [0.0] * 32 + [1.0] * 32 + [0.0] * 64
        elif name.endswith("bias_hh_l0"):
            assert not value.any()
        elif name.endswith("weight_hh_l0"):
            for gate in value.chunk(4):
                torch.testing.assert_close(gate @ gate.T, torch.eye(32), atol=1e-5, rtol=0)
        else:
            gates = 4 if name.endswith("weight_ih_l0") else 1
            glorot = math.sqrt(6 / (value.shape[0] / gates + value.shape[1]))
            limit = 0.07 if name in ("embedding.weight", "head.weight") else glorot
            assert 0.98 * limit < float(value.abs().max()) <= limit, name
            assert float(value.std()) == pytest.approx(limit / math.sqrt(3), rel=0.05), name


def test_fresh_weights_predict_every_token_alike() -> None:
    config = lstm(vocab_size=512, d_model=64)
    model = config.build()
    model.init_weights(0)
    ids = random_ids(config, 4, 32)
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert float(loss.detach()) == pytest.approx(math.log(512), abs=0.05)


def test_building_does_not_wake_the_compiler() -> None:
    code = (
        "import sys\n"
        "from tests.unit.models.lstm_reference import lstm\n"
        "from tests.unit.models.tiny import random_ids\n"
        "model = lstm().build()\n"
        "model.init_weights(0)\n"
        "model(random_ids(lstm(), 1, 4)).sum().backward()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_but_parameters_is_stored_and_any_size_is_built_without_memory() -> None:
    with torch.device("meta"):
        model = lstm(d_model=8192, n_layers=8).build()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert list(model.buffers()) == []
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


# -- dropout, recomputation, compilation ----------------------------------------------------------------------------


def test_dropout_works_in_training_mode_only_and_never_in_time() -> None:
    config = lstm(dropout=0.5, n_layers=3)
    model, ids, places = built(config), random_ids(config, 2, 8), []
    whole = built(lstm(n_layers=3))(ids)
    for name, module in model.named_modules():
        assert not isinstance(module, torch.nn.LSTM) or module.dropout == 0
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.5
            module.register_forward_hook(lambda *_, name=name: places.append(name))
    torch.manual_seed(0)
    assert not torch.allclose(model.train()(ids), model(ids))
    assert places == ["dropout", "lstm.dropout", "lstm.dropout", "dropout"] * 2
    assert torch.equal(model.eval()(ids), whole)


@all_styles
@pytest.mark.usefixtures("way")
def test_recomputation_changes_no_number_and_keeps_less(config: LSTMConfig) -> None:
    torch.manual_seed(0)
    ids, results, kept = random_ids(config, 2, 30), [], []

    def keep(tensor: Tensor) -> Tensor:
        kept[-1] += tensor.nbytes
        return tensor

    for on in (False, True):
        model = built(config)
        model.set_activation_checkpointing(on)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**packed(ids, LENGTHS, 4)).square().sum()
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < 0.7 * kept[0]


def test_the_attention_alone_is_compiled() -> None:
    model = built(lstm())
    model.compile_blocks()
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    assert compiled == ["attention"]
    built(lstm(attention=False)).compile_blocks()


# -- cache ----------------------------------------------------------------------------------------------------------


@all_styles
def test_a_cache_gives_the_logits_of_the_whole(config: LSTMConfig) -> None:
    model, ids = built(config), random_ids(config, 2, 20)
    whole, cache = model(ids), model.new_cache(2, 20)
    parts = [model(ids[:, start:stop], cache=cache) for start, stop in ((0, 6), (6, 7), (7, 8), (8, 13), (13, 20))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-6, rtol=1e-6)
    assert cache.length == cache.max_len == 20


@all_styles
@pytest.mark.usefixtures("way")
def test_a_cache_keeps_documents_and_padding_apart(config: LSTMConfig) -> None:
    """Pieces that begin and end within documents, in padding, and exactly where a document ends."""
    model, ids = built(config), random_ids(config, 3, 20)
    rows = [[NO_DOCUMENT] * 3 + [0] * 17, [0] * 6 + [1] * 2 + [2] * 12, [0] * 3 + [NO_DOCUMENT] * 4 + [1] * 13]
    documents, positions = torch.tensor(rows), torch.zeros(3, 20, dtype=torch.int64)
    whole, cache = model(ids, positions, documents), model.new_cache(3, 20)
    cuts = (0, 2, 6, 7, 8, 13, 20)
    parts = [model(*(x[:, a:b] for x in (ids, positions, documents)), cache) for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-6, rtol=1e-6)


@all_styles
def test_left_padded_prompts_go_on_as_if_alone(config: LSTMConfig) -> None:
    model, ids = built(config), random_ids(config, 2, 12)
    documents = torch.tensor([[NO_DOCUMENT] * 3 + [0] * 9, [0] * 12])
    positions, cache = torch.zeros(2, 12, dtype=torch.int64), model.new_cache(2, 12)
    first = model(ids[:, :8], positions[:, :8], documents[:, :8], cache)
    rest = [model(ids[:, t : t + 1], positions[:, t : t + 1], None, cache) for t in range(8, 12)]
    whole = torch.cat([first, *rest], dim=1)
    torch.testing.assert_close(whole[:1, 3:], model(ids[:1, 3:]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(whole[1:], model(ids[1:]), atol=1e-6, rtol=1e-6)


@all_styles
def test_generated_text_is_the_same_with_and_without_a_cache(config: LSTMConfig) -> None:
    """Prompts of several lengths, so that some rows begin with padding."""
    tokenizer = ByteTokenizer()
    model = built(replace(config, vocab_size=tokenizer.vocab_size, max_seq_len=64))
    with torch.no_grad():
        model.output_weight_VD.mul_(5)  # no near ties
    texts = []
    for use_cache in (True, False):
        settings = GenerationConfig(
            **{"max_new_tokens": 24, "temperature": 0.0, "top_k": None, "top_p": None, "repetition_penalty": 9.0},
            **{"no_repeat_ngram_size": None, "n_beams": 1, "length_penalty": 1.0},
            **{"stop": [], "seed": 0, "use_cache": use_cache},
        )
        texts.append(generate(model, tokenizer, ["One", "", "A longer prompt, and"], settings, device="cpu"))
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_a_sequence_longer_than_the_model_is_refused() -> None:
    config = lstm(max_seq_len=8)
    model = built(config)
    with pytest.raises(ConfigError, match="9 tokens do not fit into 8"):
        model(random_ids(config, 1, 9))
    cache = model.new_cache(1, 16)
    model(random_ids(config, 1, 8), cache=cache)
    with pytest.raises(ConfigError, match="9 tokens do not fit into 8"):
        model(random_ids(config, 1, 1), cache=cache)
