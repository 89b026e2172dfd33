"""Text from encoder-decoders: the same whichever way, sentinels in and out, and what the encoder is given to read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit.generation import generate, stream
from llmkit.interfaces import TokenIds, Tokenizer, Tokens
from llmkit.models.encoder_decoder import EncoderDecoder
from llmkit.models.encoder_decoder_config import EncoderDecoderConfig
from llmkit.seq2seq_generation import SentinelText, source_ids
from llmkit.settings import GenerationConfig
from llmkit.tokenizers.hf_json import HFTokenizer
from llmkit.tokenizers.sentencepiece import SentencePieceSpec
from tests.token_ids import token_ids
from tests.unit.byte_tokenizer import BOS, EOS, FIRST, PAD, ByteTokenizer
from tests.unit.generation_settings import GREEDY as BASE
from tests.unit.models.tiny_seq2seq import bart, built, marian, t5, whole
from tests.unit.tokenizers.strings import documents

N_BYTES = FIRST + 256
SENTINELS = tuple(range(N_BYTES, N_BYTES + 3))
GREEDY = replace(BASE, max_new_tokens=24)
SAMPLED = replace(GREEDY, temperature=1.0, top_k=40, top_p=0.9, seed=7)
PROMPTS = ["", "a", "Once <extra_id_0> upon", "a rather longer prompt"]
ROOM: dict[str, Any] = {"vocab_size": 320, "max_seq_len": 64}
MODELS = {"t5": t5(**ROOM), "bart": bart(**ROOM), "marian": marian(**ROOM)}
all_models = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


class Sentinels(ByteTokenizer):
    """Bytes and three sentinels."""

    vocab_size = N_BYTES + len(SENTINELS)

    def token_ids(self) -> TokenIds:
        return token_ids(self.vocab_size, bos_id=self.bos_id, eos_id=EOS, pad_id=PAD, sentinel_ids=SENTINELS)


TOKENIZER = Sentinels()


class Scripted:
    """Remembers its sources, and writes fixed ids, then the end token."""

    max_seq_len = 1000

    def __init__(self, *script: int) -> None:
        self.script, self.sources, self.starts = [*script, EOS], list[Tokens](), list[int]()

    def encode(self, source: Tokens) -> None:
        self.sources.append(source)

    def decode(self, memory: None, ids: Any, positions: Any, documents: Any, cache: Any, /, *, last_only: bool) -> Any:
        step = int(positions[0, -1])
        self.starts += ids[:, 0].tolist() if step == 0 else []
        logits = torch.zeros(ids.shape[0], 1, TOKENIZER.vocab_size)
        logits[:, :, self.script[min(step, len(self.script) - 1)]] = 1.0
        return logits

    def new_cache(self, memory: None, max_len: int) -> None:
        return None

    def modules(self) -> Any:
        return iter(())


def run(model: Any, prompts: list[str], settings: GenerationConfig) -> list[str]:
    return generate(model, TOKENIZER, prompts, settings, device="cpu")


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text)


# -- the same text whichever way ------------------------------------------------------------------------------------


@all_models
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, replace(GREEDY, repetition_penalty=1.3)])
def test_cache_batch_and_stream_give_the_same_text(config: EncoderDecoderConfig, settings: GenerationConfig) -> None:
    model = built(config)
    together = run(model, PROMPTS, settings)
    assert together == run(model, PROMPTS, replace(settings, use_cache=False))
    assert together == [run(model, [prompt], settings)[0] for prompt in PROMPTS]
    assert together == ["".join(stream(model, TOKENIZER, prompt, settings, device="cpu")) for prompt in PROMPTS]
    assert len(set(together)) > 2


@all_models
def test_greedy_takes_the_likeliest_token_of_the_whole_target(config: EncoderDecoderConfig) -> None:
    model, target = built(config), [PAD]
    source = whole(torch.tensor([[BOS, *ids_of("Once"), EOS]]))
    for _ in range(20):
        logits = model(source, torch.tensor([target]))[0, -1, : TOKENIZER.vocab_size]
        target.append(int(logits.argmax()))
    text = SentinelText(TOKENIZER, SENTINELS).decode(target[: target.index(EOS)] if EOS in target else target)
    assert run(model, ["Once"], replace(GREEDY, max_new_tokens=20)) == [text]


def test_the_source_is_encoded_once_in_evaluation_mode_and_without_gradients() -> None:
    model, seen = built(t5(**ROOM, dropout=0.5)).train(), list[Any]()
    model.encoder.blocks[0].register_forward_hook(lambda module, args, out: seen.append((module.training, out)))
    texts = run(model, ["a", "b"], GREEDY)
    assert [(training, out.requires_grad) for training, out in seen] == [(False, False)]
    assert all(module.training for module in model.modules())
    assert texts == run(model.eval(), ["a", "b"], GREEDY)


def test_no_prompts_give_no_texts() -> None:
    assert run(built(t5(**ROOM)), [], GREEDY) == []


def test_a_full_window_ends_a_text_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model: EncoderDecoder = built(t5(vocab_size=320, max_seq_len=8))
    with caplog.at_level(logging.WARNING, "llmkit"):
        run(model, ["abc"], GREEDY)
    assert "1 of 1 texts ended before max_new_tokens=24" in caplog.text


# -- what the encoder reads -----------------------------------------------------------------------------------------


def test_a_prompt_is_read_as_a_document_and_decoding_starts_from_the_pad_id() -> None:
    model = Scripted(*ids_of("ok"))
    assert run(model, ["ab", "x<extra_id_1>yz <extra_id_0>"], GREEDY) == ["ok", "ok"]
    (source,) = model.sources
    expected = [
        [BOS, *ids_of("ab"), EOS, PAD, PAD, PAD],
        [BOS, *ids_of("x"), SENTINELS[1], *ids_of("yz"), SENTINELS[0], EOS],
    ]
    assert source.input_ids.tolist() == expected
    assert source.position_ids.tolist() == [[0, 1, 2, 3, 0, 0, 0], list(range(7))]
    assert source.document_ids is not None
    assert source.document_ids.tolist() == [[0] * 4 + [-1] * 3, [0] * 7]
    assert model.starts == [PAD, PAD]


def test_a_prompt_longer_than_the_window_keeps_its_beginning_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = Scripted()
    model.max_seq_len = 6
    with caplog.at_level(logging.WARNING, "llmkit"):
        run(model, ["a", "abcdefghij"], replace(GREEDY, max_new_tokens=3))
    assert "1 of 2 prompts are longer than the model's 6 tokens: their last tokens, 6 in all" in caplog.text
    assert model.sources[0].input_ids[1].tolist() == [BOS, *ids_of("abcd"), EOS]


def test_a_sentinel_that_the_vocabulary_lacks_is_text() -> None:
    ids = TOKENIZER.token_ids()
    assert source_ids(TOKENIZER, ids, "<extra_id_3>") == [BOS, *ids_of("<extra_id_3>"), EOS]
    assert source_ids(TOKENIZER, replace(ids, sentinel_ids=(), bos_id=None), "<extra_id_0>")[0] == FIRST + ord("<")


def test_sentinels_are_shown() -> None:
    script = [SENTINELS[0], *ids_of(" big"), SENTINELS[1], SENTINELS[2], *ids_of("é")]
    assert run(Scripted(*script), ["x"], GREEDY) == ["<extra_id_0> big<extra_id_1><extra_id_2>é"]
    pieces = list(stream(Scripted(*script), TOKENIZER, "x", GREEDY, device="cpu"))
    assert pieces[0] == "<extra_id_0>"
    assert "".join(pieces) == "<extra_id_0> big<extra_id_1><extra_id_2>é"
    stopped = replace(GREEDY, stop=["<extra_id_1>"])
    assert run(Scripted(*script), ["x"], stopped) == ["<extra_id_0> big"]


# -- real vocabularies ----------------------------------------------------------------------------------------------


SYMBOLS = ["<extra_id_0>", "<extra_id_1>"]


def prefixed(folder: Path) -> Tokenizer:
    """One like T5's: a space goes before every text that is encoded, and is dropped from every text that is decoded."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    special = ["<pad>", "</s>", "<unk>", *SYMBOLS]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    backend.train_from_iterator(documents()[:2], trainer)
    backend.save(str(folder / "tokenizer.json"))
    return HFTokenizer.load(folder)


