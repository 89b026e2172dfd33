"""GGUF files that are damaged or made to harm: a typed error each time, and little memory."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmkit.errors import CheckpointError, DataError, LLMKitError
from llmkit.gguf_file import MAX_HEADER_BYTES, read_gguf
from llmkit.models.gguf import load_gguf, save_gguf
from llmkit.models.hf import load_config
from llmkit.tokenizers.load import load_tokenizer
from tests.unit.models.tiny import built, llama

pytest.importorskip("gguf", reason="needs the extra gguf")

UINT32, FLOAT32, STRING, ARRAY, UINT64 = 4, 6, 8, 9, 10
F32, Q4_0, I32 = 0, 2, 26
PEAK = 4 << 20  # bytes that a refusal may take


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def start(n_tensors: int = 0, n_entries: int = 0, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, n_tensors, n_entries)


SHORT = b"\0" * 4096  # what stands for the tensors
TWICE = entry("a", UINT32, b"\0\0\0\0")
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no GGUF file"),
    "three bytes": (b"GGU", "no GGUF file"),
    "wrong magic": (start(magic=b"GGML") + SHORT, "no GGUF file"),
    "version 1": (start(version=1) + SHORT, "this one is version 1"),
    "big-endian": (start(version=3 << 24) + SHORT, "this one is big-endian"),
    "no header": (b"GGUF\3\0", "the header is cut off"),
    "2^60 tensors": (start(1 << 60) + SHORT, r"there are \d+ tensors, more than"),
    "2^63 entries": (start(0, 1 << 63) + SHORT, r"there are \d+ metadata entries, more than"),
    "key of 2^60 bytes": (start(0, 1) + struct.pack("<Q", 1 << 60) + SHORT, "asks for 1152921504606846976 bytes"),
    "text of 2^60 bytes": (start(0, 1) + entry("a", STRING, struct.pack("<Q", 1 << 60)) + SHORT, "asks for"),
    "array of 2^60": (start(0, 1) + entry("a", ARRAY, struct.pack("<IQ", UINT64, 1 << 60)) + SHORT, "asks for"),
    "array of 2^61": (start(0, 1) + entry("a", ARRAY, struct.pack("<IQ", UINT64, 1 << 61)) + SHORT, "asks for"),
    "2^60 texts": (start(0, 1) + entry("a", ARRAY, struct.pack("<IQ", STRING, 1 << 60)) + SHORT, "texts in a"),
    "array of arrays": (start(0, 1) + entry("a", ARRAY, struct.pack("<IQ", ARRAY, 1)) + SHORT, "unknown type 9"),
    "unknown value type": (start(0, 1) + entry("a", 77, b"") + SHORT, "a has the unknown type 77"),
    "not UTF-8": (start(0, 1) + entry("a", STRING, text(b"\xff\xfe")) + SHORT, "not UTF-8"),
    "key twice": (start(0, 2) + TWICE + TWICE + SHORT, "a is there twice"),
    "tensor twice": (start(2) + tensor("a", (4,)) + tensor("a", (4,), offset=32) + SHORT, "a is there twice"),
    "no dimensions": (start(1) + tensor("a", ()) + SHORT, "a has 0 dimensions"),
    "2^31 dimensions": (start(1) + text("a") + struct.pack("<I", 1 << 31) + SHORT, "a has 2147483648 dimensions"),
    "an axis of 0": (start(1) + tensor("a", (4, 0)) + SHORT, r"a has the shape \(0, 4\)"),
    "2^120 values": (start(1) + tensor("a", (1 << 60, 1 << 60)) + SHORT, "it is cut off"),
    "half a block": (start(1) + tensor("a", (33,), Q4_0) + SHORT, "rows must hold blocks of 32"),
    "unknown tensor type": (start(1) + tensor("a", (4,), 4095) + SHORT, "a has the unknown type 4095"),
    "removed tensor type": (start(1) + tensor("a", (32,), 4) + SHORT, "a has the unknown type 4"),
    "offset past the end": (start(1) + tensor("a", (4,), offset=1 << 40) + SHORT, "it is cut off"),
    "offset of 2^64 - 32": (start(1) + tensor("a", (4,), offset=(1 << 64) - 32) + SHORT, "it is cut off"),
    "offset not aligned": (start(1) + tensor("a", (4,), offset=4) + SHORT, "no multiple of 32"),
    "overlapping": (start(2) + tensor("a", (64,)) + tensor("b", (4,), offset=224) + SHORT, "b lies over tensor a"),
    "alignment of 3": (start(0, 1) + entry("general.alignment", UINT32, struct.pack("<I", 3)) + SHORT, "power of two"),
    "alignment of 0": (start(0, 1) + entry("general.alignment", UINT32, b"\0\0\0\0") + SHORT, "power of two"),
    "alignment as text": (start(0, 1) + entry("general.alignment", STRING, text("x")) + SHORT, "power of two"),
    "a part": (start(0, 1) + entry("split.count", UINT32, struct.pack("<I", 3)) + SHORT, "is one of 3 parts"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name: str, tmp_path: Path) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    read_gguf_once()  # imports are not what is measured
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < PEAK
    finally:
        tracemalloc.stop()
    assert str(path) in caught.value.where
    for opened in (load_config, load_gguf, load_tokenizer):
        with pytest.raises(CheckpointError):
            opened(path)


def read_gguf_once() -> None:
    import gguf

    assert gguf.GGML_QUANT_SIZES


def test_a_header_that_goes_on_and_on(tmp_path: Path) -> None:
    """A sparse file of 64 GB whose one text claims all of it."""
    path = tmp_path / "long.gguf"
    with path.open("wb") as file:
        file.write(start(0, 1) + entry("a", STRING, struct.pack("<Q", 1 << 35)))
        file.truncate(1 << 36)
    with pytest.raises(CheckpointError, match=f"asks for {1 << 35} bytes where {MAX_HEADER_BYTES - 45} can be left"):
        read_gguf(path)


def written(path: Path, **changes: Any) -> bytes:
    save_gguf(built(llama(d_model=32, vocab_size=40, **changes)), path, kind="q8_0", tokenizer_fields=FIELDS)
    return path.read_bytes()


FIELDS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "</s>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
}


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    whole = written(path)
    read_gguf(path)
    for length in [*range(0, 2000, 13), *range(2000, len(whole) - 32, 997), len(whole) - 33]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            load_gguf(path)


def test_random_damage_is_an_error_of_ours_or_none(tmp_path: Path) -> None:
    """One byte of the header changed: whatever comes of it, no other exception."""
    path = tmp_path / "m.gguf"
    whole, draw = written(path), random.Random(0)
    n_refused = 0
    for _ in range(150):
        place = draw.randrange(2200)
        path.write_bytes(whole[:place] + bytes([draw.randrange(256)]) + whole[place + 1 :])
        for opened in (load_gguf, load_tokenizer):
            try:
                opened(path)
            except LLMKitError:
                n_refused += 1
    assert n_refused > 50


def changed(path: Path, whole: bytes, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(whole))
    assert path.read_bytes() != whole
    return path


def number(key: str, value: int) -> Callable[[bytes], bytes]:
    """Another whole number for a key of the metadata."""

    def change(whole: bytes) -> bytes:
        place = whole.index(text(key)) + len(text(key)) + 4
        return whole[:place] + struct.pack("<I", value) + whole[place + 4 :]

    return change


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("llama.block_count", 1 << 31, r"the metadata ask for \d+ parameters, the file holds"),
        ("llama.embedding_length", 1 << 31, r"n_heads must divide|the metadata ask for|cut off"),
        ("llama.feed_forward_length", 1 << 30, r"the metadata ask for \d+ parameters, the file holds"),
        ("llama.block_count", 3, r"tensor blk\.2\.attn_k\.weight and 8 more: missing"),
        ("llama.block_count", 1, r"tensor blk\.1\.attn_k\.weight and 8 more: not part of the model"),
        ("llama.feed_forward_length", 96, r"tensor model\.layers\.0\.mlp\.gate_proj\.weight has the shape"),
        ("llama.attention.head_count", 0, "n_heads must be at least 1|makes? no sense"),
        ("llama.attention.head_count_kv", 3, "n_kv_heads must divide n_heads"),
    ],
)
def test_metadata_that_do_not_fit_the_tensors(key: str, value: int, what: str, tmp_path: Path) -> None:
    path = changed(tmp_path / "m.gguf", written(tmp_path / "m.gguf"), number(key, value))
    read_gguf_once()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=what):
            load_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 16 * PEAK
    finally:
        tracemalloc.stop()


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    """The scale of a Q8_0 block as infinity."""
    path = tmp_path / "m.gguf"
    whole = written(path)
    place = read_gguf(path).tensors["blk.1.ffn_gate.weight"].offset
    path.write_bytes(whole[:place] + struct.pack("<H", 0x7C00) + whole[place + 2 :])
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_gate\.weight holds values that are not finite"):
        load_gguf(path)


def test_a_type_that_is_not_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    whole = written(path)
    name = text("output_norm.weight")
    place = whole.index(name) + len(name) + 12
    path.write_bytes(whole[:place] + struct.pack("<I", I32) + whole[place + 4 :])
    with pytest.raises(CheckpointError, match=r"output_norm\.weight has the type I32"):
        load_gguf(path)


@pytest.mark.parametrize(
    ("key", "what"),
    [("tokenizer.ggml.eos_token_id", r"eos_token_id must be in 0 \.\.\. 3, got 1000000")],
)
def test_ids_outside_of_the_vocabulary(key: str, what: str, tmp_path: Path) -> None:
    path = changed(tmp_path / "m.gguf", written(tmp_path / "m.gguf"), number(key, 1_000_000))
    with pytest.raises(CheckpointError, match=what):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"tokenizer.ggml.model": "bert"}, "of the kind 'bert'"),
        ({"tokenizer.ggml.pre": "mystery"}, "does not know: 'mystery'"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "must be pairs of pieces"),
        ({"tokenizer.ggml.merges": ["a x"]}, "must be pairs of pieces"),
        ({"tokenizer.ggml.merges": ["b a"]}, "must be pairs of pieces"),
        ({"tokenizer.ggml.tokens": ["a", "b", "ab", "a"]}, "must hold every piece once"),
        ({"tokenizer.ggml.tokens": []}, "is missing|must be"),
        ({"tokenizer.ggml.tokens": "ab"}, "must be a list of texts"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "must be 40 numbers"),
        ({"tokenizer.ggml.model": "llama"}, "scores is missing"),
        ({"tokenizer.ggml.model": 3}, "must be a text, got 3"),
        ({"tokenizer.ggml.add_bos_token": 3}, "must be true or false, got 3"),
        ({"tokenizer.chat_templates": [1, 2]}, "must be a list of texts"),
    ],
)
def test_tokenizers_that_make_no_sense(fields: dict[str, Any], what: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    all_fields = {key: value for key, value in {**FIELDS, **fields}.items() if value != []}
    model = built(llama(d_model=32, vocab_size=40))
    if isinstance(all_fields.get("tokenizer.ggml.tokens"), str):
        all_fields["tokenizer.ggml.token_type"] = []
    save_gguf(model, path, kind="f32", tokenizer_fields=all_fields)
    with pytest.raises((CheckpointError, DataError), match=what):
        load_tokenizer(path)
