"""What ``transformers`` makes of a text in the folder of a model of ours: the row that the model was trained on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.cli import main
from llmkit.generation import generate
from llmkit.interfaces import Tokenizer
from llmkit.mask_filling import fill_masks
from llmkit.models.hf import save_model
from llmkit.seq2seq_generation import SentinelText, source_ids
from llmkit.tokenizers.grow import add_tokens
from llmkit.tokenizers.hf_json import HFTokenizer
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.save import save_tokenizer
from llmkit.tokenizers.sentencepiece import SentencePieceTokenizer
from tests.integration.test_commands import TINY, write_documents
from tests.unit.models.test_encoder_config import modern, roberta
from tests.unit.models.tiny import built
from tests.unit.models.tiny_seq2seq import built as built_seq2seq
from tests.unit.models.tiny_seq2seq import t5
from tests.unit.test_generation_seq2seq import GREEDY
from tests.unit.tokenizers.strings import documents, spec, strings, trained, trained_byte_level, trained_wordpiece

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers

MASK, SENTINELS = "<mask>", [f"<extra_id_{number}>" for number in range(6)]
NAMES = [MASK, *SENTINELS]
MODEL_KINDS = ("decoder", "encoder", "encoder_decoder")
PLAIN = st.text(st.characters(exclude_characters="\u2581<[", exclude_categories=["Cs"]), max_size=60)
SOME = ["The", "with", "statement", "is", "qzx", "1234", "(yes)", "naïve", "a.b", "漢字", "if"]
WORDS = st.lists(st.sampled_from(SOME), min_size=1, max_size=12)
GAPS = [
    *("The {} statement", "{} at first", "and last {}", "{}", "The {}.", "un{}able", "({})", "The {} {} statement"),
    *("{}{} twice", "The {}  two spaces", "The {}\nline", "  two {} spaces first", "a, {}, b", "The {}statement"),
]


def _bpe(kind: Literal["bpe", "unigram"]) -> SentencePieceTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return spec(kind, 900, extra_symbols=[MASK], n_sentinels=6).train(documents(), Path(folder))


def _byte_level() -> HFTokenizer:
    """Of others, without a mask: what ``add_tokens`` is for."""
    from tokenizers import ByteLevelBPETokenizer

    backend = ByteLevelBPETokenizer()
    symbols = ["<s>", "<pad>", "</s>", "<unk>"]
    backend.train_from_iterator(documents()[:40], vocab_size=900, show_progress=False, special_tokens=symbols)
    return HFTokenizer(backend.to_str(), {}, {}, "byte level")


TRAINED: dict[str, Callable[[], Tokenizer]] = {
    "bpe": lambda: _bpe("bpe"),
    "unigram": lambda: _bpe("unigram"),
    "grown bpe": lambda: add_tokens(trained("bpe"), NAMES),
    "grown unigram": lambda: add_tokens(trained("unigram"), NAMES),
    "wordpiece": lambda: trained_wordpiece(),
    "grown wordpiece": lambda: add_tokens(trained_wordpiece(), [*NAMES, "<|im_end|>"]),
}
SPACED = ("bpe", "unigram", "grown bpe", "grown unigram")


@cache
def tokenizer(name: str) -> Tokenizer:
    return TRAINED[name]() if name in TRAINED else add_tokens(_byte_level(), NAMES)


@cache
def there(name: str, kind: str) -> Any:
    """The tokenizer as ``transformers`` opens it beside a model of ``kind``."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer(name), Path(folder), kind)
        return transformers.AutoTokenizer.from_pretrained(folder)


def row(ours: Tokenizer, ids: Sequence[int], kind: str) -> list[int]:
    """A document as training has it; a decoder's prompt is one that has not ended."""
    return [*([] if ours.bos_id is None else [ours.bos_id]), *ids, *([] if kind == "decoder" else [ours.eos_id])]


# -- ends of a text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODEL_KINDS)
@pytest.mark.parametrize("name", TRAINED)
@settings(derandomize=True, max_examples=60, deadline=None)
@given(text=PLAIN)
def test_a_text_there_is_a_training_row(name: str, kind: str, text: str) -> None:
    ours = tokenizer(name)
    assert there(name, kind)(text).input_ids == row(ours, ours.encode(text), kind)


@pytest.mark.parametrize("name", TRAINED)
def test_pairs_there_are_those_of_training(name: str) -> None:
    """``[bos] A eos B eos`` with segments 0 and 1 (``data/pairs.py``)."""
    ours = tokenizer(name)
    first, second = ours.encode("some text"), ours.encode("and more")
    pair = there(name, "encoder")("some text", "and more", return_token_type_ids=True)
    assert pair.input_ids == [*row(ours, first, "encoder"), *second, ours.eos_id]
    assert pair.token_type_ids == [0] * (len(first) + 2) + [1] * (len(second) + 1)


