"""Filled masks against logits computed by hand and against the pipeline of ``transformers``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmkit.errors import ConfigError, NumericsError
from llmkit.interfaces import TokenIds
from llmkit.mask_filling import fill_masks
from llmkit.models.encoder import Encoder
from llmkit.models.hf import save_model
from llmkit.tokenizers.sentencepiece import SentencePieceSpec
from llmkit.tokenizers.wordpiece import WordPieceSpec
from tests.unit.models.test_encoder_config import bert, modern, roberta
from tests.unit.models.tiny import built

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
WORDS = tuple(["a", "be", "cat", "do", "every", "fox", "go", "house", "in", "jump", "kite", "log", ","])
PAD, CLS, SEP, MASK, UNK = range(5)


class WordTokenizer:
    """Implements ``interfaces.Tokenizer``: ids are words, spaces do not count."""

    vocab_size = len(SPECIAL) + len(WORDS)
    bos_id: int | None = CLS
    eos_id = SEP
    pad_id = PAD
    fingerprint = "words"
    mask_id: int | None = MASK

    def encode(self, text: str) -> list[int]:
        return [SPECIAL.index("[UNK]") if w not in WORDS else len(SPECIAL) + WORDS.index(w) for w in _split(text)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(WORDS[i - len(SPECIAL)] for i in ids if i >= len(SPECIAL))

    def token_ids(self) -> TokenIds:
        special = np.arange(self.vocab_size) < len(SPECIAL)
        starts = np.ones(self.vocab_size, dtype=bool)
        return TokenIds(self.vocab_size, self.bos_id, SEP, PAD, self.mask_id, (), None, special, starts)

    def save(self, folder: Path) -> None:
        raise AssertionError("nothing to save")


def _split(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


TOKENIZER = WordTokenizer()
MODELS = {
    "bert": bert(vocab_size=64),
    "roberta": roberta(vocab_size=WordTokenizer.vocab_size),
    "modern": modern(vocab_size=64, local_window=4, head_bias=False),
}
PROMPTS = ["The cat [MASK] in a house", "[MASK]", "every [MASK] , [MASK] [MASK] jump do go be a fox in log kite"]


def by_hand(model: Encoder, ids: list[int]) -> Tensor:
    """NV: the probabilities of words at each mask of one row, alone in its batch."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0][torch.tensor(ids) == MASK]
    return logits[:, len(SPECIAL) : TOKENIZER.vocab_size].double().softmax(-1)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_candidates_are_the_words_with_the_largest_logits(config: Any) -> None:
    """A batch of different lengths, each prompt as if it were alone, begun and ended like a document."""
    model = built(config)
    rows = [
        [CLS, UNK, 7, MASK, 13, 5, 12, SEP],
        [CLS, MASK, SEP],
        [CLS, 9, MASK, 17, MASK, MASK, 14, 8, 11, 6, 5, 10, 13, 16, 15, SEP],
    ]
    filled = fill_masks(model, TOKENIZER, PROMPTS, 4, device="cpu")
    assert [len(masks) for masks in filled] == [1, 1, 3]
    for row, masks in zip(rows, filled, strict=True):
        for probabilities, candidates in zip(by_hand(model, row), masks, strict=True):
            values, places = probabilities.topk(4)
            assert [text for text, _ in candidates] == [WORDS[i] for i in places.tolist()]
            torch.testing.assert_close(torch.tensor([p for _, p in candidates]).double(), values, atol=1e-6, rtol=0)


def test_only_words_are_candidates_and_their_probabilities_make_one() -> None:
    """Special tokens and the embedding's rows without a token would win here."""
    model = built(bert(vocab_size=64))
    with torch.no_grad():
        model.output_bias[: len(SPECIAL)] = 50.0
        model.output_bias[TOKENIZER.vocab_size :] = 50.0
    ((candidates,),) = fill_masks(model, TOKENIZER, ["a [MASK]"], 1000, device="cpu")
    assert sorted(text for text, _ in candidates) == sorted(WORDS)
    assert sum(probability for _, probability in candidates) == pytest.approx(1, abs=1e-6)
    assert [p for _, p in candidates] == sorted((p for _, p in candidates), reverse=True)


def test_either_spelling_is_a_mask_and_the_spaces_before_it_are_its_own() -> None:
    """A vocabulary whose words hold the space before them would have a space too many."""
    model, seen = built(bert(vocab_size=64)), []

    class Spy(WordTokenizer):
        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            seen.append(list(texts))
            return super().encode_batch(texts)

    one, other = fill_masks(model, Spy(), ["the [MASK] cat\n<mask>", "the <mask> cat\n[MASK]"], 3, device="cpu")
    assert one == other
    assert seen == [["the", " cat\n", ""]] * 2


def test_a_vocabulary_without_a_beginning_needs_none() -> None:
    class Endless(WordTokenizer):
        bos_id = None

    model = built(bert(vocab_size=64))
    ((candidates,),) = fill_masks(model, Endless(), ["a [MASK]"], 1, device="cpu")
    assert candidates[0][1] == pytest.approx(float(by_hand(model, [5, MASK, SEP]).max()), abs=1e-6)


