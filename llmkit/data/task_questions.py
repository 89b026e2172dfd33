"""From files to a task's questions: columns matched, bad records counted, training and validation kept apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from llmkit.data.readers.base import BUILTIN_PREFIX
from llmkit.data.split import belongs_to_val, choose_rule, n_shared, repeated
from llmkit.data.task_records import BadRecord, Faults, Record, column_value, columns_in, match_columns, read_records
from llmkit.errors import BadExample, ConfigError, DataError
from llmkit.task_interface import Question

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmkit.settings import TaskDataConfig
    from llmkit.task_interface import Task


@dataclass
class FilesReport:
    """What the files of one setting (``data.path`` or ``data.val_path``) held."""

    path: str
    columns: dict[str, str]  # role -> column
    n_records: int = 0
    n_questions: int = 0
    bad: Faults = field(default_factory=Faults)

    @property
    def bad_fraction(self) -> float:
        return self.bad.total / max(1, self.bad.total + self.n_questions)


@dataclass
class QuestionsReport:
    """What was read: counts for the user."""

    files: list[FilesReport]
    is_split: bool  # into training and validation
    n_train: int = 0
    n_val: int = 0
    n_repeated: int = 0  # training questions that an earlier one asks too
    n_shared: int = 0  # validation questions that training asks too

    def lines(self) -> list[str]:
        """The report in a few lines of text."""
        found = [line for files in self.files for line in _files_lines(files)]
        if self.is_split:
            found.append(f"questions: {self.n_train:,} for training, {self.n_val:,} for validation")
        if self.n_repeated:
            found.append(f"{self.n_repeated:,} training questions are asked more than once")
        if self.n_shared:
            found.append(f"warning: {self.n_shared:,} validation questions also stand in the training data")
        return found


def _files_lines(files: FilesReport) -> Iterator[str]:
    columns = ", ".join(role if role == column else f"{role}={column}" for role, column in files.columns.items())
    yield f"{files.path}: {files.n_questions:,} questions; columns: {columns}"
    for line in files.bad.lines():
        yield f"{files.path}: left out: {line}"


@dataclass(frozen=True)
class Questions:
    """A task's questions. ``columns`` are those of ``data.path``: role -> column."""

    train: list[Question]
    val: list[Question]
    columns: Mapping[str, str]
    report: QuestionsReport

    def labels(self) -> list[str]:
        """The distinct labels in the training questions, numbers by size; empty in tasks without labels."""
        found = {str(question.fields["label"]) for question in self.train if question.fields.get("label") is not None}
        return sorted(found, key=lambda label: (0, int(label), label) if label.isdecimal() else (1, 0, label))


def load_questions(task: Task, data: TaskDataConfig, *, split: bool = True, answered: bool = True) -> Questions:
    """The questions behind ``data``; without ``data.path`` those of the task's demo set.

    ``split``: validation questions come from ``data.val_path`` or, where that is null, are chosen by a hash of the
    record's question, so that equal ones are on the same side. Without ``split`` all of ``data.path`` is in ``train``.
    ``answered=False``: rows to predict; answers may be missing. ``data.max_rows`` is the most that is taken of
    ``data.path``, and of ``data.val_path``. Raises DataError when more than ``data.max_bad_fraction`` cannot be used.
    """
    path = f"{BUILTIN_PREFIX}{task.name}" if data.path is None else data.path
    main = _Loaded(task, data, path, data.target_path, "data.path", answered=answered)
    held_out = None
    if split and data.val_path is not None:
        held_out = _Loaded(task, data, data.val_path, data.val_target_path, "data.val_path", answered=answered)
    elif split and data.val_target_path is not None:
        fix = "set data.val_path to the other side of it, or leave both out"
        raise ConfigError("data.val_target_path is set without data.val_path", where="data.val_target_path", fix=fix)
    is_val = np.zeros(len(main.questions), bool)
    if split and held_out is None:
        is_val = _choose_val(main, data.val_fraction)
    train = [question for question, held in zip(main.questions, is_val, strict=True) if not held]
    val = [question for question, held in zip(main.questions, is_val, strict=True) if held]
    train_keys, val_keys = main.keys[~is_val], main.keys[is_val]
    report = QuestionsReport([main.report], split)
    if held_out is not None:
        val, val_keys = held_out.questions, held_out.keys
        report.files.append(held_out.report)
    report.n_train, report.n_val = len(train), len(val)
    report.n_repeated = int(repeated(train_keys).sum())
    report.n_shared = n_shared(val_keys, train_keys)
    return Questions(train, val, main.report.columns, report)


