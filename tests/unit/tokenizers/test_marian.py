"""Folders of published Marian models against ``transformers.MarianTokenizer``: two models, one list of ids."""

from __future__ import annotations

import io
import json
import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llmkit.config.build import build
from llmkit.errors import CheckpointError, ConfigError, DataError
from llmkit.interfaces import Tokenizer
from llmkit.tasks.encoding import encode_target
from llmkit.tokenizers.chat_template import PLAIN
from llmkit.tokenizers.grow import add_tokens
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.marian import MarianTokenizer
from tests.unit.config.helpers import checked
from tests.unit.tasks.support import ask
from tests.unit.tokenizers.strings import documents, many_strings, trained

CODES = [
    ">>de<< Hello",
    ">>de<<",
    ">>xx<<no such code",
    " >>de<< a",
    ">>de<<>>de<< a",
    ">>",
    ">><<",
    ">>de< <a",
    ">>\n<<a",
]
FILES = ("source.spm", "target.spm", "vocab.json")


@cache
def models() -> tuple[bytes, bytes]:
    """Of two texts, with the settings of ``opus-mt``: characters normalised, no byte fallback."""
    from sentencepiece import SentencePieceTrainer

    found = []
    for texts in (documents()[:40], [text.swapcase() for text in documents()[40:70]]):
        model = io.BytesIO()
        SentencePieceTrainer.train(
            sentence_iterator=iter([line for text in texts for line in text.splitlines() if line]),
            model_writer=model,
            model_type="unigram",
            vocab_size=400,
            character_coverage=0.999,
            num_threads=4,
            minloglevel=2,
        )
        found.append(model.getvalue())
    return found[0], found[1]


@cache
def pieces() -> tuple[str, ...]:
    """Those of both models, some left out, and some that no model has: the list is not made from the models."""
    from sentencepiece import SentencePieceProcessor

    processors = [SentencePieceProcessor(model_proto=model) for model in models()]
    names = {processor.id_to_piece(i): None for processor in processors for i in range(3, processor.vocab_size())}
    kept = [name for place, name in enumerate(sorted(names)) if place % 17]
    return ("</s>", "<unk>", *kept, "漢字", ">>de<<", ">>fr<<", "<pad>")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "marian"
    path.mkdir()
    for name, model in zip(FILES, models(), strict=False):
        (path / name).write_bytes(model)
    (path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(pieces())}), encoding="utf-8")
    (path / "config.json").write_text(json.dumps({"model_type": "marian"}), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps({"source_lang": "en", "target_lang": "de"}))
    return path


def theirs(path: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a package of Moses' rules is missed, which are not used
        found = transformers.AutoTokenizer.from_pretrained(path)
    assert type(found) is transformers.MarianTokenizer
    return found


def same_as(ours: Tokenizer, path: Path, texts: list[str]) -> None:
    """Ids of sources and targets, texts of the ids, and the special tokens."""
    other = theirs(path)
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    sources, targets = ours.encode_batch(texts), [encode_target(text, ours) for text in texts]
    for text, source, target in zip(texts, sources, targets, strict=True):
        assert source == other(text, **plain).input_ids, text
        assert target == other(text_target=text, **plain).input_ids, text
        assert ours.decode(source) == other.decode(source, skip_special_tokens=True), text
        assert ours.decode(target) == other.decode(target, skip_special_tokens=True, use_source_tokenizer=False), text
    assert sum(a != b for a, b in zip(sources, targets, strict=True)) > len(texts) / 4
    assert (ours.eos_id, ours.pad_id, ours.vocab_size) == (other.eos_token_id, other.pad_token_id, len(other))
    assert ours.bos_id is other.bos_token_id is None
    assert other("Hello").input_ids == [*ours.encode("Hello"), ours.eos_id]


def test_ids_and_texts_equal_transformers_and_so_do_those_of_a_saved_copy(folder: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(folder)
    texts = [*CODES, *many_strings()]
    assert len(texts) >= 2000
    same_as(ours, folder, texts)
    copy = tmp_path / "copy"
    ours.save(copy)
    shutil.copy(folder / "config.json", copy)
    assert {name: (copy / name).read_bytes() for name in FILES[:2]} == dict(zip(FILES, models(), strict=False))
    again = load_tokenizer(copy)
    assert again.fingerprint == ours.fingerprint
    same_as(again, copy, texts[::10])
    assert theirs(copy).source_lang == "en"


def test_names_of_special_tokens_are_text_but_where_a_template_writes_them(folder: Path) -> None:
    ours, text = load_tokenizer(folder), "a</s>b <pad>"
    assert not {ours.eos_id, ours.pad_id} & set(ours.encode(text))
    ids, _ = ours.encode_spans(text, ())
    assert ids == theirs(folder)(text, add_special_tokens=False).input_ids
    assert ours.encode_spans(text, [(0, len(text))])[0] == ours.encode(text)


def test_no_text_has_the_end_token_even_where_a_piece_is_named_so(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "\u2581the"}))
    ours = load_tokenizer(folder)
    assert ours.eos_id == pieces().index("\u2581the")
    assert ours.eos_id not in ours.encode("the way of the world")


