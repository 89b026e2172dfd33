"""``prepare``: what is stored is the text, whatever the number of processes; what is left out is counted."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from llmkit.data import passes, sources
from llmkit.data.prepare import PreparedData
from llmkit.data.report import summary_lines
from llmkit.data.sampler import SampleOrder
from llmkit.data.token_shards import ShardWriter, WindowDataset
from llmkit.errors import CheckpointError, ConfigError, DataError
from tests.unit.data.helpers import ByteSpec, ByteTokenizer, config, run, texts_of, write_jsonl


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a file, several batches a chunk (in this process)."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 500)
    monkeypatch.setattr(passes, "BATCH_BYTES", 100)


def words(n: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    choices = ("alpha", "beta", "gamma é", "delta")
    return [" ".join([*draw.choices(choices, k=draw.randint(1, 12)), str(number)]) for number in range(n)]


def trained_on(prepared: PreparedData) -> list[str]:
    texts: list[str] = json.loads((prepared.tokenizer_folder / "seen.json").read_text())
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    """The entry's files, without what is measured or names times."""
    skipped = {"report.json", "manifest.json", "inputs.json"}
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in skipped
    }


@pytest.mark.usefixtures("small_chunks")
def test_the_text_comes_back_and_is_counted(tmp_path: Path, cache: Path) -> None:
    texts = words(60)
    prepared = run(config(write_jsonl(tmp_path / "a.jsonl", texts), cache))
    (train,) = prepared.train
    assert texts_of(train) == texts
    assert len(train.paths) > 3
    n_bytes = sum(len(text.encode()) for text in texts)
    assert (train.n_documents, train.n_bytes, train.n_tokens) == (60, n_bytes, n_bytes + 120)
    assert prepared.val is None
    assert prepared.report["train"] == {"n_documents": 60, "n_bytes": n_bytes, "n_tokens": n_bytes + 120}
    assert trained_on(prepared) == texts
    assert not (prepared.folder / "work").exists()


@pytest.mark.usefixtures("small_chunks")
def test_the_number_of_processes_changes_nothing(tmp_path: Path, cache: Path) -> None:
    """Two real processes against none; repeated documents, a held-out part and a second source."""
    texts = words(80)
    paths = [
        str(write_jsonl(tmp_path / "a.jsonl", texts + texts[:20])),
        str(write_jsonl(tmp_path / "b.jsonl", words(30, 5))),
    ]
    one, two = (
        run(
            config(paths, cache / str(n), n_workers=n, val_fraction=0.3, deduplicate=True),
            ByteSpec(max_train_bytes=500),
        )
        for n in (1, 2)
    )
    assert one.folder.name == two.folder.name
    assert contents(one.folder) == contents(two.folder)
    speed = one.report.pop("speed"), two.report.pop("speed")
    assert one.report == two.report
    assert (speed[0]["n_workers"], speed[1]["n_workers"]) == (1, 2)
    assert speed[1]["peak_memory_bytes"] > speed[0]["peak_memory_bytes"]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("max_train_bytes", [1, 1 << 20], ids=["read twice", "from the sample"])
def test_only_training_documents_train_the_tokenizer(tmp_path: Path, cache: Path, max_train_bytes: int) -> None:
    texts = words(200)
    data = config(write_jsonl(tmp_path / "a.jsonl", texts), cache, val_fraction=0.2)
    prepared = run(data, ByteSpec(max_train_bytes=max_train_bytes))
    assert prepared.val is not None
    train, val, seen = texts_of(prepared.train[0]), texts_of(prepared.val), trained_on(prepared)
    assert sorted(train + val) == sorted(texts)
    assert 20 <= len(val) <= 60
    assert seen
    assert set(seen) <= set(train)
    if max_train_bytes > 1:
        assert seen == train
    assert prepared.report["tokenizer"]["measured_on"] == "validation"
    assert prepared.report["tokenizer"]["n_documents"] == len(val)


