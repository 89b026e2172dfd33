"""Preparation with sentences: they stand beside the ids, change nothing about them, and are checked like them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from llmkit.data import passes, sources
from llmkit.data.report import summary_lines
from llmkit.data.sentence_files import FIRST, FLAG_BITS, GOES_ON, sentence_path
from llmkit.data.sentences import split_sentences
from llmkit.data.token_shards import TokenShards
from llmkit.errors import DataError
from tests.unit.data.helpers import ByteSpec, ByteTokenizer, config, run, texts_of, write_jsonl
from tests.unit.data.test_cache import cut, flip
from tests.unit.data.test_prepare import contents

TEXTS = [f"Text {n} begins here. " + " ".join(f"Then comes sentence {k} é." for k in range(n % 7)) for n in range(60)]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a file, several batches a chunk (in this process)."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 500)
    monkeypatch.setattr(passes, "BATCH_BYTES", 100)


def stored(shards: TokenShards) -> list[list[str]]:
    """The sentences of every document, decoded; checks that every entry begins one."""
    documents: list[list[str]] = []
    for shard in range(len(shards.paths)):
        offset, stop, entries = shards.sentences(shard)
        places = [*(int(entry) >> FLAG_BITS for entry in entries), stop - offset + 1]
        for entry, (start, following) in zip(entries, pairwise(places), strict=True):
            ids = shards.window(offset + start, min(offset + following, stop))
            if int(entry) & FIRST:
                documents.append([])
                assert shards.bos_id is None or shards.window(offset + start - 1, offset + start) == [shards.bos_id]
            documents[-1].append(ByteTokenizer().decode(ids.tolist()))
    return documents


def flags(shards: TokenShards, flag: int) -> list[bool]:
    """``flag`` of the first entry of every document."""
    entries = np.concatenate([shards.sentences(shard)[2] for shard in range(len(shards.paths))]).astype(np.int64)
    return [bool(entry & flag) for entry in entries if entry & FIRST]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bos_id", [0, None])
def test_every_sentence_has_its_place(tmp_path: Path, cache: Path, bos_id: int | None) -> None:
    paths = [str(write_jsonl(tmp_path / f"{n}.jsonl", TEXTS[n::2])) for n in range(2)]
    data = config(paths, cache, val_fraction=0.3)
    tokenizer = ByteTokenizer(bos_id=bos_id)
    prepared = run(data, tokenizer=tokenizer, load=lambda _: tokenizer, sentences=True)
    assert prepared.val is not None
    n_sentences = {"train": 0, "val": 0}
    for split, shards in (("train", prepared.train[0]), ("train", prepared.train[1]), ("val", prepared.val)):
        expected = [split_sentences(text) for text in texts_of(shards)]
        assert stored(shards) == expected
        n_sentences[split] += sum(map(len, expected))
    assert {split: prepared.report[split]["n_sentences"] for split in n_sentences} == n_sentences
    assert any(f", {n_sentences['train']} sentences" in line for line in summary_lines(prepared.report))


@pytest.mark.usefixtures("small_chunks")
def test_the_number_of_processes_changes_nothing(tmp_path: Path, cache: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    one, two = (run(config(path, cache / str(n), n_workers=n, val_fraction=0.3), sentences=True) for n in (1, 2))
    files = contents(one.folder)
    assert files == contents(two.folder)
    assert sum(name.endswith(".sentences.npy") for name in files) == sum(name.endswith(".bin") for name in files) > 3


def test_ids_and_older_entries_stay_as_they_are(tmp_path: Path, cache: Path) -> None:
    """The key of data without sentences holds nothing of them; with them, the same shards stand in another entry."""
    data = config(write_jsonl(tmp_path / "a.jsonl", TEXTS), cache)
    plain = run(data)
    key = sources.inputs_of(data, sources.find(data), ByteSpec().key(), sentences=False)
    assert list(key) == ["version", "chunk_bytes", "data", "tokenizer", "files"]
    with_sentences = run(data, sentences=True)
    assert with_sentences.reason == "rebuilt: sentences None -> 3"
    assert run(data).folder == plain.folder
    assert run(data, sentences=True).reused
    before, after = contents(plain.folder), contents(with_sentences.folder)
    assert {name for name in after if name not in before} == {"train-00-000000.sentences.npy"}
    assert all(after[name] == content for name, content in before.items())
    assert "n_sentences" not in plain.report["train"]
    with pytest.raises(DataError, match="sentences of a token shard cannot be read"):
        plain.train[0].sentences(0)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_file_is_made_again(tmp_path: Path, cache: Path, damage: Callable[[Path], object]) -> None:
    data = config(write_jsonl(tmp_path / "a.jsonl", TEXTS), cache)
    damage(run(data, sentences=True).folder / "train-00-000000.sentences.npy")
    again = run(data, sentences=True)
    assert again.reason.startswith("rebuilt: ")
    assert "train-00-000000.sentences.npy" in again.reason
    assert stored(again.train[0]) == [split_sentences(text) for text in TEXTS]


def test_damage_without_a_trace_is_found_by_reading_everything(tmp_path: Path, cache: Path) -> None:
    data = config(write_jsonl(tmp_path / "a.jsonl", TEXTS), cache)
    flip(run(data, sentences=True).folder / "train-00-000000.sentences.npy", keep_time=True)
    assert run(data, sentences=True).reused
    assert "is damaged" in run(data, sentences=True, verify=True).reason


@pytest.mark.parametrize(
    "content", [b"", b"nothing", np.zeros(60, np.int32), np.zeros((60, 2), np.uint64), np.zeros(3, np.uint64)], ids=str
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, cache: Path, content: bytes | np.ndarray) -> None:
    shards = run(config(write_jsonl(tmp_path / "a.jsonl", TEXTS), cache), sentences=True).train[0]
    path = sentence_path(shards.paths[0])
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(DataError) as caught:
        shards.sentences(0)
    assert str(path) in str(caught.value)


def test_a_document_without_ids_has_a_place_all_the_same(tmp_path: Path, cache: Path) -> None:
    class Deaf(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return [] if "nothing" in text else super().encode(text)

    path = write_jsonl(tmp_path / "a.jsonl", ["One. Two.", "nothing. Nothing.", "Three. Four.", "nothing"])
    prepared = run(config(path, cache), tokenizer=Deaf(), load=lambda _: Deaf(), sentences=True)
    assert stored(prepared.train[0]) == [["One.", " Two."], [""], ["Three.", " Four."], [""]]
    assert prepared.report["train"]["n_sentences"] == 4


@pytest.mark.parametrize("max_train_bytes", [1, 1 << 20], ids=["read twice", "from the sample"])
def test_sections_of_a_text_are_known(tmp_path: Path, cache: Path, max_train_bytes: int) -> None:
    long = " ".join(f"A sentence of a long text, the {n}th." for n in range(9))
    path = write_jsonl(tmp_path / "a.jsonl", ["Short.", long, "Short, too.", long + " More."])
    prepared = run(
        config(path, cache, max_document_bytes=100), ByteSpec(max_train_bytes=max_train_bytes), sentences=True
    )
    texts = texts_of(prepared.train[0])
    assert len(texts) == 10
    begins = [text.startswith(("Short", "A sentence of a long text, the 0th")) for text in texts]
    assert flags(prepared.train[0], GOES_ON) == [not begin for begin in begins]


NUMBERED = ["\n".join(f"Number {n} says {k}." for k in range(3 + n % 9)) for n in range(80)]


def numbers_of(shards: TokenShards) -> list[str]:
    """The text that each document of a split is a section of; checks that it is of one."""
    owners = [re.findall(r"Number (\d+)", text) for text in texts_of(shards)]
    assert all(len(set(owner)) == 1 for owner in owners)
    return [owner[0] for owner in owners]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("max_train_bytes", [1, 1 << 20], ids=["read twice", "from the sample"])
@pytest.mark.parametrize("n_texts", [80, 8], ids=["many", "few"])
@pytest.mark.parametrize("form", ["jsonl", "txt"])
def test_a_text_is_on_one_side(tmp_path: Path, cache: Path, form: str, n_texts: int, max_train_bytes: int) -> None:
    """Although it is cut, and its sections are read by different processes."""
    if form == "jsonl":
        write_jsonl(tmp_path / "a.jsonl", NUMBERED[:n_texts])
    for n in range(n_texts if form == "txt" else 0):
        (tmp_path / f"{n:02d}.txt").write_text("\n".join([NUMBERED[n]] * 5))
    data = config(
        tmp_path / ("a.jsonl" if form == "jsonl" else "*.txt"), cache, max_document_bytes=64, val_fraction=0.3
    )
    prepared = run(data, ByteSpec(max_train_bytes=max_train_bytes), sentences=True)
    assert prepared.val is not None
    train, val = numbers_of(prepared.train[0]), numbers_of(prepared.val)
    assert set(train).isdisjoint(val)
    assert len(set(train)) + len(set(val)) == n_texts
    assert 0.1 < prepared.val.n_bytes / (prepared.val.n_bytes + prepared.train[0].n_bytes) < 0.4
    for shards, numbers in ((prepared.train[0], train), (prepared.val, val)):
        assert len(numbers) > len(set(numbers))
        assert flags(shards, GOES_ON) == [False, *(a == b for a, b in pairwise(numbers))]
    assert prepared.report["tokenizer"]["n_documents"] == len(val), "the scan knew some of them for training text"


@pytest.mark.usefixtures("small_chunks")
def test_processes_do_not_decide_the_side_of_a_text(tmp_path: Path, cache: Path) -> None:
    for n in range(12):
        (tmp_path / f"{n:02d}.txt").write_text("\n".join([NUMBERED[n]] * 9))
    data = config(tmp_path / "*.txt", cache, max_document_bytes=64, val_fraction=0.3)
    one, two = (
        run(replace(data, cache_dir=str(cache / str(n)), n_workers=n), ByteSpec(max_train_bytes=1), sentences=True)
        for n in (1, 2)
    )
    assert contents(one.folder) == contents(two.folder)
    assert one.report["leaks"] == two.report["leaks"]


@pytest.mark.usefixtures("small_chunks")
def test_a_single_text_is_split_between_its_sections(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"This is sentence {n} of a text.\n" for n in range(200)))
    data = config(tmp_path / "a.txt", cache, max_document_bytes=64, val_fraction=0.2)
    prepared = run(data, ByteSpec(max_train_bytes=1), sentences=True)
    assert prepared.val is not None
    assert 0.1 < prepared.val.n_bytes / (prepared.val.n_bytes + prepared.train[0].n_bytes) < 0.3
    assert all(flags(prepared.val, GOES_ON)[1:])
    assert prepared.report["tokenizer"]["n_documents"] == prepared.val.n_documents
    assert texts_of(prepared.val) == texts_of(run(data).val)


def test_without_sentences_sections_are_split(tmp_path: Path, cache: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", NUMBERED)
    prepared = run(config(path, cache, max_document_bytes=64, val_fraction=0.3))
    assert prepared.val is not None
    assert not set(numbers_of(prepared.train[0])).isdisjoint(numbers_of(prepared.val))


@pytest.mark.parametrize("deduplicate", [False, True])
def test_sections_that_stand_on_both_sides_are_counted(tmp_path: Path, cache: Path, deduplicate: bool) -> None:
    """Whole texts are on one side, but a section may be one of another text as well."""
    texts = [f"The text of number {n:02d} begins in its own way, here it does.\nAnd all end alike." for n in range(60)]
    data = config(write_jsonl(tmp_path / "a.jsonl", texts), cache, max_document_bytes=64, val_fraction=0.3)
    prepared = run(replace(data, deduplicate=deduplicate), sentences=True)
    assert prepared.val is not None
    n_alike = texts_of(prepared.val).count("And all end alike.")
    assert prepared.report["leaks"]["n_exact"] == (0 if deduplicate else n_alike)
    assert deduplicate or n_alike > 5


def test_a_text_that_goes_on_in_the_next_chunk(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is one text; another file is another."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 300)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("".join(f"This is sentence {n} of a text.\n" for n in range(40)))
    prepared = run(config([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], cache), sentences=True)
    for shards in prepared.train:
        assert len(shards.paths) > 3
        assert flags(shards, GOES_ON) == [False] + [True] * (shards.n_documents - 1)


def test_the_header_has_room_for_any_length() -> None:
    for length in (0, 1, 10**15):
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": "<u8", "fortran_order": False, "shape": (length,)})
        assert file.tell() == 128