# -- masks and sentinels in a text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TRAINED, "grown byte level"])
@settings(derandomize=True, max_examples=60, deadline=None)
@given(words=WORDS, draw=st.data())
def test_words_taken_out(name: str, words: list[str], draw: st.DataObject) -> None:
    """Whole words of a row replaced by one id each, against the text with a name in their place."""
    ours = tokenizer(name)
    if "wordpiece" in name:
        words = [word.lower() for word in words if word.isalpha()] or ["is"]
    out = sorted(draw.draw(st.sets(st.integers(0, len(words) - 1), max_size=len(SENTINELS))))
    pieces = [ours.encode(f" {word}" if place else word) for place, word in enumerate(words)]
    assert [i for word in pieces for i in word] == ours.encode(" ".join(words))
    for names in ([_mask(ours)] * len(out), _sentinels(ours)[: len(out)]):
        ids, shown = list(pieces), list(words)
        for (symbol, index), place in zip(names, out, strict=False):
            ids[place], shown[place] = [index], symbol
        flat = [i for word in ids for i in word]
        expected = flat if name == "grown byte level" else row(ours, flat, "encoder")
        assert there(name, "encoder")(" ".join(shown)).input_ids == expected


def _mask(ours: Any) -> tuple[str, int]:
    mask_id = ours.token_ids().mask_id
    return next((name, mask_id) for name in (MASK, "[MASK]") if ours.id_of(name) == mask_id)


def _sentinels(ours: Tokenizer) -> list[tuple[str, int]]:
    return list(zip(SENTINELS, ours.token_ids().sentinel_ids, strict=False))


@pytest.mark.parametrize("kind", MODEL_KINDS)
@pytest.mark.parametrize("name", SPACED)
def test_gaps_as_llmkit_reads_them(name: str, kind: str) -> None:
    """The text around the names is encoded as llmkit's own commands encode it: nothing is left of the space before."""
    ours = tokenizer(name)
    assert isinstance(ours, SentencePieceTokenizer)
    for gap in GAPS:
        text = gap.format(*SENTINELS)
        ids = source_ids(ours, ours.token_ids(), text)
        expected = ids if kind != "decoder" else ids[:-1]
        if "  two" not in gap:  # all spaces before a name go there, one here
            assert there(name, kind)(text).input_ids == expected, text
        masked = gap.replace("{}", MASK)
        first, *others = [ours.encode(part) for part in gap.replace(" {}", "{}").replace(" {}", "{}").split("{}")]
        filled = [*first, *(i for part in others for i in (ours.token_ids().mask_id, *part))]
        assert there(name, kind)(masked).input_ids == row(ours, filled, kind), masked
    assert ours.id_of("\u2581") not in there(name, kind)(f"The {MASK} statement").input_ids


@pytest.mark.parametrize("name", SPACED)
def test_only_masks_and_sentinels_take_a_space(name: str, tmp_path: Path) -> None:
    """Marks of a chat stand where they stand."""
    grown = add_tokens(tokenizer(name), ["<|im_end|>", "<fim_suffix>"])
    save_tokenizer(grown, tmp_path, "decoder")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for mark in ("<|im_end|>", "<fim_suffix>"):
        ids = [*grown.encode("a "), theirs.convert_tokens_to_ids(mark), *grown.encode(" b")]
        assert theirs(f"a {mark} b").input_ids == row(grown, ids, "decoder")


def test_byte_level_that_was_grown() -> None:
    ours: Any = tokenizer("grown byte level")
    theirs = there("grown byte level", "encoder")
    for symbol in (MASK, SENTINELS[0]):
        ids = [*ours.encode("The"), ours.id_of(symbol), *ours.encode(" statement")]
        assert theirs(f"The {symbol} statement").input_ids == ids
        assert theirs.decode(ids) == f"The{symbol} statement"


# -- the same files in llmkit, and after a turn through transformers --------------------------------------------------


@pytest.mark.parametrize("kind", MODEL_KINDS)
@pytest.mark.parametrize("name", [*TRAINED, "grown byte level"])
def test_llmkit_reads_what_it_wrote(name: str, kind: str, tmp_path: Path) -> None:
    """Ids and fingerprint stay, whichever family the tokenizer was saved for, and so do its files for another one."""
    ours = tokenizer(name)
    save_tokenizer(ours, tmp_path, kind)
    again = load_tokenizer(tmp_path)
    assert type(again) is type(ours)
    assert again.fingerprint == ours.fingerprint
    texts = [*strings()[:200], *(gap.replace("{}", MASK) for gap in GAPS)]
    assert again.encode_batch(texts) == ours.encode_batch(texts)
    for other in MODEL_KINDS:
        save_tokenizer(again, tmp_path / other, other)
        save_tokenizer(ours, tmp_path / "first" / other, other)
        for file in (tmp_path / "first" / other).iterdir():
            assert (tmp_path / other / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", ["bpe", "unigram", "wordpiece"])
def test_transformers_keeps_it(name: str, tmp_path: Path) -> None:
    for kind in MODEL_KINDS:
        there(name, kind).save_pretrained(tmp_path / kind)
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / kind)
        text = f"The {_mask(tokenizer(name))[0]} statement"
        assert again(text).input_ids == there(name, kind)(text).input_ids


