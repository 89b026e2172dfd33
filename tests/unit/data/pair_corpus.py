"""Token shards of made-up documents. Every token of their text has an id of its own, so each id says which document,
sentence and place it is from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np

from llmkit.data.sentence_files import Sentences
from llmkit.data.token_shards import ShardWriter, TokenShards, Vocabulary

BOS, EOS, FIRST_ID = 0, 1, 2
Document = list[int]  # the lengths of its sentences


@dataclass
class Corpus:
    """Shards of made-up documents, and where every id of their text stands."""

    shards: TokenShards
    document: dict[int, int] = field(default_factory=dict)  # id to number of the document
    sentence: dict[int, int] = field(default_factory=dict)  # id to its place in its sentence, from 0
    place: dict[int, int] = field(default_factory=dict)  # id to its place in the document
    last: set[int] = field(default_factory=set)  # ids that end a sentence

    def text(self) -> list[int]:
        return list(self.document)


def corpus(
    folder: Path, files: list[list[Document]], *, has_bos: bool = True, goes_on: frozenset[int] = frozenset()
) -> Corpus:
    """``goes_on`` has the numbers of the documents that are later sections of the text before."""
    n_tokens = sum(sum(document) for file in files for document in file)
    words = Vocabulary(FIRST_ID + n_tokens + 1, BOS if has_bos else None, EOS)
    paths = [folder / f"{number}.bin" for number in range(len(files))]
    made = Corpus(TokenShards([], words))
    following, number = FIRST_ID, 0
    for path, file in zip(paths, files, strict=True):
        with ShardWriter(path, words, sentences=True) as writer:
            for document in file:
                ids = list(range(following, following + sum(document)))
                starts = [start for start in accumulate(document[:-1], initial=0) if document]
                writer.add([ids], len(ids), [Sentences(starts, number in goes_on)])
                for start, length in zip(starts, document, strict=True):
                    made.last.add(ids[start + length - 1])
                    made.sentence |= {ids[start + k]: k for k in range(length)}
                made.document |= dict.fromkeys(ids, number)
                made.place |= {i: place for place, i in enumerate(ids)}
                following, number = following + len(ids), number + 1
    made.shards = TokenShards(paths, words)
    return made


def many(n_documents: int, seed: int = 0, longest: int = 12) -> list[Document]:
    draw = np.random.default_rng(seed)
    return [draw.integers(1, longest, draw.integers(1, 15)).tolist() for _ in range(n_documents)]
