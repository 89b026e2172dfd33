"""Finding files, and telling the wrong ones: paths, compression, encodings, damage."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llmkit.data.readers.base import Chunk, chunks_of, expand_paths, find_sources, fingerprint, read_chunk
from llmkit.data.readers.streams import foreign_encoding
from llmkit.errors import DataError, SetupError
from tests.unit.data.readers_support import SETTINGS, bad, rows, texts, write


def _zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    compressed: bytes = zstandard.ZstdCompressor().compress(data)
    return compressed


COMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": _zstd}
CONTENT = {
    ".txt": "".join(f"line {n} é\n" for n in range(3000)).encode(),
    ".jsonl": b"".join(b'{"text": "document %d"}\nbroken\n' % n for n in range(3000)),
    ".csv": b"id,text\n" + b"".join(b'%d,"two\nlines %d"\n' % (n, n) for n in range(3000)),
    ".tsv": b"id\ttext\n" + b"".join(b"%d\tone %d\n" % (n, n) for n in range(3000)),
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", CONTENT)
def test_compressed_files_hold_the_same_documents(tmp_path: Path, suffix: str, compression: str) -> None:
    plain = write(tmp_path / f"a{suffix}", CONTENT[suffix])
    one = write(tmp_path / f"b{suffix}{compression}", COMPRESS[compression](CONTENT[suffix]))
    half = len(CONTENT[suffix]) // 2
    parts = [COMPRESS[compression](CONTENT[suffix][:half]), COMPRESS[compression](CONTENT[suffix][half:])]
    two = write(tmp_path / f"c{suffix}{compression}", b"".join(parts))
    assert texts(plain, max_document_bytes=5000)
    assert rows(one, 1000, max_document_bytes=5000) == rows(plain, max_document_bytes=5000)
    assert rows(two, 1000, max_document_bytes=5000) == rows(plain, max_document_bytes=5000)
    assert [chunk.end - chunk.start for chunk in chunks_of([str(one)], 1000)] == [one.stat().st_size]


@pytest.mark.parametrize("compression", COMPRESS)
def test_cut_compressed_file(tmp_path: Path, compression: str) -> None:
    whole = COMPRESS[compression](os.urandom(20_000).hex().encode() + b"\n")
    for keep in (5, 30, len(whole) // 2, len(whole) - 1):
        path = write(tmp_path / f"a.txt{compression}", whole[:keep])
        with pytest.raises(DataError, match="damaged or cut off") as caught:
            rows(path)
        assert caught.value.where.startswith(f"{path}: byte ")
        assert int(caught.value.where.rpartition(" ")[2]) <= keep
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    with pytest.raises(DataError, match="damaged or cut off"):
        bad(write(tmp_path / f"b.txt{compression}", bytes(flipped) + b"garbage"))


def test_suffix_that_lies(tmp_path: Path) -> None:
    for suffix, compress in COMPRESS.items():
        with pytest.raises(DataError, match=f"ends in {suffix}"):
            rows(write(tmp_path / f"a.txt{suffix}", b"plain text"))
        with pytest.raises(DataError, match=f"does not end in {suffix}"):
            rows(write(tmp_path / "a.txt", compress(b"plain text")))
    for magic in (b"PK\x03\x04", b"BZh91AY", b"\xfd7zXZ\0", b"PAR1"):
        with pytest.raises(DataError, match="not text"):
            rows(write(tmp_path / "a.jsonl", magic + b" and more"))


def test_zstd_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt.zst", _zstd(b"hello"))
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(SetupError) as caught:
        rows(path)
    assert caught.value.fix == "pip install 'llmkit[zstd]'"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".txt.gz"])
def test_foreign_encoding_is_an_error_with_the_cure(tmp_path: Path, encoding: str, suffix: str) -> None:
    data = '{"text": "Grüße, 漢字, and some plain words"}\n'.encode(encoding)
    path = write(tmp_path / f"a{suffix}", gzip.compress(data) if suffix.endswith(".gz") else data)
    with pytest.raises(DataError, match="not UTF-8") as caught:
        chunks_of([str(path)], 1000)
    assert "iconv -f UTF-" in caught.value.fix
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    "data", [b"", b"a", b"ab\0c", b"plain text", "漢字😀".encode(), b"\0" * 64, b"a\0 b and more text"]
)
def test_a_few_zero_bytes_are_no_foreign_encoding(data: bytes) -> None:
    assert foreign_encoding(data) is None


ODD_NAMES = ["with space.txt", "new\nline.txt", "ümlaut 漢.txt", "[x]*.txt", "UPPER.TXT", "quote'\".txt", "-dash.txt"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_file_names(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "hello")
    assert expand_paths(str(path)) == [str(path)]
    assert texts(path) == ["hello"]
    assert expand_paths(str(tmp_path)) == [str(path)]
    assert len(fingerprint(str(path))) == 64


def _tree(root: Path) -> None:
    (root / "b" / "c").mkdir(parents=True)
    for name in ("z.txt", "a.jsonl", "b/m.csv", "b/c/n.txt.gz", "b/image.png", "README", ".hidden.txt", "b/.DS_Store"):
        (root / name).write_bytes(b"")


def test_folder_is_searched_in_order_and_what_is_ignored_is_counted(tmp_path: Path) -> None:
    _tree(tmp_path)
    found = find_sources(str(tmp_path))
    assert found.paths == [str(tmp_path / name) for name in ("a.jsonl", "b/c/n.txt.gz", "b/m.csv", "z.txt")]
    assert found.n_ignored == 4


def test_globs_and_lists(tmp_path: Path) -> None:
    _tree(tmp_path)
    assert expand_paths(str(tmp_path / "**" / "*.txt*")) == [str(tmp_path / name) for name in ("b/c/n.txt.gz", "z.txt")]
    everything = find_sources(str(tmp_path / "*"))
    assert everything.paths == expand_paths(str(tmp_path))
    assert everything.n_ignored == 3  # README, image.png, .DS_Store: a glob does not even see .hidden.txt
    deep = find_sources(str(tmp_path / "**"))
    assert deep.paths == everything.paths
    listed = find_sources([str(tmp_path / "z.txt"), "builtin:python_docs", str(tmp_path / "a.jsonl")])
    assert listed.paths == [str(tmp_path / "z.txt"), "builtin:python_docs", str(tmp_path / "a.jsonl")]


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", "x")
    assert expand_paths("~/a.txt") == [str(tmp_path / "a.txt")]


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("missing.txt", "nothing is found"),
        ("*.nothing", "nothing is found"),
        ("nul\0byte.txt", "nothing is found"),
        ("notes.docx", "no reader"),
        ("notes.parquet.gz", "no reader"),
        ("empty", "no file that can be read"),
        ("builtin:novel", "no built-in corpus"),
        ([], "names no source"),
    ],
)
def test_nothing_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | list[str], what: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("notes.docx", "notes.parquet.gz"):
        write(tmp_path / name, "x")
    with pytest.raises(DataError, match=what) as caught:
        expand_paths(path)
    assert caught.value.fix


def test_symbolic_links(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    write(folder / "a.txt", "a")
    write(elsewhere / "b.txt", "b")
    (folder / "up").symlink_to(folder, target_is_directory=True)
    (folder / "else").symlink_to(elsewhere, target_is_directory=True)
    assert expand_paths(str(folder)) == [str(folder / "a.txt"), str(folder / "else" / "b.txt")]
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    for act in (fingerprint, rows):
        with pytest.raises(DataError, match="cannot be read"):
            act(str(folder / "loop.txt"))


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", "x")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # permissions do not stop root
    monkeypatch.setattr(os, "listdir", refuse)
    for act in (fingerprint, rows):
        with pytest.raises(DataError, match="cannot be read: Permission denied") as caught:
            act(str(path))
        assert caught.value.where == str(path)
    with pytest.raises(DataError, match="folder cannot be read: Permission denied"):
        expand_paths(str(tmp_path))


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.csv", "a.parquet", "a.txt.gz"):
        (tmp_path / name).mkdir()
        with pytest.raises(DataError, match="cannot be read"):
            chunks_of([str(tmp_path / name)], 100)


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n' * 100)
    (chunk,) = chunks_of([str(path)], 1 << 20)
    write(path, b'{"text": "a"}\n' * 50)
    with pytest.raises(DataError, match="became shorter"):
        list(read_chunk(chunk, SETTINGS))


def test_fingerprint_follows_size_time_and_both_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"x" * 300_000)
    stat, seen = path.stat(), {fingerprint(str(path))}

    def change(content: bytes, mtime_ns: int) -> str:
        write(path, content)
        os.utime(path, ns=(stat.st_atime_ns, mtime_ns))
        return fingerprint(str(path))

    assert change(b"x" * 300_000, stat.st_mtime_ns) in seen
    others = [(b"x" * 300_001, 0), (b"y" + b"x" * 299_999, 0), (b"x" * 299_999 + b"y", 0), (b"x" * 300_000, 1)]
    for content, later in others:
        mark = change(content, stat.st_mtime_ns + later)
        assert mark not in seen
        seen.add(mark)


def test_chunks_can_be_sent_to_another_process(tmp_path: Path) -> None:
    import pickle

    chunk = Chunk(str(tmp_path / "a.txt"), 0, 5, "txt")
    assert pickle.loads(pickle.dumps(chunk)) == chunk
