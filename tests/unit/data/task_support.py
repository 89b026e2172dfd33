"""Tasks and a tokenizer small enough to know every count by heart."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from llmkit.data.task_records import BadRecord, Record, read_records
from llmkit.errors import BadExample
from llmkit.interfaces import Answer, Row, TokenIds
from llmkit.settings import TaskDataConfig
from llmkit.task_interface import Question
from tests.unit.data.helpers import ByteTokenizer


@dataclass(frozen=True)
class _Bytes(ByteTokenizer):
    """An id per byte, after ``<s>`` and ``</s>``."""

    def token_ids(self) -> TokenIds:
        special = np.arange(self.vocab_size) < 2
        return TokenIds(self.vocab_size, self.bos_id, self.eos_id, self.pad_id, None, (), None, special, special)


BYTES: Any = _Bytes()  # the tasks here need only a part of a tokenizer


class Base:
    """What the tasks here share."""

    name = "fake"
    optional: tuple[str, ...] = ()
    best_metric = "loss"
    roles: ClassVar[Mapping[str, tuple[str, ...]]]

    def with_labels(self, labels: Sequence[str]) -> Any:
        return self

    def answers(self, kind: str) -> str:
        return "text"

    def prompt(self, question: Question, tokenizer: Any, kind: str, max_len: int) -> list[int]:
        return [0]

    def metrics(self, questions: Any, predictions: Any) -> dict[str, float]:
        return {}


class Label(Base):
    """``no`` or ``yes`` for a text."""

    roles: ClassVar = {"text": ("text", "review"), "label": ("label", "stars")}

    def read(self, fields: Mapping[str, Any], *, answered: bool) -> list[dict[str, Any]]:
        if "text" not in fields:
            raise BadExample("missing text")
        return [{"text": fields["text"], **({"label": str(fields["label"])} if answered else {})}]

    def rows(self, question: Question, tokenizer: Any, kind: str, max_len: int, *, cut: bool) -> list[Row]:
        if question.fields["label"] not in ("no", "yes"):
            raise BadExample("unknown label")
        ids = tokenizer.encode(question.fields["text"])
        label = ("no", "yes").index(question.fields["label"])
        if len(ids) + 2 > max_len and not cut:
            raise BadExample("too long")
        return [Row(np.array([0, *ids[: max_len - 2], 1]), (), answer=Answer(label=label))]


class Copy(Base):
    """A target for a source, generated."""

    roles: ClassVar = {"source": ("source", "en"), "target": ("target", "de")}

    def __init__(self, *, end: bool = True) -> None:
        self.end = end

    def read(self, fields: Mapping[str, Any], *, answered: bool) -> list[dict[str, Any]]:
        if answered and not fields["target"].strip():
            raise BadExample("empty target")
        return [{"source": fields["source"], **({"target": fields["target"]} if answered else {})}]

    def rows(self, question: Question, tokenizer: Any, kind: str, max_len: int, *, cut: bool) -> list[Row]:
        source, target = tokenizer.encode(question.fields["source"]), tokenizer.encode(question.fields["target"])
        target += [1] * self.end
        if kind == "encoder_decoder":
            n_cut = max(0, len(source) + 1 - max_len)
            found = Row(np.array([*source[: max_len - 1], 1]), (), answer=Answer(target=np.array(target), n_cut=n_cut))
        else:
            n_cut = max(0, len(source) + len(target) + 1 - max_len)
            ids = np.array([0, *source[: len(source) - n_cut], *target])
            trained = np.arange(ids.size) >= ids.size - len(target)
            found = Row(ids, (), answer=Answer(trained=trained, n_cut=n_cut))
        if (n_cut and not cut) or n_cut >= len(source) or len(target) > max_len:
            raise BadExample("too long")
        return [found]


class Spans(Base):
    """Questions on paragraphs; an answer must stand in its paragraph."""

    roles: ClassVar = {"paragraphs": ("paragraphs",)}

    def read(self, fields: Mapping[str, Any], *, answered: bool) -> list[Any]:
        found: list[Any] = []
        for paragraph in fields["paragraphs"]:
            for qa in paragraph["qas"]:
                example = {"question": qa["question"], "context": paragraph["context"]}
                start = paragraph["context"].find(qa["answer"])
                if answered and start < 0:
                    found.append(BadExample("answer not in context"))
                else:
                    found.append(example | ({"answer": qa["answer"], "start": start} if answered else {}))
        return found

    def rows(self, question: Question, tokenizer: Any, kind: str, max_len: int, *, cut: bool) -> list[Row]:
        """Windows of ``max_len`` ids that overlap by half."""
        ask = [0, *tokenizer.encode(question.fields["question"]), 1]
        text = tokenizer.encode(question.fields["context"])
        first, last = question.fields["start"], question.fields["start"] + len(question.fields["answer"]) - 1
        room = max_len - len(ask)
        rows = []
        for begin in range(0, max(1, len(text) - room // 2), max(1, room // 2)):
            part = text[begin : begin + room]
            inside = begin <= first and last < begin + len(part)
            shift = len(ask) - begin
            span = (first + shift, last + shift) if inside else (0, 0)
            rows.append(Row(np.array(ask + part), (), answer=Answer(span=span, second=len(ask))))
        return rows


class Chat(Base):
    """Turns; a turn is trained with its end."""

    roles: ClassVar = {"messages": ("messages",)}

    def read(self, fields: Mapping[str, Any], *, answered: bool) -> list[dict[str, Any]]:
        messages = fields["messages"]
        if not isinstance(messages, list) or [m.get("role") for m in messages] != ["user", "assistant"]:
            raise BadExample("wrong roles")
        return [{"messages": messages if answered else messages[:1]}]


def settings(path: Any, **changes: Any) -> TaskDataConfig:
    values: dict[str, Any] = {
        "path": [str(one) for one in path] if isinstance(path, list) else path and str(path),
        "target_path": None,
        "val_path": None,
        "val_target_path": None,
        "val_fraction": 0.0,
        "columns": {},
        "seq_len": None,
        "long_rows": "error",
        "max_bad_fraction": 0.0,
        "max_rows": None,
        "max_answers": None,
    }
    return TaskDataConfig(**values | {k: str(v) if isinstance(v, Path) else v for k, v in changes.items()})


def read(path: Any, target: Any = None, **changes: Any) -> list[Record | BadRecord]:
    data = settings(path, target_path=target, **changes)
    assert data.path is not None
    return list(read_records(data.path, data.target_path, data))


def jsonl(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(rows: Iterable[Mapping[str, Any]]) -> list[Question]:
    return [Question(fields, f"file:{number + 1}", number) for number, fields in enumerate(rows)]
