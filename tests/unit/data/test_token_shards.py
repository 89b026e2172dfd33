"""Shards and windows: every id comes back, every id but the first is a target once, damage is seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.token_shards import HEADER_BYTES, ShardWriter, TokenShards, Vocabulary, WindowDataset, read_header
from llmkit.errors import DataError
from llmkit.interfaces import IGNORE_INDEX
from llmkit.objectives.causal_lm import CausalLM
from tests.token_ids import token_ids

quick = settings(max_examples=30, derandomize=True, deadline=None)
WORDS = Vocabulary(vocab_size=100, bos_id=0, eos_id=1)
DOCUMENTS = st.lists(st.lists(st.lists(st.integers(2, 99), max_size=9), min_size=1, max_size=5), min_size=1, max_size=4)


def write(folder: Path, shards: list[list[list[int]]], vocabulary: Vocabulary = WORDS) -> TokenShards:
    paths = [folder / f"{number}.bin" for number in range(len(shards))]
    for path, documents in zip(paths, shards, strict=True):
        with ShardWriter(path, vocabulary) as writer:
            for document in documents:
                writer.add([document], n_bytes=3 * len(document))
    return TokenShards(paths, vocabulary)


@quick
@given(DOCUMENTS, st.data())
def test_windows_cross_files(tmp_path_factory: pytest.TempPathFactory, shards: list, data: st.DataObject) -> None:
    opened = write(tmp_path_factory.mktemp("shards"), shards)
    ids = [i for shard in shards for document in shard for i in [0, *document, 1]]
    assert opened.n_tokens == len(ids)
    assert opened.n_documents == sum(map(len, shards))
    assert opened.n_bytes == 3 * sum(len(document) for shard in shards for document in shard)
    start = data.draw(st.integers(0, len(ids)))
    stop = data.draw(st.integers(start, len(ids)))
    window = opened.window(start, stop)
    assert window.dtype == np.int64
    assert window.tolist() == ids[start:stop]


@quick
@given(DOCUMENTS, st.integers(2, 12), st.booleans())
def test_every_token_but_the_first_of_a_document_is_a_target_once(
    tmp_path_factory: pytest.TempPathFactory, shards: list, seq_len: int, has_bos: bool
) -> None:
    """Through the objective's own collate: the labels in order are the text without the first id of each document."""
    words = WORDS if has_bos else Vocabulary(100, None, 1)
    opened = write(tmp_path_factory.mktemp("shards"), shards, words)
    dataset = WindowDataset(opened, seq_len, 1)
    rows = [dataset.row(row, (0, row), None) for row in range(dataset.n_sequences)]
    assert all(len(row.ids) == seq_len + 1 for row in rows[:-1])
    labels: list[int] = []
    if rows:
        collate = CausalLM(label_smoothing=0.0, z_loss=0.0, chunk_size=None).collate
        labels = collate(rows, seq_len=seq_len, ids=token_ids(100, eos_id=1, pad_id=1)).labels.flatten().tolist()
    stored = [[*([0] if has_bos else []), *document, 1] for shard in shards for document in shard]
    assert [label for label in labels if label != IGNORE_INDEX] == [i for document in stored for i in document[1:]]


@pytest.mark.parametrize(("size", "width"), [(65536, 2), (65537, 4)])
def test_ids_take_as_few_bytes_as_the_vocabulary_needs(tmp_path: Path, size: int, width: int) -> None:
    opened = write(tmp_path, [[[size - 1, 2]]], Vocabulary(size, 0, 1))
    assert opened.window(0, 4).tolist() == [0, size - 1, 2, 1]
    assert (tmp_path / "0.bin").stat().st_size == HEADER_BYTES + 4 * width


@pytest.mark.parametrize("bad", [100, -1])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, bad: int) -> None:
    with pytest.raises(DataError, match="outside its vocabulary of 100"):
        write(tmp_path, [[[5, bad]]])
    assert not list(tmp_path.iterdir())


def test_a_shard_without_documents_leaves_no_file(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "0.bin", WORDS):
        pass
    assert not list(tmp_path.iterdir())


def test_an_empty_split_has_no_rows() -> None:
    dataset = WindowDataset(TokenShards([], WORDS), 8, 1)
    assert (dataset.n_sequences, dataset.n_tokens, dataset.n_bytes) == (0, 0, 0)
    with pytest.raises(IndexError):
        dataset.row(0, (0, 0), None)
    with pytest.raises(IndexError):
        dataset.shards.window(0, 1)


def test_files_are_mapped_only_when_touched(tmp_path: Path) -> None:
    opened = write(tmp_path, [[[2, 3]], [[4, 5]]])
    assert not opened._maps
    opened.window(0, 2)
    assert list(opened._maps) == [0]


def damaged(raw: bytes, what: str) -> bytes:
    edits = {
        "short": raw[:-1],
        "long": raw + b"\0",
        "empty": b"",
        "magic": b"X" + raw[1:],
        "not json": raw[:9] + b"}" + raw[10:],
        "dtype": raw.replace(b'"<u2"', b'"<f2"'),
        "other width": raw.replace(b'"<u2"', b'"<u4"'),
        "header only": raw[:100],
    }
    return edits[what]


@pytest.mark.parametrize("what", ["short", "long", "empty", "magic", "not json", "dtype", "other width", "header only"])
def test_a_damaged_shard_is_refused(tmp_path: Path, what: str) -> None:
    write(tmp_path, [[[2, 3, 4]]])
    path = tmp_path / "0.bin"
    path.write_bytes(damaged(path.read_bytes(), what))
    with pytest.raises(DataError) as caught:
        TokenShards([path], WORDS)
    assert str(path) in str(caught.value)


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [[[2, 3, 4]]])
    with pytest.raises(DataError, match="another tokenizer"):
        TokenShards([tmp_path / "0.bin"], Vocabulary(101, 0, 1))
    with pytest.raises(DataError, match="cannot be read"):
        read_header(tmp_path / "none.bin")
