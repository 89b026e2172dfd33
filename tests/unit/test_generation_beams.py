"""Beam search, repeated n-grams, several samples, and texts from ids: for every kind of model, with its cache and
without, in a batch and alone."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llmkit.errors import ConfigError, NumericsError
from llmkit.generation import generate, generate_from_ids, stream, stream_from_ids
from llmkit.generation.choice import NO_ID, ban_repeats
from llmkit.interfaces import TokenIds
from llmkit.models.lstm_config import LSTMConfig
from llmkit.models.lstm_seq2seq_config import LSTMSeq2SeqConfig
from llmkit.settings import GenerationConfig
from tests.token_ids import token_ids
from tests.unit.byte_tokenizer import BOS, EOS, FIRST, PAD, ByteTokenizer
from tests.unit.generation_settings import GREEDY as BASE
from tests.unit.models import tiny, tiny_seq2seq, wrapped

V = 61
GREEDY = replace(BASE, max_new_tokens=16)
BEAMS = replace(GREEDY, n_beams=3, no_repeat_ngram_size=3)
SAMPLED = replace(GREEDY, temperature=1.0, top_k=40)


class Spelling(ByteTokenizer):
    """Texts are the ids themselves; 3 ends a text."""

    vocab_size, bos_id, eos_id, pad_id = V, None, 3, 2

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"{i}," for i in ids)

    def token_ids(self) -> TokenIds:
        return token_ids(V, bos_id=None, eos_id=3, pad_id=2)


TOKENIZER = Spelling()
ROWS = [[7, 8, 9], [10, 11, 12, 13, 14, 15], [16], [17, 18, 17, 18]]
ROOM: dict[str, Any] = {"vocab_size": V, "max_seq_len": 64}
LSTM: dict[str, Any] = {**ROOM, "d_model": 16, "d_hidden": 16, "n_layers": 2, "dropout": 0.0, "tie_embeddings": True}


def lstm(**changes: Any) -> Any:
    return loud(LSTMConfig(**{**LSTM, "attention": False, "attention_window": None, "init_range": 0.1, **changes}))


def loud(config: Any) -> Any:
    """A model with no near ties."""
    model = config.build()
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.dim() > 1 else 1.0)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny.built(tiny.llama(**ROOM, n_kv_heads=2)),
    "windows": lambda: tiny.built(tiny.llama(**ROOM, attention_windows=(3, None))),
    "t5": lambda: tiny_seq2seq.built(tiny_seq2seq.t5(**ROOM)),
    "bart": lambda: tiny_seq2seq.built(tiny_seq2seq.bart(**ROOM)),
    "lstm": lambda: lstm(),
    "lstm with attention": lambda: lstm(attention=True),
    "lstm seq2seq": lambda: loud(LSTMSeq2SeqConfig(**LSTM, init_range=0.1)),
    **{f"wrapped: {name}": lambda c=c: wrapped.built(c) for name, c in (wrapped.DECODERS | wrapped.SEQ2SEQS).items()},
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    if request.param.startswith("wrapped"):
        pytest.importorskip("transformers", reason="needs the extra hf")
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def llama() -> Any:
    return MODELS["llama"]()


def ids(model: Any, rows: Sequence[Sequence[int]], config: GenerationConfig, **more: Any) -> list[list[str]]:
    return generate_from_ids(model, TOKENIZER, rows, config, device="cpu", **more)


# -- the same text whichever way ------------------------------------------------------------------------------------


def test_beams_with_a_cache_without_one_and_alone_are_the_same(model: Any) -> None:
    config = replace(BEAMS, max_new_tokens=10)
    together = ids(model, ROWS, config)
    assert together == ids(model, ROWS, replace(config, use_cache=False))
    assert together == [ids(model, [row], config)[0] for row in ROWS]
    assert len({text for (text,) in together}) > 1
    assert together != ids(model, ROWS, replace(config, n_beams=1))


def test_samples_with_a_cache_without_one_and_alone_are_the_same(model: Any) -> None:
    config = replace(SAMPLED, max_new_tokens=8)
    together = ids(model, ROWS, config, n_samples=3)
    assert together == ids(model, ROWS, replace(config, use_cache=False), n_samples=3)
    assert together == [ids(model, [row], config, n_samples=3)[0] for row in ROWS]
    assert all(len(set(texts)) == 3 for texts in together)


@pytest.mark.parametrize("name", ["llama", "t5", "lstm seq2seq"])
def test_streams_from_ids_are_the_texts(name: str) -> None:
    model = MODELS[name]()
    for config in (SAMPLED, BEAMS):
        pieces = [list(stream_from_ids(model, TOKENIZER, row, config, device="cpu")) for row in ROWS]
        assert ["".join(parts) for parts in pieces] == [text for (text,) in ids(model, ROWS, config)]
    assert [len(parts) for parts in pieces] == [1] * len(ROWS)  # which beam wins is known at the end


def test_texts_and_ids_give_the_same_beams() -> None:
    tokenizer, model = ByteTokenizer(), tiny.built(tiny.llama(vocab_size=320, max_seq_len=64))
    prompts = ["a", "some words"]
    rows = [[BOS, *tokenizer.encode(prompt)] for prompt in prompts]
    texts = generate(model, tokenizer, prompts, BEAMS, device="cpu")
    assert [[text] for text in texts] == generate_from_ids(model, tokenizer, rows, BEAMS, device="cpu")
    assert texts[0] == "".join(stream(model, tokenizer, "a", BEAMS, device="cpu"))


def test_no_rows_give_no_texts(llama: Any) -> None:
    assert ids(llama, [], BEAMS) == ids(llama, [], SAMPLED, n_samples=2) == []


# -- the search -----------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """Log-probabilities by (number of tokens so far, last token); ids 0 and 1 are words, 2 is padding, 3 the end."""

    max_seq_len = 100

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table, self.n_rows = table, list[int]()

    def forward(self, ids: Tensor, positions: Tensor, documents: Any, cache: Any, *, last_only: bool) -> Tensor:
        self.n_rows.append(len(ids))
        return self.table[positions[:, -1], ids[:, -1]][:, None]

    def new_cache(self, batch_size: int, max_len: int) -> None:
        return None


class Small(Spelling):
    vocab_size = 4


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(2))
def test_with_beams_for_everything_the_best_of_all_texts_is_found(length_penalty: float, seed: int) -> None:
    """Every text of up to 4 tokens is scored by hand: only a text that was given up too early may be missed."""
    table = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(seed)).mul(2).log_softmax(-1)

    def score(text: tuple[int, ...]) -> float:
        total = sum(float(table[n, last, token]) for n, (last, token) in enumerate(itertools.pairwise((0, *text))))
        return total / len(text) ** length_penalty

    ended = [(*body, 3) for n in range(4) for body in itertools.product((0, 1, 2), repeat=n)]
    texts = ended + list(itertools.product((0, 1, 2), repeat=4))
    expected = max(texts, key=score)
    config = replace(GREEDY, max_new_tokens=4, n_beams=len(texts), length_penalty=length_penalty)
    ((text,),) = generate_from_ids(Table(table), Small(), [[0]], config, device="cpu")
    assert text == Small().decode([i for i in expected if i != 3])


def test_a_search_ends_when_nothing_better_can_come_and_drops_prompts_that_are_done() -> None:
    """After 0 the end is certain but for a little; after 1 it never comes."""
    table = torch.full((100, 4, 4), -20.0)
    table[:, 0, 3], table[:, 0, 0] = 0.0, -3.0
    table[:, 1, 1], table[:, 1, 0] = 0.0, -30.0
    model = Table(table)
    config = replace(GREEDY, n_beams=2, max_new_tokens=12, use_cache=False)
    assert generate_from_ids(model, Small(), [[0], [1]], config, device="cpu") == [[""], ["1," * 12]]
    assert model.n_rows == [2, 4, *[2] * 10]


def test_rows_that_have_ended_are_not_computed_any_more() -> None:
    table = torch.full((100, 4, 4), -20.0)
    table[:, 0, 3] = table[:, 1, 1] = 0.0
    model = Table(table)
    rows = [[0], [1], [0]]
    assert generate_from_ids(model, Small(), rows, GREEDY, device="cpu") == [[""], ["1," * 16], [""]]
    assert model.n_rows == [3, *[1] * 15]


def test_a_stop_text_ends_a_beam() -> None:
    """1 is likelier than 0, but what follows it is not: only where 1 ends the text it is part of the best one."""
    table = torch.full((100, 4, 4), -20.0)
    table[:, 0, 1], table[:, 0, 0], table[:, 1] = 0.0, -1.0, 0.0
    table[1:, 0, 0] = table[1:, 0, 1] = -20.0
    table[1:, 0, 3] = 0.0
    model, config = Table(table), replace(GREEDY, n_beams=2, length_penalty=0.0)
    assert generate_from_ids(model, Small(), [[0]], config, device="cpu") == [["0,"]]
    stopped = replace(config, stop=["1", "nothing of the kind"])
    assert generate_from_ids(model, Small(), [[0]], stopped, device="cpu") == [[""]]
    everything = replace(config, stop=["0", "1"])
    assert generate_from_ids(model, Small(), [[0]], everything, device="cpu") == [[""]]


def test_more_ids_than_one_may_end_a_text(llama: Any) -> None:
    for config in (GREEDY, replace(BEAMS, length_penalty=0.0), SAMPLED):
        ((text,),) = ids(llama, ROWS[:1], config)
        fifth = int(text.split(",")[4])
        ((short,),) = ids(llama, ROWS[:1], config, end_ids=[fifth])
        assert f",{fifth}," not in f",{short}"
        assert config.n_beams > 1 or text.startswith(short)


def test_logits_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(NumericsError, match="not numbers"):
        generate_from_ids(Table(torch.full((9, 4, 4), float("nan"))), Small(), [[0]], BEAMS, device="cpu")


def test_beams_leave_modes_and_gradients_as_they_were(llama: Any) -> None:
    llama.train()
    ids(llama, ROWS, BEAMS)
    assert llama.training
    assert torch.is_grad_enabled()


# -- repeats --------------------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.integers(1, 4), st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=3))
def test_banned_are_the_ids_that_repeat_an_n_gram(n: int, rows: list[list[int]]) -> None:
    width = max(map(len, rows))
    history = torch.tensor([[NO_ID] * (width - len(row)) + row for row in rows])
    banned = ban_repeats(torch.zeros(len(rows), 5), history, n).isinf()
    for row, found in zip(rows, banned.tolist(), strict=True):
        grams = {tuple(row[i : i + n]) for i in range(len(row) - n + 1)}
        last = row[len(row) - n + 1 :]
        assert found == [len(row) >= n and (*last, token) in grams for token in range(5)]


def test_where_everything_is_banned_nothing_is() -> None:
    scores = torch.tensor([[1.0, 2.0, float("-inf")], [1.0, 2.0, 3.0]])
    assert torch.equal(ban_repeats(scores, torch.tensor([[0, 1], [0, 1]]), 1)[0], scores[0])
    assert ban_repeats(scores, torch.tensor([[0, 1], [0, 1]]), 1)[1].tolist() == [float("-inf")] * 2 + [3.0]


@pytest.mark.parametrize("config", [GREEDY, SAMPLED, BEAMS])
def test_no_run_of_tokens_comes_twice(llama: Any, config: GenerationConfig) -> None:
    config = replace(config, no_repeat_ngram_size=2, max_new_tokens=40)
    for row, (text,) in zip(ROWS[:3], ids(llama, ROWS[:3], config), strict=True):
        whole = [*row, *map(int, text.split(",")[:-1])]
        assert len(set(itertools.pairwise(whole))) == len(whole) - 1


# -- samples --------------------------------------------------------------------------------------------------------


def test_samples_repeat_with_the_seed_and_are_the_first_of_more(llama: Any) -> None:
    five = ids(llama, ROWS, SAMPLED, n_samples=5)
    assert five == ids(llama, ROWS, SAMPLED, n_samples=5)
    assert [texts[:2] for texts in five] == ids(llama, ROWS, SAMPLED, n_samples=2)
    assert [texts[:1] for texts in five] == ids(llama, ROWS, SAMPLED)
    other = ids(llama, ROWS, replace(SAMPLED, seed=1), n_samples=5)
    assert not any(set(a) & set(b) for a, b in zip(five, other, strict=True))


def test_equal_rows_get_equal_samples_so_that_no_batch_changes_them(llama: Any) -> None:
    twice = ids(llama, [ROWS[0], ROWS[1], ROWS[0]], SAMPLED, n_samples=2)
    assert twice[0] == twice[2] == ids(llama, [ROWS[0]], SAMPLED, n_samples=2)[0]


def test_rows_do_not_share_their_luck() -> None:
    """The same probabilities after each of 200 rows: with one number for all, all would say the same."""
    model = Table(torch.zeros(100, 4, 4))
    rows = [[0] * n for n in range(1, 65)]
    found = generate_from_ids(model, Small(), rows, replace(SAMPLED, max_new_tokens=1), device="cpu")
    counts = [sum(text == said for (text,) in found) for said in ("0,", "1,", "2,", "")]
    assert min(counts) >= 6  # of 16 on average


@pytest.mark.parametrize(
    ("config", "where", "fix"),
    [
        (GREEDY, "generation.temperature", "raise generation.temperature"),
        (replace(SAMPLED, n_beams=4), "generation.n_beams", "set generation.n_beams=1"),
    ],
)
def test_samples_that_cannot_differ_are_an_error(llama: Any, config: GenerationConfig, where: str, fix: str) -> None:
    with pytest.raises(ConfigError, match="2 texts are wanted") as caught:
        ids(llama, ROWS, config, n_samples=2)
    assert caught.value.where == where
    assert fix in caught.value.fix


# -- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [GREEDY, BEAMS])
def test_rows_that_fill_the_window_say_one_more_token(config: GenerationConfig, caplog: Any) -> None:
    model = tiny.built(tiny.gpt2(vocab_size=V, max_seq_len=8))
    rows = [[5] * 8, [6] * 5, [7] * 12]
    with caplog.at_level(logging.WARNING, "llmkit"):
        texts = ids(model, rows, replace(config, max_new_tokens=4))
    assert "1 of 3 prompts are longer than the model's 8 tokens: the last 4 of each were read, 8 before" in caplog.text
    assert "1 of 3 texts ended before max_new_tokens=4: the model's window was full" in caplog.text
    assert [text.count(",") for (text,) in texts] == [1, 4, 4]
    assert texts[2] == ids(model, [[7] * 4], replace(config, max_new_tokens=4))[0]


def test_a_source_longer_than_the_window_keeps_its_beginning_and_an_end(caplog: Any) -> None:
    model = MODELS["bart"]()
    with caplog.at_level(logging.WARNING, "llmkit"):
        found = ids(model, [[*[5, 6, 7] * 25, 3], [5, 3]], BEAMS)
    assert "1 of 2 prompts are longer than the model's 64 tokens: their last tokens, 12 in all" in caplog.text
    assert found[0] == ids(model, [[5, 6, 7] * 21 + [3]], BEAMS)[0]


@pytest.mark.parametrize("name", ["llama", "t5", "lstm seq2seq"])
def test_an_empty_row_is_what_follows_an_end(name: str) -> None:
    model = MODELS[name]()
    assert ids(model, [[], ROWS[0]], BEAMS)[0] == ids(model, [[3]], BEAMS)[0]


def test_special_tokens_are_not_shown_and_no_sentinel_is() -> None:
    class Bytes(ByteTokenizer):
        vocab_size = FIRST + 256 + 2

        def decode(self, ids: Sequence[int]) -> str:
            return super().decode([i for i in ids if i < FIRST + 256])

        def token_ids(self) -> TokenIds:
            return token_ids(
                self.vocab_size, bos_id=BOS, eos_id=EOS, pad_id=PAD, sentinel_ids=(FIRST + 256, FIRST + 257)
            )

    model = tiny_seq2seq.built(tiny_seq2seq.bart(vocab_size=320, max_seq_len=32))
    with torch.no_grad():
        model.output_bias[FIRST + 256] += 100.0
    row = [BOS, FIRST + 97, EOS]
    assert generate_from_ids(model, Bytes(), [row], GREEDY, device="cpu") == [[""]]
    assert generate(model, Bytes(), ["a"], GREEDY, device="cpu") == ["<extra_id_0>" * 16]
