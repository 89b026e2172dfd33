"""``llmkit export`` of models with a task head: they pass, and rows, labels and weights that are wrong are found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmkit.commands import head_check
from llmkit.commands.exported import Subject
from llmkit.errors import CheckpointError, ConfigError
from llmkit.models.head_config import HeadConfig
from llmkit.models.hf import load_model
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.save import save_tokenizer
from tests.unit.commands.exporting import export, export_spoilt, write_tuned
from tests.unit.commands.test_export import change_json, change_weights, left_over

pytest.importorskip("transformers")

CLASSES = HeadConfig("class", ("negative", "neutral", "positive"))
SPANS = HeadConfig("span")
CASES = [
    ("bert", "wordpiece", CLASSES),
    ("bert", "wordpiece", SPANS),
    ("modern_bert", "bpe", CLASSES),
    ("modern_bert", "unigram", SPANS),
    ("llama", "bpe", CLASSES),
    ("gpt2", "unigram", CLASSES),
    ("gpt2", "wordpiece", CLASSES),
]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tuned(tmp_path_factory.mktemp("classifier"), "bert", "wordpiece", CLASSES)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tuned(tmp_path_factory.mktemp("reader"), "bert", "wordpiece", SPANS)


@pytest.mark.parametrize(("option", "kind", "head"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_are_checked_by_transformers(
    option: str, kind: str, head: HeadConfig, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_tuned(tmp_path / "source", option, kind, head, max_seq_len=128)
    assert export(source, tmp_path / "out", dtype=dtype) == 0
    shown = capsys.readouterr().out
    for line in (
        "rows of the task head       6 texts equal",
        "ForSequence" if head is CLASSES else "ForQuestion",
    ):
        assert line in shown
    assert "logits, against llmkit" in shown
    again = load_model(tmp_path / "out").task_head
    assert (again.config.kind, again.config.labels) == (head.kind, head.labels)


@pytest.mark.parametrize("option", ["lstm", "t5"])
def test_heads_of_our_own_are_announced(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = write_tuned(tmp_path / "source", option, "bpe", CLASSES)
    assert export(source, tmp_path / "out") == 0
    assert caplog.text.count("opens in llmkit only") == 1
    assert "llmkit only: no " in capsys.readouterr().out
    before, after = load_model(source).state_dict(), load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("option", ["bert", "llama", "t5"])
def test_parameters_that_are_written(option: str, tmp_path: Path) -> None:
    """The card counts the head, and of the language model's output layers those in the files."""
    kind = "wordpiece" if option == "bert" else "bpe"
    source = write_tuned(tmp_path, option, kind, CLASSES)
    subject = Subject.of(load_model(source), load_tokenizer(source))
    assert subject.n_params == sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())


def test_a_window_too_small_for_any_text(tmp_path: Path) -> None:
    source = write_tuned(tmp_path / "source", "bert", "wordpiece", SPANS, max_seq_len=6)
    with pytest.raises(ConfigError, match="no text fits into 6 tokens"):
        export(source, tmp_path / "out")
    assert left_over(tmp_path / "out") == []


# -- tokenizers -------------------------------------------------------------------------------------------------------


def test_the_tokenizer_of_others_keeps_its_rules(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that differ are told, and the logits of the rows of training compared."""
    source = write_tuned(tmp_path / "source", "bert", "wordpiece", SPANS)
    change_json("tokenizer_config.json", lambda c: c.pop("llmkit_format"))(source)
    change_json("tokenizer.json", lambda c: c.update(post_processor=None))(source)
    assert export(source, tmp_path / "out") == 0
    told = "the tokenizer's own rules put other special tokens around a text than training did"
    assert told in caplog.text
    shown = capsys.readouterr().out
    assert "rows of the task head       0 of " in shown
    assert "logits, against llmkit" in shown


# -- faults -----------------------------------------------------------------------------------------------------------


def for_a_decoder(folder: Path) -> None:
    save_tokenizer(load_tokenizer(folder), folder, "decoder")


def flip(name: str) -> Callable[[Path], None]:
    return change_weights(lambda tensors: tensors.update({name: tensors[name].flip(0).contiguous()}))


def other_labels(content: dict[str, Any]) -> None:
    content["id2label"] = {"0": "positive", "1": "neutral", "2": "negative"}


FAULTS = {
    "labels in another order": ("classifier", change_json("config.json", other_labels), "reads the labels as"),
    "outputs in another order": ("classifier", flip("classifier.weight"), "its logits differ from the source's by"),
    "a pooler that is not used": ("classifier", flip("bert.pooler.dense.weight"), "its logits differ"),
    "rows without their end": ("classifier", for_a_decoder, "transformers makes the row"),
    "pairs without their end": ("reader", for_a_decoder, "transformers makes the row"),
    "start and end swapped": ("reader", flip("qa_outputs.weight"), "its logits differ from the source's by"),
    "segments swapped": ("reader", flip("bert.embeddings.token_type_embeddings.weight"), "its logits differ"),
    "no head in the files": (
        "classifier",
        change_weights(lambda tensors: tensors.pop("classifier.weight")),
        "missing tensors, classifier.weight",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_nothing_is_published(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    fixture, spoil, message = FAULTS[name]
    caught = export_spoilt(request.getfixturevalue(fixture), tmp_path / "out", spoil, monkeypatch, match=message)
    assert "nothing was published" in caught.fix
    assert left_over(tmp_path / "out") == []


def test_a_computation_that_fails_there(classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_check, "_encoding", lambda *args: ({"input_ids": torch.tensor([[10**6]])}, True))
    with pytest.raises(CheckpointError, match="transformers cannot compute"):
        export(classifier, tmp_path / "out")
    assert left_over(tmp_path / "out") == []
