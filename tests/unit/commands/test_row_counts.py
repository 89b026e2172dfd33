"""What the log says of text that has no use in the rows, and of pairs without a question."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from llmkit.commands import row_counts
from llmkit.commands.row_counts import without_target
from llmkit.commands.training import open_datasets
from llmkit.config.build import build
from llmkit.config.choices import recipes_dir
from llmkit.config.yaml_file import read_yaml
from llmkit.data import short_pieces
from llmkit.data.datasets import dataset_for
from llmkit.data.prepare import PreparedData
from llmkit.data.token_shards import ShardWriter, TokenShards, Vocabulary
from llmkit.errors import DataError
from llmkit.interfaces import Objective
from llmkit.objectives.prefix_lm import PrefixLM
from llmkit.objectives.span_corruption import SpanCorruption
from tests.unit.data.pair_corpus import corpus, many
from tests.unit.objectives.source_target import BOS, EOS, FIRST_TEXT, VOCAB, documents_of, vocabulary


def named(name: str) -> Objective:
    objective: Objective = build(read_yaml(recipes_dir() / "objective" / f"{name}.yaml").tree)
    return objective


def shards_of(folder: Path, lengths: np.ndarray, bos: bool, n_files: int = 3) -> TokenShards:
    words = Vocabulary(VOCAB, BOS if bos else None, EOS)
    rng, paths = np.random.default_rng(0), []
    for number, part in enumerate(np.array_split(lengths, n_files)):
        paths.append(folder / f"{number}.bin")
        with ShardWriter(paths[-1], words) as writer:
            writer.add([rng.integers(FIRST_TEXT, FIRST_TEXT + 99, n).tolist() for n in part], int(part.sum()))
    return TokenShards(paths, words)


@pytest.fixture(params=[False, True], ids=["no bos", "bos"])
def shards(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TokenShards:
    """Short documents, and several blocks of them."""
    monkeypatch.setattr(short_pieces, "_BLOCK_TOKENS", 300)
    return shards_of(tmp_path, np.random.default_rng(1).integers(0, 30, 200), request.param)


def n_said(objective: Objective, shards: TokenShards) -> int:
    said = without_target(objective, dataset_for(objective, shards, 64))
    return int(said.partition(" ")[0].replace(",", "")) if said else 0


def test_single_tokens_that_prefix_lm_leaves_out_are_counted(shards: TokenShards) -> None:
    objective = named("prefix_lm")
    assert isinstance(objective, PrefixLM)
    rows = dataset_for(objective, shards, 64)
    batches = [
        objective.collate([rows.row(n, (0, n), None)], seq_len=64, ids=vocabulary(shards.bos_id))
        for n in range(rows.n_sequences)
    ]
    n_used = sum(batch.n_tokens for batch in batches)
    assert n_said(objective, shards) == rows.n_tokens - n_used > 0


def test_documents_without_a_target_are_counted(shards: TokenShards) -> None:
    """Pieces of up to three tokens of text: they are counted, and they never have a target."""
    objective = named("span_corruption")
    assert isinstance(objective, SpanCorruption)
    rows, ids = dataset_for(objective, shards, 64), vocabulary(shards.bos_id)
    n_short = 0
    for n in range(rows.n_sequences):
        batch = objective.collate([rows.row(n, (0, n), 0)], seq_len=64, ids=ids)
        for document in documents_of(batch)[0]:
            n_text = sum(FIRST_TEXT <= id_ < FIRST_TEXT + 99 for id_ in document.source + document.labels)
            n_short += 0 < n_text <= 3
            assert not (n_text <= 3 and document.labels)
    assert n_said(objective, shards) == n_short > 5


def test_nothing_is_said_where_nothing_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = named("span_corruption")
    stride, _ = objective.window(128)
    rows = dataset_for(objective, shards_of(tmp_path, np.full(50, stride - 1), bos=False), 128)
    assert without_target(objective, rows) == ""
    short = dataset_for(objective, shards_of(tmp_path, np.full(500, 3), bos=False), 128)
    assert without_target(named("causal_lm"), short) == ""
    monkeypatch.setattr(row_counts, "MOST_TOKENS", 1000)
    monkeypatch.setattr(short_pieces, "MOST_TOKENS", 1000)
    said = without_target(objective, short)
    assert "(of the first 1,000 tokens), have no more than 3 token(s) of text" in said
    assert 200 < int(said.split()[0]) < 260


def prepared(folder: Path, train: list, val: list) -> PreparedData:
    for name in ("train", "val"):
        (folder / name).mkdir(exist_ok=True)
    shards = (corpus(folder / "train", [train]).shards,)
    return PreparedData(folder, folder, shards, corpus(folder / "val", [val]).shards, {}, reused=False, reason="")


@pytest.mark.parametrize(("name", "length"), [("sentence_order", 22), ("next_sentence", 110)])
def test_few_questions_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, length: int) -> None:
    """Of long sentences hardly two fit in a row."""
    rng = np.random.default_rng(0)
    long = [rng.integers(length, length + 20, 30).tolist() for _ in range(20)]
    with caplog.at_level(logging.INFO, logger="llmkit"):
        datasets = open_datasets(prepared(tmp_path, long, many(40)), named(name), 64)
        (said,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    rows = datasets.train[0]
    with_pair = sum(any(pair.label >= 0 for pair in rows.row(n, (0, n), None).pairs) for n in range(rows.n_sequences))
    assert 0 < with_pair < rows.n_sequences / 2
    assert said.startswith(f"training pairs: only {with_pair:,} of {rows.n_sequences:,} rows have a question")
    assert said.endswith("raise data.seq_len to 128")
    assert [message.split(":")[0] for message in caplog.messages].count("validation pairs") == 1


def test_questions_without_a_match_want_more_documents(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One long document beside a short one: only what is as long as something of the other has a match."""
    one_sided = [[9] * 400, [9, 9]]
    with caplog.at_level(logging.WARNING, logger="llmkit"):
        open_datasets(prepared(tmp_path, one_sided, many(40)), named("next_sentence"), 64)
    assert caplog.messages[0].endswith("give more documents")


@pytest.mark.parametrize("name", ["next_sentence", "sentence_order"])
@pytest.mark.parametrize("split", ["training", "validation"])
def test_an_error_says_of_which_text_no_pairs_can_be_made(tmp_path: Path, name: str, split: str) -> None:
    alone = [[50]]
    texts = (alone, many(40)) if split == "training" else (many(40), alone)
    with pytest.raises(DataError, match=f"the {split} text") as caught:
        open_datasets(prepared(tmp_path, *texts), named(name), 64)
    assert ("data.val_fraction" in caught.value.fix) == (split == "validation")
