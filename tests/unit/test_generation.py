"""Sampling against ``transformers``, cache against no cache, batch against alone, and text that is never broken."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llmkit.errors import NumericsError
from llmkit.generation import generate, stream
from llmkit.generation.choice import Sampler, keep_top_k, keep_top_p, penalize
from llmkit.generation.text import TextStream
from llmkit.models.config import DecoderConfig
from llmkit.models.decoder import Decoder
from llmkit.settings import GenerationConfig
from tests.unit.byte_tokenizer import BOS, EOS, FIRST, ByteTokenizer
from tests.unit.generation_settings import GREEDY
from tests.unit.models.tiny import built, gpt2, llama

TOKENIZER = ByteTokenizer()
SAMPLED = replace(GREEDY, temperature=1.0, top_k=40, top_p=0.9, seed=7)
PROMPTS = ["", "a", "Once upon", "a rather longer prompt"]
ROOM: dict[str, Any] = {"vocab_size": 320, "max_seq_len": 128}
MODELS = {
    "llama": llama(**ROOM),
    "gpt2": gpt2(**ROOM),
    "gqa": llama(**ROOM, n_kv_heads=2, qk_norm="head", tie_embeddings=False),
    "mixed": gpt2(**ROOM, norm="rmsnorm", norm_bias=False, n_kv_heads=1),
    "windows": llama(**ROOM, attention_windows=(5, None), logit_softcap=4.0, attention_softcap=3.0),
    "yarn": llama(**ROOM, rope_scaling={"type": "yarn", "factor": 4.0, "original_len": 16}, attention_windows=(9,)),
}
all_models = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


class Scripted(nn.Module):
    """Writes a fixed text after the prompt, one byte a token, then the end token."""

    max_seq_len = 1000

    def __init__(self, script: str | bytes, prompt: str = "x") -> None:
        super().__init__()
        data = script.encode() if isinstance(script, str) else script
        self.script, self.start = [FIRST + byte for byte in data] + [EOS], len(TOKENIZER.encode(prompt))
        self.n_calls = 0

    def forward(
        self, ids: Tensor, positions: Tensor, documents: Tensor | None, cache: Any, *, last_only: bool
    ) -> Tensor:
        self.n_calls += 1
        step = int(positions[0, -1]) - self.start
        logits = torch.zeros(ids.shape[0], 1, TOKENIZER.vocab_size)
        logits[:, :, self.script[min(step, len(self.script) - 1)]] = 1.0
        return logits

    def new_cache(self, batch_size: int, max_len: int) -> None:
        return None


def run(model: Any, prompts: list[str], config: GenerationConfig) -> list[str]:
    return generate(model, TOKENIZER, prompts, config, device="cpu")


def ids_of(model: Decoder, prompt: str, config: GenerationConfig) -> list[int]:
    """The ids behind a text, through a tokenizer that spells them out."""

    class Spelling(ByteTokenizer):
        eos_id = -1  # so that nothing ends early

        def decode(self, ids: Any) -> str:
            return "".join(f"{i}," for i in ids)

    (text,) = generate(model, Spelling(), [prompt], config, device="cpu")
    return [int(word) for word in text.split(",")[:-1]]


def greedy_ids(model: Decoder, start: list[int], n: int) -> list[int]:
    """The likeliest next id, ``n`` times, without any of the code under test."""
    ids = list(start)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1, : TOKENIZER.vocab_size].argmax()))
    return ids[len(start) :]


# -- the same text whichever way ------------------------------------------------------------------------------------


@all_models
@pytest.mark.parametrize("config_", [GREEDY, SAMPLED, replace(GREEDY, repetition_penalty=1.3)])
def test_cache_and_no_cache_give_the_same_64_tokens(config: DecoderConfig, config_: GenerationConfig) -> None:
    model = built(config)
    with_cache = ids_of(model, "Once", config_)
    assert len(with_cache) == 64
    assert with_cache == ids_of(model, "Once", replace(config_, use_cache=False))


@all_models
@pytest.mark.parametrize("config_", [GREEDY, SAMPLED, replace(SAMPLED, use_cache=False)])
def test_a_batch_gives_what_each_prompt_gives_alone(config: DecoderConfig, config_: GenerationConfig) -> None:
    model, config_ = built(config), replace(config_, max_new_tokens=20)
    together = run(model, PROMPTS, config_)
    assert together == [run(model, [prompt], config_)[0] for prompt in PROMPTS]
    assert together == ["".join(stream(model, TOKENIZER, prompt, config_, device="cpu")) for prompt in PROMPTS]
    assert len(set(together)) == len(PROMPTS)


def test_greedy_takes_the_likeliest_token_of_the_whole_sequence() -> None:
    model = built(llama(**ROOM))
    expected = greedy_ids(model, [BOS, *TOKENIZER.encode("Once")], 20)
    assert ids_of(model, "Once", replace(GREEDY, max_new_tokens=20)) == expected


def test_a_seed_repeats_and_equal_prompts_differ() -> None:
    model = built(llama(**ROOM))
    first = run(model, ["a", "b", "a"], SAMPLED)
    assert first == run(model, ["a", "b", "a"], SAMPLED)
    assert first[0] != first[2]
    assert first[0] == run(model, ["a"], SAMPLED)[0]
    assert first[0] != run(model, ["a"], replace(SAMPLED, seed=8))[0]


def test_sampling_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    run(built(llama(**ROOM)), ["a"], SAMPLED)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_prompts_give_no_texts() -> None:
    assert run(built(llama(**ROOM)), [], GREEDY) == []


def test_without_a_begin_token_an_empty_prompt_starts_after_an_end() -> None:
    class NoBos(ByteTokenizer):
        bos_id = None

    model = built(llama(**ROOM))
    (text,) = generate(model, NoBos(), [""], replace(GREEDY, max_new_tokens=1), device="cpu")
    expected = int(model(torch.tensor([[EOS]]))[0, -1, : TOKENIZER.vocab_size].argmax())
    assert text == ("" if expected == EOS else TOKENIZER.decode([expected]))


# -- filters --------------------------------------------------------------------------------------------------------


def test_filters_equal_those_of_transformers() -> None:
    """240 random cases each; logits with ties and infinities."""
    processors = pytest.importorskip("transformers", reason="needs the extra hf")
    generator = torch.Generator().manual_seed(0)
    for case in range(240):
        V = 2 + case % 37
        logits = torch.randn(3, V, generator=generator) * (1 + case % 5)
        if case % 3 == 0:
            logits = logits.round()
        ids = torch.randint(0, V, (3, 5), generator=generator)
        seen = torch.zeros(3, V, dtype=torch.bool).scatter_(1, ids, True)
        k, p, penalty = 1 + case % (V + 3), (1 + case % 20) / 20.5, 0.5 + (case % 7) / 3
        top_k, top_p = processors.TopKLogitsWarper(k), processors.TopPLogitsWarper(p)
        both = processors.LogitsProcessorList([top_k, top_p])
        pairs = (
            (penalize(logits, seen, penalty), processors.RepetitionPenaltyLogitsProcessor(penalty)),
            (keep_top_k(logits, k), top_k),
            (keep_top_p(logits, p), top_p),
            (keep_top_p(keep_top_k(logits, k), p), both),
        )
        for ours, theirs in pairs:
            assert torch.equal(ours, theirs(ids, logits.clone())), case


def test_samples_follow_the_probabilities() -> None:
    """4000 draws of a filtered distribution: within four standard errors, and nothing that was filtered out."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 5.0]])
    config = replace(GREEDY, temperature=2.0, top_k=3, repetition_penalty=4.0)
    n = 4000
    sampler = Sampler(config, range(n), [[4]] * n, vocab_size=5)
    counts = Counter(sampler.pick(logits.expand(n, -1)).tolist())
    expected = (torch.tensor([2.0, 1.0, 1.25]) / 2.0).softmax(0)  # ids 0, 1 and the penalised 4
    assert counts.keys() == {0, 1, 4}
    for token, probability in zip((0, 1, 4), expected.tolist(), strict=True):
        assert abs(counts[token] / n - probability) < 4 * (probability * (1 - probability) / n) ** 0.5


