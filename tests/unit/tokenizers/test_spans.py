"""Spans: the characters that each id stands for, against what the pieces themselves say; and names that are text."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import ConfigError, DataError
from llmkit.tokenizers.chat_template import with_template
from llmkit.tokenizers.hf_json import HFTokenizer
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.sentencepiece import SentencePieceTokenizer
from llmkit.tokenizers.sentencepiece_files import read_sentencepiece
from llmkit.tokenizers.spans import gaps
from tests.unit.tokenizers.strings import (
    documents,
    many_strings,
    trained,
    trained_byte_level,
    trained_wordpiece,
)

pytest.importorskip("tokenizers")
Some = HFTokenizer | SentencePieceTokenizer
ODD_ONES = "ﬁne ½ ① e\u0301x\u200bé\u00a0b 漢字 😀 ｶﾞ 한 ﷺ \u00a8"
PLAIN_ENOUGH = [text for text in many_strings() if not re.search("\u2581|[\x00-\x1f]\u0301", text)]
TEXTS = [*PLAIN_ENOUGH[::4], ODD_ONES, f"  {ODD_ONES}  ", "漢字😀éß"]
SYMBOLS = ("<s>", "</s>", "<unk>", "<pad>", "<mask>", "<|user|>", "[SEP]", "[CLS]", "[UNK]", "<extra_id_0>")


@cache
def normalising(kind: str) -> SentencePieceTokenizer:
    """As the library's own settings have it: NFKC, spaces trimmed, one put before the text; bytes for the rest."""
    from sentencepiece import SentencePieceTrainer

    out = io.BytesIO()
    lines = iter([line for text in documents()[:20] for line in text.split("\n") if line])
    settings_ = {"vocab_size": 600, "pad_id": 3, "byte_fallback": True, "minloglevel": 2}
    SentencePieceTrainer.train(sentence_iterator=lines, model_writer=out, model_type=kind, **settings_)
    return SentencePieceTokenizer(out.getvalue())


@cache
def as_json(kind: str, class_name: str | None) -> HFTokenizer:
    """The same model by the rules of a class of ``transformers``."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        normalising(kind).save(Path(folder))
        named = {} if class_name is None else {"tokenizer_class": class_name}
        content, names = read_sentencepiece(Path(folder) / "tokenizer.model", named, "", {})
    return HFTokenizer(json.dumps(content), names, {}, "test")


@cache
def prefixed_byte_level() -> HFTokenizer:
    content = json.loads(trained_byte_level()._content)
    content["pre_tokenizer"]["add_prefix_space"] = True
    return HFTokenizer(json.dumps(content), {}, {}, "test")


ALL: dict[str, Callable[[], Some]] = {
    "bpe": lambda: trained("bpe"),
    "unigram": lambda: trained("unigram"),
    "normalising bpe": lambda: normalising("bpe"),
    "normalising unigram": lambda: normalising("unigram"),
    "byte level": trained_byte_level,
    "byte level, space first": prefixed_byte_level,
    "wordpiece": trained_wordpiece,
    "wordpiece, cased": lambda: trained_wordpiece(lowercase=False),
    "json bpe": lambda: as_json("bpe", None),
    "json unigram": lambda: as_json("unigram", None),
    "llama": lambda: as_json("bpe", "LlamaTokenizer"),
    "t5": lambda: as_json("unigram", "T5Tokenizer"),
}
every_tokenizer = pytest.mark.parametrize("name", ALL)


def piece_of(tokenizer: Some, index: int) -> str:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer._proto.pieces[index][0]
    return str(tokenizer._backend.id_to_token(index))


@every_tokenizer
def test_ids_are_those_of_encode_and_spans_never_go_back(name: str) -> None:
    tokenizer = ALL[name]()
    for text in TEXTS:
        ids, spans = tokenizer.encode_spans(text)
        assert ids == tokenizer.encode(text)
        assert len(spans) == len(ids)
        assert all(0 <= start <= stop <= len(text) for start, stop in spans)
        assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(spans)), (text, spans)


@cache
def _bytes_of_letters() -> dict[str, int]:
    """The alphabet of byte-level vocabularies: bytes that print stand for themselves, the others follow 255."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {**{chr(byte): byte for byte in printed}, **{chr(256 + place): byte for place, byte in enumerate(others)}}