def test_the_model_is_in_the_mode_it_was_in_and_gives_no_dropout() -> None:
    model = built(bert(vocab_size=64, dropout=0.5)).train()
    model.blocks[0].eval()
    first, second = (fill_masks(model, TOKENIZER, PROMPTS, 3, device="cpu") for _ in range(2))
    assert first == second
    assert model.training
    assert not model.blocks[0].training
    assert fill_masks(model, TOKENIZER, [], 3, device="cpu") == []


def test_the_window_may_be_full_and_no_fuller() -> None:
    model = built(bert(vocab_size=64, max_seq_len=6))
    assert fill_masks(model, TOKENIZER, ["a cat [MASK] a"], 1, device="cpu")
    with pytest.raises(ConfigError, match="has 7 tokens, the model takes 6") as error:
        fill_masks(model, TOKENIZER, ["[MASK]", "a cat [MASK] a cat"], 1, device="cpu")
    assert error.value.where == "prompt 2"


@pytest.mark.parametrize(
    ("prompts", "top_k", "mask_id", "message"),
    [
        (["a [MASK]", "a cat"], 1, MASK, "no mask in the prompt"),
        (["a [mask] _"], 1, MASK, "no mask in the prompt"),
        ([""], 1, MASK, "no mask in the prompt"),
        (["a [MASK]"], 1, None, "the tokenizer has no mask token"),
        (["a [MASK]"], 0, MASK, "best 0"),
    ],
)
def test_what_cannot_be_filled_says_why(prompts: list[str], top_k: int, mask_id: int | None, message: str) -> None:
    tokenizer = WordTokenizer()
    tokenizer.mask_id = mask_id
    with pytest.raises(ConfigError, match=message) as error:
        fill_masks(built(bert(vocab_size=64)), tokenizer, prompts, top_k, device="cpu")
    assert error.value.fix
    if "no mask in" in message:
        assert "[MASK] or <mask>" in error.value.fix


def test_logits_that_are_no_numbers_are_an_error() -> None:
    model = built(bert(vocab_size=64))
    with torch.no_grad():
        model.embedding_norm.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="not numbers"):
        fill_masks(model, TOKENIZER, PROMPTS, 1, device="cpu")


@pytest.mark.filterwarnings("ignore")  # those of transformers
@pytest.mark.parametrize("name", MODELS)
def test_the_pipeline_of_transformers_finds_the_same(name: str, tmp_path: Path) -> None:
    """On the exported folder. It gives special tokens a share, so that what is left is compared as shares of one."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    model = built(replace(MODELS[name], vocab_size=WordTokenizer.vocab_size))
    save_model(model, tmp_path, bos_id=CLS, eos_id=SEP, pad_id=PAD)
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "cls", "sep", "mask", "unk")}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    other = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    pipeline = transformers.pipeline("fill-mask", model=other, tokenizer=theirs, top_k=WordTokenizer.vocab_size)
    for prompt in PROMPTS[:2]:
        ((ours,),) = fill_masks(model, TOKENIZER, [prompt], 5, device="cpu")
        words = [(c["token_str"], c["score"]) for c in pipeline(prompt) if c["token_str"] in WORDS]
        total = sum(score for _, score in words)
        assert [text for text, _ in ours] == [text for text, _ in words[:5]]
        assert [p for _, p in ours] == pytest.approx([score / total for _, score in words[:5]], abs=1e-5)


TEXT = [
    "The first statement of the law. The second statement of the law, and the first word of it.",
    "It was the first law; the second was a statement. A word is a word, the law is the law.",
] * 20
LEARNED: dict[str, Any] = {
    "wordpiece": WordPieceSpec(
        vocab_size=65,
        path=None,
        lowercase=True,
        strip_accents=None,
        character_coverage=1.0,
        min_frequency=1,
        extra_symbols=[],
        max_train_bytes=10**6,
    ),
    **{
        kind: SentencePieceSpec(
            kind=kind,
            vocab_size=310,
            path=None,
            character_coverage=1.0,
            split_digits=True,
            extra_symbols=["<mask>"],
            n_sentinels=0,
            max_train_bytes=10**6,
        )
        for kind in ("bpe", "unigram")
    },
}


@pytest.mark.parametrize("kind", LEARNED)
def test_a_mask_stands_where_the_word_stood(kind: str, tmp_path: Path) -> None:
    """With a trained vocabulary, the ids around a mask are those of the text with the word in its place."""
    tokenizer = LEARNED[kind].train(iter(TEXT), tmp_path)
    ids, model = tokenizer.token_ids(), built(bert(vocab_size=384))
    read: list[Tensor] = []
    model.embedding.register_forward_hook(lambda module, args, out: read.append(args[0]))
    for left, word, right in (
        ("The", " first", " statement, it"),
        ("the second", " law", "; a word"),
        ("", "It", " is"),
    ):
        whole, inside = tokenizer.encode(left + word + right), tokenizer.encode(word)
        place = len(tokenizer.encode(left))
        assert whole[place : place + len(inside)] == inside
        mask = word.replace(word.strip(), "[MASK]")
        fill_masks(model, tokenizer, [left + mask + right], 1, device="cpu")
        expected = [*whole[:place], ids.mask_id, *whole[place + len(inside) :]]
        assert read[-1][0].tolist() == [ids.bos_id, *expected, ids.eos_id]