@pytest.fixture(scope="module", params=["bpe", "unigram", "prefixed"])
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "prefixed":
        return prefixed(folder)
    spec = SentencePieceSpec(
        kind=request.param,
        vocab_size=600,
        path=None,
        character_coverage=0.9999,
        split_digits=True,
        extra_symbols=[],
        n_sentinels=len(SYMBOLS),
        max_train_bytes=100_000,
    )
    return spec.train(documents()[:2], folder)


def taken_out(ids: Sequence[int], *spans: tuple[int, int, int]) -> list[int]:
    """Spans of a row replaced by sentinels, as in training: (start, stop, sentinel)."""
    row, start = list[int](), 0
    for begin, end, sentinel in spans:
        row += [*ids[start:begin], sentinel]
        start = end
    return [*row, *ids[start:]]


@pytest.mark.parametrize("text", ["The value of an object is its class.", "a name, an expression and a class"])
def test_words_taken_out_of_a_prompt_leave_the_ids_of_training(vocabulary: Tokenizer, text: str) -> None:
    """Every pair of words: the prompt with sentinels in their places against spans taken out of the ids."""
    ids, words = vocabulary.token_ids(), text.split(" ")
    stops = [len(vocabulary.encode(" ".join(words[:n]))) for n in range(len(words) + 1)]
    assert vocabulary.encode(text)[: stops[-2]] == vocabulary.encode(" ".join(words[:-1]))
    for first in range(len(words)):
        for second in range(first + 2, len(words)):
            gaps = ["<extra_id_0>" if i == first else "<extra_id_1>" if i == second else w for i, w in enumerate(words)]
            spans = [(stops[i], stops[i + 1], ids.sentinel_ids[n]) for n, i in enumerate((first, second))]
            bos = [] if ids.bos_id is None else [ids.bos_id]
            expected = [*bos, *taken_out(vocabulary.encode(text), *spans), ids.eos_id]
            assert source_ids(vocabulary, ids, " ".join(gaps)) == expected