def _byte_length(tokenizer: Some, index: int) -> int:
    piece = piece_of(tokenizer, index)
    if isinstance(tokenizer, HFTokenizer):
        return len(bytes(_bytes_of_letters()[letter] for letter in piece))
    return 1 if re.fullmatch("<0x..>", piece) else len(piece.replace("\u2581", " ").encode())


@pytest.mark.parametrize("name", ["bpe", "unigram", "byte level"])
@settings(derandomize=True, max_examples=150, deadline=None)
@given(text=st.one_of(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=40)))
def test_spans_follow_from_the_bytes_of_the_pieces(name: str, text: str) -> None:
    """Where nothing is normalised, the pieces say themselves which bytes they are; inside a character it is that."""
    tokenizer = ALL[name]()
    owner = [place for place, letter in enumerate(text) for _ in letter.encode()]
    ids, spans = tokenizer.encode_spans(text)
    place = 0
    for index, span in zip(ids, spans, strict=True):
        stop = place + _byte_length(tokenizer, index)
        assert span == (owner[place], owner[stop - 1] + 1)
        place = stop
    assert place == len(owner)


@pytest.mark.parametrize("name", sorted(ALL.keys() - {"bpe", "unigram", "byte level"}))
def test_pieces_stand_in_the_text_of_their_span(name: str) -> None:
    """As the tokenizer's own normalisation writes those characters."""
    tokenizer = ALL[name]()
    for text in TEXTS:
        for index, (start, stop) in zip(*tokenizer.encode_spans(text), strict=True):
            piece, own = piece_of(tokenizer, index).removeprefix("##"), text[start:stop]
            changed = normalised(tokenizer, own)
            if index == tokenizer.unk_id:
                assert own
            elif name == "byte level, space first":
                raw = bytes(_bytes_of_letters()[letter] for letter in piece)
                assert raw.removeprefix(b" ") in own.encode()
            elif re.fullmatch("<0x..>", piece):
                assert int(piece[3:5], 16) in changed.encode() or own == "\x85", (text, piece, own)  # white to Strip
            else:
                assert piece.strip("\u2581") in changed.replace(" ", "\u2581"), (text, piece, own)
            assert start < stop or piece in ("\u2581", "\u0120")


def normalised(tokenizer: Some, text: str) -> str:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return str(tokenizer._processor.normalize(text))
    steps = tokenizer._backend.normalizer
    return text if steps is None else str(steps.normalize_str(text))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_two_libraries_agree_on_a_model_that_normalises(kind: str) -> None:
    ours, theirs = normalising(kind), as_json(kind, None)
    compared = 0
    for text in TEXTS:
        (ids, spans), (other_ids, others) = ours.encode_spans(text), theirs.encode_spans(text)
        if ids != other_ids:
            continue
        compared += 1
        for one, other in zip(spans, others, strict=True):
            if one[0] < one[1] and other[0] < other[1]:  # dropped signs belong to either neighbour
                assert one[0] <= other[1], (text, one, other)
                assert other[0] <= one[1], (text, one, other)
    assert compared > 0.9 * len(TEXTS)


# -- names of special tokens ----------------------------------------------------------------------------------------


def names_of(tokenizer: Some) -> dict[str, int]:
    """Of the special tokens, save the unknown one, which text may have."""
    named = [(piece_of(tokenizer, int(i)), int(i)) for i in tokenizer.token_ids().special.nonzero()[0]]
    return {name: index for name, index in named if index != tokenizer.unk_id and name in SYMBOLS}


WORDS = [*SYMBOLS, "a", " b", "<", "/s>", "s>", "[", "SEP]", "é", "漢", "\n", "User:"]
PARTS = st.lists(
    st.tuples(
        st.booleans(),
        st.lists(st.sampled_from(WORDS), max_size=4),
    ),
    max_size=6,
)