def test_the_penalty_grows_with_the_text() -> None:
    """A penalty so strong that no id comes twice, the prompt's included."""
    tokens = ids_of(built(llama(**ROOM)), "Once", replace(GREEDY, repetition_penalty=1e6))
    assert len({*tokens, *TOKENIZER.encode("Once"), BOS}) == 64 + 5


def test_ids_the_tokenizer_lacks_are_never_chosen() -> None:
    model = built(llama(**ROOM))
    with torch.no_grad():
        model.embedding.weight[TOKENIZER.vocab_size :] *= 20
    likeliest = model(torch.tensor([[BOS]]))[0, -1].argmax()
    assert int(likeliest) >= TOKENIZER.vocab_size
    for config in (GREEDY, replace(SAMPLED, top_k=None, top_p=None)):
        assert max(ids_of(model, "", config)) < TOKENIZER.vocab_size


def test_logits_that_are_no_numbers_are_an_error() -> None:
    model = built(llama(**ROOM)).train()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="not numbers"):
        run(model, ["a"], GREEDY)
    assert model.training


# -- text -----------------------------------------------------------------------------------------------------------

TEXT = "Grün 你好 🙂 e\u0301\n end"


def pieces(script: str | bytes, **changes: Any) -> list[str]:
    return list(stream(Scripted(script), TOKENIZER, "x", replace(GREEDY, **changes), device="cpu"))


def test_streamed_pieces_are_whole_characters() -> None:
    found = pieces(TEXT)
    assert "".join(found) == TEXT
    assert all("\ufffd" not in piece for piece in found)
    assert found[2:4] == ["ü", "n"]  # and nothing waits longer than it must
    assert run(Scripted(TEXT), ["x"], GREEDY) == [TEXT]