@pytest.mark.parametrize("name", ["wordpiece", "byte level", "bpe"])
def test_tokenizers_of_others_stay_as_they_came(name: str, tmp_path: Path) -> None:
    """They say themselves what stands around a text, and what a mask takes."""
    source = tmp_path / "source"
    (trained_byte_level() if name == "byte level" else tokenizer(name)).save(source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config.pop("llmkit_format", None)
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "tokenizer.model").unlink(missing_ok=True)
    theirs = load_tokenizer(source)
    for kind in MODEL_KINDS:
        save_tokenizer(theirs, tmp_path / kind, kind)
        assert (tmp_path / kind / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bpe", "unigram", "wordpiece"])
@pytest.mark.parametrize("make", [roberta, modern])
def test_masks_are_filled_alike(name: str, make: Callable[..., Any], tmp_path: Path) -> None:
    """The pipeline's likeliest piece of text is llmkit's."""
    ours = tokenizer(name)
    model = built(make(vocab_size=ours.vocab_size, max_seq_len=40))
    save_model(model, tmp_path, bos_id=ours.bos_id, eos_id=ours.eos_id, pad_id=ours.pad_id)
    save_tokenizer(ours, tmp_path, model.config.kind)
    fill = transformers.pipeline("fill-mask", model=str(tmp_path), tokenizer=str(tmp_path), top_k=ours.vocab_size)
    special = ours.token_ids().special
    for gap in ("The {} statement, and another", "a {}.", "{} is first", "the last is {}"):
        text = gap.format(_mask(ours)[0])
        best, probability = fill_masks(model, ours, [text], 1, device="cpu")[0][0][0]
        answers = [answer for answer in fill(text) if not special[answer["token"]]]
        assert ours.decode([answers[0]["token"]]) == best
        share = answers[0]["score"] / sum(answer["score"] for answer in answers)
        assert share == pytest.approx(probability, rel=1e-4)


@pytest.mark.parametrize("name", ["bpe", "unigram", "grown bpe"])
def test_gaps_are_answered_alike(name: str, tmp_path: Path) -> None:
    ours = tokenizer(name)
    model = built_seq2seq(t5(vocab_size=ours.vocab_size, max_seq_len=40, n_decoder_layers=2))
    save_model(model, tmp_path, bos_id=ours.bos_id, eos_id=ours.eos_id, pad_id=ours.pad_id)
    save_tokenizer(ours, tmp_path, model.config.kind)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    reader = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    shown = SentinelText(ours, ours.token_ids().sentinel_ids)
    for prompt in ("The <extra_id_0> statement is used", "if <extra_id_0> then <extra_id_1>.", "no gap"):
        inputs = theirs(prompt, return_tensors="pt")
        ids = reader.generate(**inputs, max_new_tokens=GREEDY.max_new_tokens, do_sample=False)[0, 1:].tolist()
        ids = ids[: ids.index(ours.eos_id)] if ours.eos_id in ids else ids
        assert shown.decode(ids) == generate(model, ours, [prompt], GREEDY, device="cpu")[0]


def test_a_trained_and_exported_t5(tmp_path: Path) -> None:
    """The commands say which family they save for."""
    write_documents(tmp_path / "text.jsonl", 0, 60)
    sizes = [word for word in TINY if not word.startswith("model.max")]
    parts = ["model=t5", "model.max_seq_len=64", "objective=span_corruption", "tokenizer=unigram"]
    words = ["tokenizer.n_sentinels=6", f"data.path={tmp_path / 'text.jsonl'}", "data.val_fraction=0.2"]
    command = ["pretrain", *sizes, *parts, *words, f"run.root={tmp_path}", "run.name=run", "tokenizer.vocab_size=309"]
    assert main(command) == 0
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*/model")
    assert main(["export", f"init={tmp_path / 'run'}", f"out={tmp_path / 'out'}"]) == 0
    text = "Document <extra_id_0> says"
    for folder in (checkpoint, tmp_path / "out"):
        ours = load_tokenizer(folder)
        ids = transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids
        assert ids == source_ids(ours, ours.token_ids(), text)