@pytest.mark.parametrize("name", [*ALL])
@settings(derandomize=True, max_examples=60, deadline=None)
@given(parts=PARTS)
def test_names_in_what_people_wrote_are_text(name: str, parts: list[tuple[bool, list[str]]]) -> None:
    """Outside of it they are the tokens, even when the same text has both."""
    tokenizer = ALL[name]()
    text, plain, outside = "", [], [""]
    for people, words in parts:
        new = "".join(words)
        if people and new:
            plain.append((len(text), len(text) + len(new)))
            outside.append("")
        elif not people:
            outside[-1] += new
        text += new
    names = names_of(tokenizer)
    pattern = "|".join(re.escape(symbol) for symbol in sorted(names, key=len, reverse=True))
    expected = [names[found] for part in outside for found in re.findall(pattern, part)]
    ids, spans = tokenizer.encode_spans(text, plain)
    seen = [(index, span) for index, span in zip(ids, spans, strict=True) if index in names.values()]
    assert [index for index, _ in seen] == expected
    for index, span in seen:
        assert names[text[slice(*span)]] == index
        assert not any(max(span[0], start) < min(span[1], stop) for start, stop in plain)
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(spans))
    assert tokenizer.encode_spans(text, [(0, len(text))])[0] == tokenizer.encode(text)
    assert tokenizer.encode_spans(text, ())[0] == tokenizer.encode_symbols(text)


@pytest.mark.parametrize("name", ["bpe", "byte level", "wordpiece", "llama"])
def test_between_symbols_the_text_is_encoded_as_ever(name: str) -> None:
    """Whether or not somebody wrote the name of a symbol, which makes the text take another way."""
    tokenizer = ALL[name]()
    symbol = piece_of(tokenizer, tokenizer.eos_id)
    said = f"some words{symbol}a few more"
    ids = tokenizer.encode_spans(f"{said}{symbol}the end", [(0, len(said))])[0]
    place = ids.index(tokenizer.eos_id)
    assert ids[:place] == tokenizer.encode(said)
    usual = tokenizer.encode_symbols(f"words{symbol}the end")
    assert ids[place:] == usual[usual.index(tokenizer.eos_id) :]


def test_a_token_that_takes_the_spaces_around_it() -> None:
    content = json.loads(trained_byte_level()._content)
    for token in content["added_tokens"]:
        token["lstrip"], token["rstrip"] = token["content"] == "<mask>", token["content"] == "</s>"
    tokenizer = HFTokenizer(json.dumps(content), {}, {}, "test")
    eos, mask = tokenizer.eos_id, tokenizer.token_ids().mask_id
    for said in ("a \n", "a</s> \n"):  # the second has a name in it
        text = f"{said} <mask>b</s>  {said}"
        plain = [(0, len(said)), (len(text) - len(said), len(text))]
        ids, spans = tokenizer.encode_spans(text, plain)
        where = {index: text[slice(*span)] for index, span in zip(ids, spans, strict=True)}
        assert (where[mask], where[eos]) == (" \n <mask>", "</s>  ")
        assert ids.count(eos) == 1


def test_half_a_character() -> None:
    for tokenizer in (trained("bpe"), trained_byte_level()):
        for plain in (None, ()):
            with pytest.raises(DataError, match="surrogate"):
                tokenizer.encode_spans("a\ud800b", plain)


def test_gaps() -> None:
    assert list(gaps(9, [(4, 6), (2, 3), (5, 7), (8, 8)])) == [(0, 2), (3, 4), (7, 9)]
    assert list(gaps(0, [])) == []
    assert list(gaps(3, [(0, 3)])) == []


# -- conversations --------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]


@pytest.mark.parametrize("name", ["bpe", "byte level", "wordpiece"])
def test_no_template_and_the_plain_one(name: str, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    tokenizer = ALL[name]()
    with pytest.raises(ConfigError, match="no chat template") as caught:
        tokenizer.render_chat(CHAT, add_generation_prompt=False)
    assert caught.value.fix
    given_one, changed = with_template(tokenizer)
    assert changed
    bos, eos = (tokenizer.special_names[f"{name}_token"] for name in ("bos", "eos"))
    text = f"{bos}User: Hello\nAssistant: Good day.{eos}\n"
    assert given_one.render_chat(CHAT, add_generation_prompt=False) == text
    assert given_one.render_chat(CHAT[:1], add_generation_prompt=True) == f"{bos}User: Hello\nAssistant:"
    assert given_one.fingerprint == tokenizer.fingerprint
    given_one.save(tmp_path)
    again, changed = with_template(load_tokenizer(tmp_path))
    assert not changed
    assert again.render_chat(CHAT, add_generation_prompt=False) == text
