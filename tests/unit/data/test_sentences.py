"""Sentences of texts that go wrong easily; and the same places in the ids of every kind of tokenizer."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.sentences import encode_with_sentences, split_sentences
from llmkit.interfaces import Tokenizer
from tests.unit.tokenizers.strings import documents, strings, trained, trained_byte_level, trained_wordpiece

quick = settings(max_examples=60, derandomize=True, deadline=None)

# Sentences are written with | before each but the first.
SPLIT = [
    "He came.| He saw.| He left.",
    "Is it so?| Yes!| No?!| Well.",
    # titles, initials, abbreviations
    "Mr. and Mrs. J. R. Smith, Ph.D., met Dr. No.| They left.",
    "See p. 55 and Fig. 3, No. 5.| See pp. 3-4 in vol. 2.",
    'He said no.| "No."| Then he left.',
    "Apples, pears, etc. are fruit.| We had tea, cake, etc.| The tea was cold.",
    "It works, e.g. Here, i.e. There, cf. Smith et al. Found vs. Lost.",
    "He lives in the U.S. Army base.| She left the U.S.| The end.",
    "At 5 p.m. Smith came.| At 6 p.m.| The rest came, too.",
    "Acme Inc. Shareholders met.| He works for Acme Inc.| They pay well.",
    "In World War I.| Then came peace.",
    "On Jan. 5 he went.| It was in Dec.| Bob stayed.",
    # numbers
    "It costs $3.50.| In 1999.| 5 men came at 3.15.",
    "Version 3.11.4 is out.| It is fast.",
    # ellipses
    "He waited... and left.| He waited...| Then he left.| Well…| No.",
    # quotes and brackets
    '"Stop!" he said.| "Go on."| He went.',
    "(See above.)| Then [stop.]| Next.",
    "“It is.”| ‘So?’| «Oui.»| Fin.",
    'An "open quote.| It never ends.| No end.',
    "It is **bold.**| `Code.`| Next.",
    # what follows decides
    "The iPhone. is odd. iPods are, too.",
    "see foo.bar or os.path.| Then f(x).| [1] End.",
    "Wait.What?| No space.Here.",
    # blank lines, headings, wrapped lines
    "A Title|\n\nText goes\non here.| More\ntext.",
    "Title|  \n \n\t\n  Text.\n",
    "One.|\nTwo.|\r\nThree.|\r\n\r\nFour",
    # lists
    "We need:|\n- one\n  more|\n- two.|\n* three|\n1. Four.| Five.|\n2) six|\n(a) seven|\n>>> print(8)\n8",
    "1. First thing.| Second thing.|\n  2. Third.|\nIV. Fourth.",
    "II. The second part.| It is short.",
    # long lines are paragraphs
    "Heading|\n" + "word " * 50 + "end|\nNext heading",
    "a short line\nand another",
    # other scripts
    "Он пришёл.| Он ушёл.| Всё?| Да.",
    "これは文です。| これも。",
    # nothing but marks
    "...",
    ".| .| .",
    "?",
]


@pytest.mark.parametrize("marked", SPLIT)
def test_sentences(marked: str) -> None:
    assert split_sentences(marked.replace("|", "")) == marked.split("|")


TEXTS = st.one_of(
    st.text(st.sampled_from(" \n\t\r.!?…\"')(ABab1-"), max_size=80),
    st.lists(st.sampled_from(strings()), max_size=6).map("".join),
    st.lists(st.sampled_from(["Mr", "He", "he", "1", "U.S", "\n\n", "\n", " ", "  ", ".", "!", "- ", "“", "”"])).map(
        "".join
    ),
)


@quick
@given(TEXTS)
def test_the_sentences_are_the_text(text: str) -> None:
    sentences = split_sentences(text)
    assert "".join(sentences) == text
    assert all(sentence[0].isspace() for sentence in sentences[1:])
    assert text.isspace() or all(sentence.strip() for sentence in sentences)
    assert not any(before[-1:].isspace() for before in sentences[:-1])


def test_no_text_has_no_sentence() -> None:
    assert split_sentences("") == []
    assert split_sentences(" \n\n ") == [" \n\n "]


def test_many_odd_characters_take_no_longer_than_others() -> None:
    """A rule that looks again at what it has seen would need hours for these."""
    patterns = (
        ".",
        "!?",
        '."',
        ".)",
        " ",
        "\n",
        " \n",
        ".\n",
        "a. ",
        "(",
        '"',
        "U.S. ",
        "\n- ",
        ". " + " " * 99,
        "x",
        "é",
    )
    began = time.process_time()
    for pattern in patterns:
        text = pattern * (100_000 // len(pattern))
        assert "".join(split_sentences(text)) == text
        assert "".join(split_sentences(text + "a\n")) == text + "a\n"
    assert time.process_time() - began < 30


@pytest.mark.slow
def test_a_line_of_two_hundred_megabytes() -> None:
    text = ("He came to the house of Mr. Smith at 5 p.m. and left. " * (200_000_000 // 54)).rstrip()
    began = time.process_time()
    assert len(split_sentences(text)) == (len(text) + 1) // 54
    assert time.process_time() - began < 120


# -- in ids -----------------------------------------------------------------------------------------------------------

TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bpe": lambda: trained("bpe"),
    "unigram": lambda: trained("unigram"),
    "wordpiece": trained_wordpiece,
    "byte level": trained_byte_level,
}


SOME_TEXTS = st.lists(
    st.one_of(TEXTS, st.sampled_from(documents()).map(lambda text: text[:2000])), min_size=1, max_size=4
)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=40, derandomize=True, deadline=None)
@given(texts=SOME_TEXTS)
def test_sentence_by_sentence_the_ids_are_those_of_the_text(kind: str, texts: list[str]) -> None:
    """The ids are in any case those of the whole text; SentencePiece may join a line end with what is beside it."""
    tokenizer = TOKENIZERS[kind]()
    if kind in ("bpe", "unigram"):
        texts = [" ".join(text.split("\n")) for text in texts]
    for text, (ids, starts) in zip(texts, encode_with_sentences(tokenizer, texts), strict=True):
        assert ids == tokenizer.encode(text)
        pieces = tokenizer.encode_batch(split_sentences(text))
        assert [i for piece in pieces for i in piece] == ids
        assert [ids[a:b] for a, b in pairwise([*starts, len(ids)])] == [piece for piece in pieces if piece]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentences_are_found_where_ids_join_line_ends(kind: str) -> None:
    """Nearly all begin where they do in the text, or behind the white space and the bullet that were joined with the
    end of the sentence before."""
    tokenizer = TOKENIZERS[kind]()
    texts = [text[:4000] for text in documents()]
    encoded = encode_with_sentences(tokenizer, texts)
    assert [ids for ids, _ in encoded] == tokenizer.encode_batch(texts)
    joined, found = 0, 0
    for text, (ids, starts) in zip(texts, encoded, strict=True):
        cuts = [0, *accumulate(map(len, split_sentences(text)))][:-1]
        places = [len(tokenizer.decode(ids[:start])) for start in starts]
        joined += len(cuts)
        found += sum(any(0 <= place - cut <= 6 for place in places) for cut in cuts)
    assert joined > 1000
    assert found > 0.98 * joined


class Joining:
    """Joins a mark with the line ends after it, as some byte-level tokenizers do, and puts ``before`` first."""

    def __init__(self, before: str = "") -> None:
        self.before = before
        self.known: dict[str, int] = {}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        pieces = [re.findall(r"[.!?]+\n*| ?\w+|\s+(?!\S)|\s", self.before + text) for text in texts]
        return [[self.known.setdefault(piece, len(self.known)) for piece in found] for found in pieces]

    def text(self, ids: Sequence[int]) -> str:
        names = list(self.known)
        return "".join(names[i] for i in ids)


PROSE = "He came.\n\nShe went away. They\nstayed at home!\n\nWe did not. Title\n\nIt rained? Yes.\n\n\nIt did, it did."


@pytest.mark.parametrize("before", ["", "#"])
def test_ids_that_join_sentences_are_laid_beside_those_that_do_not(before: str) -> None:
    """Every sentence is found: it begins with its first id that holds nothing of the sentence before."""
    tokenizer = Joining(before)
    ((ids, starts),) = encode_with_sentences(tokenizer, [PROSE])  # type: ignore[arg-type]
    assert ids == tokenizer.encode_batch([PROSE])[0]
    found = [tokenizer.text(ids[a:b]) for a, b in pairwise([*starts, len(ids)])]
    assert [sentence.split() for sentence in found] == [s.replace(",", "").split() for s in split_sentences(PROSE)]


def test_ids_without_anything_in_common_have_one_sentence() -> None:
    """Places that cannot be carried over are left out; they are never made up."""

    class Changing(Joining):
        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            return [[i + 1000 * len(texts) for i in ids] for ids in super().encode_batch(texts)]

    ((ids, starts),) = encode_with_sentences(Changing(), ["One two three four. Five six."])  # type: ignore[arg-type]
    assert len(ids) > 6
    assert starts == [0]


def test_real_text_has_sentences_of_the_usual_length(data_dir: Path) -> None:
    """State of the Union addresses: about 180 characters a sentence, and few beyond a thousand."""
    import json

    lines = (data_dir / "lm" / "sotu.valid.jsonl").read_text().splitlines()
    lengths = [len(sentence) for line in lines for sentence in split_sentences(json.loads(line)["text"])]
    assert 150 < sum(lengths) / len(lengths) < 210
    assert sum(length > 1000 for length in lengths) < len(lengths) / 500