def test_the_sample_for_the_tokenizer_is_spread_and_bounded(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 10_000)
    texts = words(3000)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    seen = trained_on(run(config(path, cache), ByteSpec(max_train_bytes=path.stat().st_size // 10)))
    assert 200 < len(seen) < 450
    places = [texts.index(text) for text in seen]
    assert min(places) < 300
    assert max(places) > 2700


def test_a_document_is_on_one_side_whatever_its_file(tmp_path: Path, cache: Path) -> None:
    """The same texts in other files, in another order, with others added: each stays where it was."""
    texts = words(300)
    first = run(config(write_jsonl(tmp_path / "a.jsonl", texts), cache, val_fraction=0.1))
    write_jsonl(tmp_path / "b.jsonl", reversed(texts))
    write_jsonl(tmp_path / "c.jsonl", words(50, 9) + texts[:5])
    second = run(config([str(tmp_path / "b.jsonl"), str(tmp_path / "c.jsonl")], cache, val_fraction=0.1))
    assert first.val is not None
    assert second.val is not None
    held_out = set(texts_of(first.val))
    assert held_out == set(texts) & set(texts_of(second.val))
    assert not held_out & {text for shards in second.train for text in texts_of(shards)}


@pytest.mark.parametrize("max_train_bytes", [1, 1 << 20], ids=["read twice", "from the sample"])
def test_few_documents(tmp_path: Path, cache: Path, max_train_bytes: int) -> None:
    """A held-out text is found, reported on, and looked for in the training text."""
    long = "a sentence that is long enough to be looked for in other texts, word by word; " * 4
    texts = ["x" * 5000, "y" * 4000, "z" * 4500, long + "end", long + "fin", long]
    data = config(write_jsonl(tmp_path / "a.jsonl", texts), cache, val_fraction=0.02)
    prepared = run(data, ByteSpec(max_train_bytes=max_train_bytes))
    assert prepared.val is not None
    (held_out,) = texts_of(prepared.val)
    assert held_out.startswith(long)
    assert prepared.report["leaks"] == {"n_exact": 0, "n_near": 1, "n_checked": 1}
    assert held_out not in trained_on(prepared)
    assert prepared.report["tokenizer"]["n_documents"] == 1
    with pytest.raises(DataError, match="cannot be split"):
        run(config(write_jsonl(tmp_path / "b.jsonl", ["alone"]), cache, val_fraction=0.02))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("max_train_bytes", [1, 1 << 20], ids=["read twice", "from the sample"])
def test_the_first_of_repeated_documents_stays(tmp_path: Path, cache: Path, max_train_bytes: int) -> None:
    """Over batches, chunks and files."""
    draw = random.Random(2)
    texts = draw.choices(words(40), k=120)
    paths = [str(write_jsonl(tmp_path / f"{n}.jsonl", texts[n * 60 :][:60])) for n in range(2)]
    prepared = run(config(paths, cache, deduplicate=True), ByteSpec(max_train_bytes=max_train_bytes))
    assert [text for shards in prepared.train for text in texts_of(shards)] == list(dict.fromkeys(texts))


def test_repeated_documents_are_counted_and_dropped_on_request(tmp_path: Path, cache: Path) -> None:
    a, b = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "one"]), write_jsonl(tmp_path / "b.jsonl", ["two", "three"])
    kept = run(config([str(a), str(b)], cache))
    assert [texts_of(shards) for shards in kept.train] == [["one", "two", "one"], ["two", "three"]]
    dropped = run(config([str(a), str(b)], cache, deduplicate=True))
    assert [texts_of(shards) for shards in dropped.train] == [["one", "two"], ["three"]]
    assert trained_on(dropped) == ["one", "two", "three"]
    for prepared, n_dropped in ((kept, 0), (dropped, 1)):
        rows = [(s["n_documents"], s["n_repeated"], s["n_dropped"]) for s in prepared.report["sources"]]
        assert rows == [(3, 1, n_dropped), (2, 1, n_dropped)]
    assert any("1 repeated documents kept" in line for line in summary_lines(kept.report))
    assert not dropped.report["warnings"]


def test_held_out_text_of_its_own(tmp_path: Path, cache: Path) -> None:
    """``val_path`` is validation as a whole; what of it stands in the training text is counted and said."""
    draw = random.Random(1)
    long = [" ".join(str(draw.random()) for _ in range(30)) for _ in range(4)]
    train = write_jsonl(tmp_path / "train.jsonl", [*words(20), long[0], "intro " + long[1] + " outro"])
    val = write_jsonl(tmp_path / "val.jsonl", [long[0], long[1], long[2], "short"])
    prepared = run(config(train, cache, val_path=str(val), val_fraction=0.4))
    assert prepared.val is not None
    assert len(texts_of(prepared.train[0])) == 22
    assert texts_of(prepared.val) == [long[0], long[1], long[2], "short"]
    assert prepared.report["leaks"] == {"n_exact": 1, "n_near": 2, "n_checked": 3}
    assert any("stands in the training text: 1 documents exactly, 2 nearly" in w for w in prepared.report["warnings"])
    assert set(trained_on(prepared)) == set(texts_of(prepared.train[0]))


def test_sources_and_weights(tmp_path: Path, cache: Path) -> None:
    paths = [str(write_jsonl(tmp_path / f"{n}.jsonl", words(20, n))) for n in range(2)]
    prepared = run(config(paths, cache, weights=[3.0, 1.0]))
    sizes = tuple(WindowDataset(shards, 16, 1).n_sequences for shards in prepared.train)
    order = SampleOrder(sizes, (3.0, 1.0), 0)
    drawn = [order.locate(position)[0] for position in range(1024)]
    assert drawn.count(0) == 768
    with pytest.raises(ConfigError, match="1 weights for 2 sources"):
        run(config(paths, cache, weights=[1.0]))


def test_a_given_tokenizer_is_used_as_it_is(tmp_path: Path, cache: Path) -> None:
    data = config(write_jsonl(tmp_path / "a.jsonl", ["ab", "c"]), cache)
    tokenizer = ByteTokenizer(vocab_size=70_000, bos_id=None)
    prepared = run(data, tokenizer=tokenizer)
    assert prepared.train[0].window(0, 5).tolist() == [99, 100, 1, 101, 1]
    assert run(data, tokenizer=tokenizer).reused
    assert not run(data, tokenizer=ByteTokenizer()).reused


class TestBadRows:
    def test_few_are_counted_with_their_lines(self, tmp_path: Path, cache: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", ["fine", 7, "", "fine too"])
        with path.open("a") as file:
            file.write("{broken\n")
        prepared = run(config(path, cache, max_bad_fraction=0.9))
        (source,) = prepared.report["sources"]
        assert source["bad_rows"] == {"wrong type": 1, "empty": 1, "broken json": 1}
        assert source["bad_examples"] == [f"{path}:2: wrong type", f"{path}:3: empty", f"{path}:5: broken json"]
        assert "bad rows left out: 1 wrong type" in prepared.report["warnings"][0]
        with pytest.raises(DataError, match=r"3 of 5 rows .* cannot be used \(60.00%\)"):
            run(config(path, cache, max_bad_fraction=0.5))  # the entry is there, the limit is another

    @pytest.mark.usefixtures("small_chunks")
    def test_too_many_end_the_preparation(self, tmp_path: Path, cache: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", [*words(50), 1, 2, 3, 4, 5, 6, 7])
        with pytest.raises(DataError) as caught:
            run(config(path, cache, max_bad_fraction=0.01))
        message = str(caught.value)
        assert "7 of 57 rows" in message
        assert f"{path}:51: wrong type" in message
        assert message.count("wrong type") == 1 + 5
        assert "data.max_bad_fraction=0.123" in message
        run(config(path, cache, max_bad_fraction=0.123))

    def test_each_source_has_its_own_limit(self, tmp_path: Path, cache: Path) -> None:
        good, bad = write_jsonl(tmp_path / "a.jsonl", words(500)), write_jsonl(tmp_path / "b.jsonl", ["x", 1])
        with pytest.raises(DataError, match=r"1 of 2 rows of .*b.jsonl"):
            run(config([str(good), str(bad)], cache, max_bad_fraction=0.1))

    @pytest.mark.parametrize(
        ("name", "text"), [("a.txt", ""), ("a.txt", " \n \n"), ("a.jsonl", "\n"), ("a.csv", "text\n")]
    )
    def test_nothing_to_read_names_the_file(self, tmp_path: Path, cache: Path, name: str, text: str) -> None:
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match="no document in") as caught:
            run(config(tmp_path / name, cache))
        assert str(tmp_path / name) in str(caught.value)

    def test_a_wrong_field_names_the_right_ones(self, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"body": "x", "id": 3}\n')
        with pytest.raises(DataError, match=r"data\.text_field to one of body, id"):
            run(config(tmp_path / "a.jsonl", cache))

    def test_files_without_documents_are_named(self, tmp_path: Path, cache: Path) -> None:
        for name, text in (("a.txt", "text"), ("b.txt", ""), ("c.md", "other")):
            (tmp_path / name).write_text(text)
        prepared = run(config(tmp_path, cache / "c"))
        (source,) = prepared.report["sources"]
        assert (source["n_files"], source["n_ignored_files"], source["n_files_without_documents"]) == (2, 1, 1)
        assert source["files_without_documents"] == [str(tmp_path / "b.txt")]

    def test_a_document_without_ids_is_no_training_text(self, tmp_path: Path, cache: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", ["alone"])
        with pytest.raises(DataError, match="gave no ids"):
            run(config(path, cache), tokenizer=NoIds(), load=lambda folder: NoIds())


class NoIds(ByteTokenizer):
    def encode(self, text: str) -> list[int]:
        return []


class Meddler(ByteSpec):
    """Does something to the files between the two passes, when the tokenizer is trained."""

    def __init__(self, action: str, path: Path, max_train_bytes: int) -> None:
        super().__init__(max_train_bytes=max_train_bytes)
        object.__setattr__(self, "action", action)
        object.__setattr__(self, "path", path)

    def train(self, texts: Iterable[str], folder: Path) -> ByteTokenizer:
        tokenizer = super().train(texts, folder)
        if self.action == "delete":
            self.path.unlink()
        elif self.action == "append":
            with self.path.open("a") as file:
                file.write('{"text": "more"}\n')
        else:  # replaced by another text of the same size and time
            stat = self.path.stat()
            self.path.write_text(self.path.read_text().replace("alpha", "omega"))
            os.utime(self.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        return tokenizer


@pytest.mark.parametrize("action", ["delete", "append", "replace"])
@pytest.mark.parametrize("max_train_bytes", [1, 1 << 20], ids=["read twice", "from the sample"])
def test_a_file_that_changes_meanwhile_is_named(tmp_path: Path, cache: Path, action: str, max_train_bytes: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", words(100))
    with pytest.raises(DataError) as caught:
        run(config(path, cache), Meddler(action, path, max_train_bytes))
    assert str(path) in str(caught.value)
    assert not list(cache.glob("a-*"))
    assert not list(cache.glob(".tmp*"))


def test_a_change_that_the_fingerprint_cannot_see(tmp_path: Path, cache: Path) -> None:
    """In the middle of a large file, with its size and time put back: the second pass reads other text."""
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 100_000, "alpha", "x" * 100_000])
    with pytest.raises(DataError, match="changed while it was being prepared"):
        run(config(path, cache), Meddler("replace", path, 1))


def test_a_full_disk_is_an_error_of_the_disk(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", full)
    with pytest.raises(CheckpointError, match=r"No space left on device \(\d+ MiB free\)") as caught:
        run(config(write_jsonl(tmp_path / "a.jsonl", ["x"]), cache))
    assert "data.cache_dir" in caught.value.fix
    assert not list(cache.glob(".tmp*"))


def test_progress_on_a_terminal_and_without(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", words(30))
    monkeypatch.setattr("llmkit.data.progress._LINE_SECONDS", 0.0)
    with caplog.at_level("INFO", "llmkit.data"):
        run(config(path, cache), progress=True)
    assert "tokenising: 1 of 1 pieces" in caplog.text
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    caplog.clear()
    with caplog.at_level("INFO", "llmkit.data"):
        run(config(path, cache), ByteSpec(300), progress=True)
    assert "pieces" not in caplog.text