class _Loaded:
    """The questions of one setting. ``keys``: a hash of what each asks; ``record_keys``: the same of its record."""

    def __init__(
        self,
        task: Task,
        data: TaskDataConfig,
        path: str | list[str],
        target_path: str | None,
        setting: str,
        *,
        answered: bool,
    ) -> None:
        self.task, self.answered = task, answered
        self.shown = path if isinstance(path, str) else ", ".join(path)
        self.questions: list[Question] = []
        self._keys: list[int] = []
        self._record_keys: list[int] = []
        records = self._read(path, target_path, data, setting)
        good = [record for record in records if isinstance(record, Record)]
        where = good[0].where.rpartition(":")[0] if good else self.shown
        optional = task.optional if answered else tuple(task.roles)
        columns = match_columns(task.roles, optional, columns_in(good), data.columns, where) if good else {}
        self.report = FilesReport(self.shown, columns, len(records))
        number = 0
        for record in records:
            number = self._add(record, number, data.max_rows)
        self.report.n_questions = len(self.questions)
        _check(self.report, data, setting, columns_in(good[:100]))
        self.keys = np.array(self._keys, np.uint64)
        self.record_keys = np.array(self._record_keys, np.uint64)

    def _read(
        self, path: str | list[str], target_path: str | None, data: TaskDataConfig, setting: str
    ) -> list[Record | BadRecord]:
        try:
            return list(islice(read_records(path, target_path, data), data.max_rows))
        except (DataError, ConfigError) as error:
            if setting != "data.path":
                error.where = error.where.replace("data.path", setting)
                error.where = error.where.replace("data.target_path", "data.val_target_path")
            raise

    def _add(self, record: Record | BadRecord, number: int, limit: int | None) -> int:
        """Adds a record's questions; the number of the next one. A bad record takes a number too."""
        if limit is not None and len(self.questions) >= limit:
            return number
        if isinstance(record, BadRecord):
            self.report.bad.add(record.reason, record.where)
            return number + 1
        fields = {role: column_value(record.fields, column) for role, column in self.report.columns.items()}
        fields = {role: value for role, value in fields.items() if value is not None}
        try:
            self._check_roles(fields)
            examples = self.task.read(fields, answered=self.answered)
        except BadExample as bad:
            self.report.bad.add(str(bad), record.where)
            return number + 1
        keys = self._keys_of(fields, examples)
        whole = keys[0] if len(keys) == 1 else _hash(*keys)
        for place, (example, key) in enumerate(zip(examples, keys, strict=True), 1):
            if limit is not None and len(self.questions) >= limit:
                break
            where = record.where if len(examples) == 1 else f"{record.where}, example {place}"
            if isinstance(example, BadExample):
                self.report.bad.add(str(example), where)
                continue
            self.questions.append(Question(example, where, number + place - 1))
            self._keys.append(key)
            self._record_keys.append(whole)
        return number + len(examples)

    def _check_roles(self, fields: Mapping[str, Any]) -> None:
        """A record without a column that others have."""
        for role, column in self.report.columns.items():
            if role not in fields and role not in self.task.optional and self.answered:
                raise BadExample(f"missing {column}" if column == role else f"missing {column} ({role})")

    def _keys_of(self, fields: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> list[int]:
        """A hash of each example without its answer, where the task can tell, so that one question with two answers
        does not stand on both sides."""
        try:
            asked = self.task.read(fields, answered=False)
        except BadExample:
            asked = examples
        return [_hash(example) for example in (asked if len(asked) == len(examples) else examples)]


_canonical = json.JSONEncoder(sort_keys=True, default=str).encode


def _hash(*values: Any) -> int:
    """64 bits of BLAKE2b of values as JSON."""
    text = _canonical(values)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _choose_val(loaded: _Loaded, fraction: float) -> NDArray[np.bool_]:
    """Which questions are for validation. Raises DataError where that would leave none for training."""
    hashes = loaded.record_keys
    n_records = np.unique(hashes).size
    if fraction and n_records < 2:
        what = f"{hashes.size} question(s) of one record cannot be split into training and validation data"
        fix = "set data.val_path to held-out rows, or data.val_fraction=0 to train without"
        raise DataError(what, where="data.val_fraction", fix=fix)
    return belongs_to_val(hashes, choose_rule(hashes, np.ones(hashes.size, np.uint64), fraction, n_records))


def _check(report: FilesReport, data: TaskDataConfig, setting: str, columns: Sequence[str]) -> None:
    """Raises DataError for files without a question, or with too many bad records."""
    if report.n_questions and report.bad_fraction <= data.max_bad_fraction:
        return
    total = report.bad.total + report.n_questions
    what = f"{report.bad.total:,} of {total:,} records of {report.path} cannot be used ({report.bad_fraction:.2%})"
    if not report.n_questions:
        what = f"no record of {report.path} can be used; "
        what += f"there are the columns {', '.join(columns)}" if columns else "there is no record in it"
        is_column = any(reason.startswith("missing") for reason in report.bad.counts) or not report.bad.total
        fix = "give records of this task"
        fix += (
            ", or say which column is which: data.columns.<role>=<column>" if is_column else ": mend those named above"
        )
    else:
        allowed = -(-report.bad_fraction * 1000 // 1) / 1000
        fix = f"mend the file, or leave them out: data.max_bad_fraction={allowed:.3f}"
    raise DataError("\n  ".join([what, *report.bad.lines()]), where=setting, fix=fix)