def test_spans_lie_in_the_text_and_never_go_back(folder: Path) -> None:
    ours = load_tokenizer(folder)
    for text in (*CODES, *many_strings()):
        ids, spans = ours.encode_spans(text)
        assert ids == ours.encode(text)
        assert spans == sorted(spans)
        assert all(0 <= start <= stop <= len(text) for start, stop in spans)
    assert ours.encode_spans(">>de<< a")[1][0] == (0, 6)


def test_what_objectives_know_of_it(folder: Path) -> None:
    ids = load_tokenizer(folder).token_ids()
    known = {name: i for i, name in enumerate(pieces())}
    assert {name for name, i in known.items() if ids.special[i]} == {"</s>", "<unk>", "<pad>"}
    assert ids.word_starts[next(i for name, i in known.items() if name.startswith("\u2581"))]
    assert load_tokenizer(folder).decode([0, known[">>de<<"], ids.vocab_size + 5]) == ">>de<<"


def test_a_chat_template_can_be_given(folder: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(folder)
    assert isinstance(ours, MarianTokenizer)
    ours.with_chat_template(PLAIN).save(tmp_path / "chat")
    again = load_tokenizer(tmp_path / "chat")
    text = again.render_chat([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert text.replace("\n", " ") == "User: Hi Assistant:"


def test_new_tokens_are_refused_and_none_are_let_through(folder: Path) -> None:
    ours = load_tokenizer(folder)
    assert add_tokens(ours, []) is ours
    with pytest.raises(ConfigError, match="takes no new tokens"):
        add_tokens(ours, ["<new>"])


def test_a_task_trains_on_what_the_target_model_makes_of_an_answer(folder: Path) -> None:
    """One that translates, and a conversation."""
    ours, text = load_tokenizer(folder), "tHE WITH STATEMENT"
    assert isinstance(ours, MarianTokenizer)
    asked = {
        "translation": {"source": "The with statement", "target": text},
        "chat": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]},
    }
    for name, fields in asked.items():
        job = build(checked(f"task={name}", f"init={folder}", command="finetune").task)
        (row,) = job.rows(ask(job, **fields), ours.with_chat_template(PLAIN), "encoder_decoder", 64, cut=False)
        target = row.answer.target.tolist()
        assert target == [*encode_target(text, ours), ours.eos_id], name
        assert target != [*ours.encode(text), ours.eos_id]
        assert ours.decode(target) == text


def test_other_tokenizers_write_targets_as_they_read_sources() -> None:
    tokenizer = trained("bpe")
    assert encode_target("some text", tokenizer) == tokenizer.encode("some text")


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        load_tokenizer(folder)


HOSTILE = {
    "no JSON": b"{",
    "no object": b"[1, 2]",
    "nothing": b"{}",
    "text for an id": b'{"</s>": "0", "<unk>": 1, "<pad>": 2}',
    "true for an id": b'{"</s>": true, "<unk>": 2, "<pad>": 3}',
    "an id twice": b'{"</s>": 0, "<unk>": 1, "<pad>": 1}',
    "below 0": b'{"</s>": -1, "<unk>": 1, "<pad>": 2}',
    "a terabyte of rows": b'{"</s>": 0, "<unk>": 1, "<pad>": 1000000000000}',
    "no end token": b'{"<unk>": 1, "<pad>": 2}',
    "no UTF-8": b'{"\xff": 0}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_list_of_ids_is_refused(kind: str, folder: Path) -> None:
    (folder / "vocab.json").write_bytes(HOSTILE[kind])
    with pytest.raises(DataError) as caught:
        load_tokenizer(folder)
    assert str(folder) in caught.value.where


@pytest.mark.parametrize("name", FILES[:2])
@pytest.mark.parametrize("damage", [b"", b"no model", b"\x00" * 99])
def test_a_damaged_model_is_refused(damage: bytes, name: str, folder: Path) -> None:
    (folder / name).write_bytes(damage)
    with pytest.raises(DataError, match="no SentencePiece model") as caught:
        load_tokenizer(folder)
    assert name in caught.value.where


def test_a_huge_file_and_a_link_to_elsewhere_are_refused(folder: Path, tmp_path: Path) -> None:
    with (folder / "source.spm").open("r+b") as file:
        file.truncate(60_000_000)
    with pytest.raises(CheckpointError, match="bytes"):
        load_tokenizer(folder)
    (tmp_path / "secret").write_bytes(models()[0])
    (folder / "source.spm").unlink()
    (folder / "source.spm").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leaves the folder"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"separate_vocabs": True}, "for each side"),
        ({"added_tokens_decoder": {"9000": {"content": "<new>", "special": True}}}, "'<new>' was added"),
    ],
)
def test_rules_that_are_not_read_are_refused(settings: dict[str, Any], message: str, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=message):
        load_tokenizer(folder)