@pytest.mark.parametrize("script", [b"a\xf0\x9f\x99", b"\xff\xfe", b"a\xe4b\xbd", b"ok \xf0\x9f\x99\x82\xf0"])
def test_bytes_that_are_no_character_show_as_such_and_only_at_last(script: bytes) -> None:
    expected = script.decode(errors="replace")
    assert "".join(pieces(script)) == expected
    assert run(Scripted(script), ["x"], GREEDY) == [expected]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=3), max_size=2), st.text(max_size=4))
def test_streams_equal_texts_for_any_stop(script: str, stop: list[str], prompt: str) -> None:
    """The text before the first stop; stops may span tokens, overlap, or be cut off by the end."""
    ends = [place for s in stop if (place := script.find(s)) >= 0]
    expected = script[: min(ends)] if ends else script
    config = replace(GREEDY, stop=stop, max_new_tokens=200)
    model = Scripted(script, prompt)
    assert run(model, [prompt], config) == [expected]
    assert "".join(stream(model, TOKENIZER, prompt, config, device="cpu")) == expected


def test_text_that_may_begin_a_stop_is_held_back_until_it_is_certain() -> None:
    assert pieces("a<|b<|end|>c", stop=["<|end|>"]) == ["a", "<|b"]
    assert pieces("a<|en", stop=["<|end|>"]) == ["a", "<|en"]


def test_generation_ends_as_soon_as_every_row_has() -> None:
    model = Scripted("abcdef")
    assert run(model, ["x"], replace(GREEDY, stop=["c"])) == ["ab"]
    assert model.n_calls == 3
    assert run(Scripted("abcdef"), ["x"], replace(GREEDY, max_new_tokens=4)) == ["abcd"]


def test_a_token_reads_as_its_context_says() -> None:
    """Tokenizers that put spaces between pieces, or drop the first one, are read from before the new token."""

    class Words(ByteTokenizer):
        def decode(self, ids: Any) -> str:
            return " ".join(chr(i - FIRST) for i in ids if i >= FIRST)

    text = TextStream(Words(), [BOS, *TOKENIZER.encode("x")], [], limit=9)
    assert "".join(text.feed(i) for i in [*TOKENIZER.encode("yz"), EOS]) + text.finish() == " y z"
    assert text.feed(FIRST) == ""


# -- limits and state -----------------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_window_keeps_its_end_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = built(llama(vocab_size=320, max_seq_len=16))
    config = replace(GREEDY, max_new_tokens=6)
    prompt = "0123456789abcdefghijklmnop"
    with caplog.at_level(logging.WARNING, "llmkit"):
        texts = run(model, ["a", prompt], config)
    assert (
        "1 of 2 prompts are longer than the model's 16 tokens: the last 10 of each were read, 17 before" in caplog.text
    )
    assert texts[1] == TOKENIZER.decode(greedy_ids(model, TOKENIZER.encode(prompt)[-10:], 6))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("config", [llama(vocab_size=320, max_seq_len=8), gpt2(vocab_size=320, max_seq_len=8)])
def test_a_full_window_ends_a_row_and_says_so(
    config: DecoderConfig, use_cache: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """8 tokens are read at most, so a prompt of 5 gives 4 new ones; the shorter row goes on."""
    model = built(config)
    limited = replace(GREEDY, max_new_tokens=6, use_cache=use_cache)
    with caplog.at_level(logging.WARNING, "llmkit"):
        together = run(model, ["abcd", "a"], limited)
    assert "1 of 2 texts ended before max_new_tokens=6" in caplog.text
    for prompt, n, text in zip(["abcd", "a"], [4, 6], together, strict=True):
        assert text == TOKENIZER.decode(greedy_ids(model, [BOS, *TOKENIZER.encode(prompt)], n))


def test_generating_records_nothing_for_a_backward_pass() -> None:
    model, recorded = built(llama(**ROOM)), []
    model.register_forward_hook(lambda module, args, out: recorded.append(out.requires_grad))
    run(model, ["a"], replace(GREEDY, max_new_tokens=3))
    "".join(stream(model, TOKENIZER, "a", replace(GREEDY, max_new_tokens=3), device="cpu"))
    assert recorded == [False] * 6


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_every_module_is_restored(training: bool) -> None:
    model = built(llama(**ROOM, dropout=0.5)).train(training)
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    texts = run(model, ["a"], GREEDY)
    assert texts == run(model.eval(), ["a"], GREEDY)  # no dropout
    model.train(training)
    model.blocks[0].eval()
    pieces = stream(model, TOKENIZER, "a", GREEDY, device="cpu")
    next(pieces)
    assert torch.is_grad_enabled()  # a stream that waits must not switch gradients off for others
    assert not any(module.training for module in model.modules())
    pieces.close()  # type: ignore[attr-defined]
    assert [module.training for module in model.modules()] == before