def test_what_follows_a_gap_without_a_space_is_encoded_without_one(vocabulary: Tokenizer) -> None:
    ids, text = vocabulary.token_ids(), "a name, an expression"
    start, stop = (len(vocabulary.encode(part)) for part in ("a", "a name"))
    expected = taken_out(vocabulary.encode(text), (start, stop, ids.sentinel_ids[0]))
    bos = [] if ids.bos_id is None else [ids.bos_id]
    assert source_ids(vocabulary, ids, "a <extra_id_0>, an expression") == [*bos, *expected, ids.eos_id]


def test_fillings_read_as_their_words_do(vocabulary: Tokenizer) -> None:
    first, second = vocabulary.token_ids().sentinel_ids
    big, value = (vocabulary.encode(f"a {word}")[len(vocabulary.encode("a")) :] for word in ("big", "value of"))
    text = SentinelText(vocabulary, (first, second)).decode([vocabulary.pad_id, first, *big, second, *value])
    assert text == "<extra_id_0> big<extra_id_1> value of"
    assert SentinelText(vocabulary, (first, second)).decode(vocabulary.encode("big value")) == "big value"


def test_a_folder_writes_what_the_model_in_memory_writes(vocabulary: Tokenizer, tmp_path: Path) -> None:
    from llmkit.models.hf import load_model, save_model

    model = built(t5(vocab_size=vocabulary.vocab_size, max_seq_len=64))
    save_model(model, tmp_path, eos_id=vocabulary.eos_id, pad_id=vocabulary.pad_id)
    texts = [
        generate(m, vocabulary, ["a <extra_id_0> class"], GREEDY, device="cpu") for m in (model, load_model(tmp_path))
    ]
    assert texts[0] == texts[1] != [""]
