"""A task's questions as training rows, kept in memory as flat arrays."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from llmkit.data.task_questions import Questions, load_questions
from llmkit.data.task_records import Faults
from llmkit.errors import BadExample, DataError
from llmkit.interfaces import Answer, Row

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmkit.interfaces import Tokenizer
    from llmkit.task_interface import Question, Task

__all__ = ["EncodeReport", "Questions", "TaskDataset", "encode_rows", "load_questions"]

TOO_LONG, CUT_AWAY = "too long", "answer cut away"
NOTHING_TRAINED = "nothing to predict"
_PERCENTILES = (50, 90, 99)
MANY_DROPPED = 0.05  # of the questions; above it the user is warned


@dataclass
class EncodeReport:
    """What became of the questions. Lengths count the ids of a row, and of its target on their own."""

    n_questions: int = 0  # that were given
    n_kept: int = 0
    n_rows: int = 0  # more than questions where long contexts are cut into windows
    n_tokens: int = 0
    n_trained: int = 0  # ids that are predicted; rows where a class or a span is
    n_truncated: int = 0  # rows of which a part of the question was left out
    n_cut_ids: int = 0  # the ids left out
    longest: int = 0
    longest_target: int = 0
    percentiles: dict[int, int] = field(default_factory=dict)  # of the length of rows
    target_percentiles: dict[int, int] = field(default_factory=dict)
    dropped: Faults = field(default_factory=Faults)  # questions, by reason

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report in a few lines of text."""
        lengths = ", ".join(f"{share} % within {length}" for share, length in self.percentiles.items())
        found = [f"{self.n_rows:,} rows of {self.n_kept:,} questions, {self.n_tokens:,} tokens, "]
        found[0] += f"{self.n_trained:,} predicted; longest {self.longest} ({lengths})"
        if self.longest_target:
            lengths = ", ".join(f"{share} % within {length}" for share, length in self.target_percentiles.items())
            found.append(f"targets: longest {self.longest_target} ({lengths})")
        if self.n_truncated:
            found.append(f"cut to fit: {self.n_truncated:,} rows, {self.n_cut_ids:,} tokens of questions left out")
        share = self.dropped.total / max(1, self.n_questions)
        if share > MANY_DROPPED:
            what = (
                f"warning: {share:.1%} of the questions are left out: data.long_rows=truncate or a larger data.seq_len"
            )
            found.append(f"{what} would keep those that are too long")
        return found + [f"left out: {line}" for line in self.dropped.lines()]


class TaskDataset:
    """Implements ``interfaces.SequenceDataset`` on rows in memory: four bytes an id, one more where it is marked.

    ``questions`` are those that were kept, in the order of the rows; ``question_of`` gives the one behind a row.
    """

    def __init__(self, questions: list[Question], rows: _Rows, report: EncodeReport) -> None:
        self.questions, self.report = questions, report
        self._ids, self._starts = rows.ids.finished()
        self._targets, self._target_starts = rows.targets.finished()
        self._trained = np.frombuffer(rows.trained, np.bool_)
        self._facts = np.frombuffer(rows.facts, np.int64).reshape(-1, len(_FACTS))
        self.n_bytes = sum(_text_bytes(question.fields) for question in questions)
        self.key = self._key()

    @property
    def n_sequences(self) -> int:
        return self._starts.size - 1

    @property
    def n_tokens(self) -> int:
        return int(self._ids.size + self._targets.size)

    def question_of(self, row: int) -> int:
        """The place in ``questions`` of the question behind a row."""
        return int(self._facts[row, 0])

    def row(self, index: int, seed: tuple[int, ...], position: int | None) -> Row:
        """Row ``index``; nothing about it is random."""
        part = slice(self._starts[index], self._starts[index + 1])
        _, label, first, last, second, n_cut, flags = (int(fact) for fact in self._facts[index])
        target = self._targets[self._target_starts[index] : self._target_starts[index + 1]].astype(np.int64)
        answer = Answer(
            trained=self._trained[part].copy() if flags & _TRAINED else None,
            target=target if flags & _TARGET else None,
            label=label if flags & _LABEL else None,
            span=(first, last) if flags & _SPAN else None,
            second=second if flags & _SECOND else None,
            n_cut=n_cut,
        )
        return Row(self._ids[part].astype(np.int64), seed, position, answer=answer)

    def lengths(self) -> NDArray[np.int64]:
        """Ids of every row, its target not included."""
        return np.diff(self._starts)

    def target_lengths(self) -> NDArray[np.int64]:
        return np.diff(self._target_starts)

    def side_lengths(self) -> NDArray[np.int64]:
        """Ids of every row and of its target: N x 2."""
        return np.stack([self.lengths(), self.target_lengths()], axis=1)

    def _key(self) -> str:
        """SHA-256 of all rows."""
        digest = hashlib.sha256()
        for values in (self._ids, self._starts, self._targets, self._target_starts, self._trained, self._facts):
            digest.update(f"{values.size}:".encode())
            digest.update(values.tobytes())
        return digest.hexdigest()


_FACTS = ("question", "label", "first", "last", "second", "n_cut", "flags")
_TRAINED, _TARGET, _LABEL, _SPAN, _SECOND = 1, 2, 4, 8, 16


class _Flat:
    """Runs of ids, one after another."""

    def __init__(self) -> None:
        self.ids, self.starts = array("i"), array("q", [0])

    def add(self, ids: NDArray[np.int64] | None) -> None:
        if ids is not None:
            self.ids.frombytes(ids.astype(np.int32).tobytes())
        self.starts.append(len(self.ids))

    def finished(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        return np.frombuffer(self.ids, np.int32), np.frombuffer(self.starts, np.int64)


class _Rows:
    """Rows being collected."""

    def __init__(self) -> None:
        self.ids, self.targets = _Flat(), _Flat()
        self.trained = bytearray()  # as long as the ids
        self.facts = array("q")

    def add(self, row: Row, question: int) -> None:
        answer = row.answer or Answer()
        self.ids.add(row.ids)
        self.targets.add(answer.target)
        trained = np.zeros(row.ids.size, bool) if answer.trained is None else np.asarray(answer.trained, bool)
        if trained.size != row.ids.size:
            raise ValueError(f"{trained.size} marks for {row.ids.size} ids")
        self.trained += trained.tobytes()
        held = (answer.trained, answer.target, answer.label, answer.span, answer.second)
        flags = sum((value is not None) << place for place, value in enumerate(held))
        first, last = answer.span or (0, 0)
        self.facts.extend([question, answer.label or 0, first, last, answer.second or 0, answer.n_cut, flags])


def encode_rows(
    questions: Sequence[Question],
    task: Task,
    tokenizer: Tokenizer,
    kind: str,
    max_len: int,
    long_rows: str,
    *,
    max_bad_fraction: float = 0.0,
) -> TaskDataset:
    """The rows that ``task`` makes of ``questions`` for a model of this ``kind``, at most ``max_len`` ids a side.

    ``long_rows``: what becomes of questions that do not fit: ``error``, ``drop`` or ``truncate``, which drops those
    whose answer alone is too long. ``max_bad_fraction`` of the questions may be left out for other reasons. Raises
    DataError beyond that, when nothing is left, and when a generated answer does not end in a trained end token.
    """
    kept: list[Question] = []
    rows, report, ends = _Rows(), EncodeReport(len(questions)), _EndCheck(tokenizer)
    for question in questions:
        try:
            found = task.rows(question, tokenizer, kind, max_len, cut=long_rows == "truncate")
            report.n_trained += sum(_trained_of(found))
        except BadExample as bad:
            report.dropped.add(str(bad), question.where)
            continue
        for row in found:
            rows.add(row, len(kept))
            ends.look(row, question.where)
            report.n_truncated += row.answer is not None and row.answer.n_cut > 0
            report.n_cut_ids += 0 if row.answer is None else row.answer.n_cut
        kept.append(question)
    ends.check()
    _check_dropped(report, len(kept), max_len, long_rows, max_bad_fraction)
    dataset = TaskDataset(kept, rows, report)
    _measure(report, dataset)
    return dataset


def _trained_of(rows: Sequence[Row]) -> Iterator[int]:
    """Of each row how much is predicted. Raises BadExample where it is nothing."""
    for row in rows:
        answer = row.answer or Answer()
        if answer.label is not None or answer.span is not None:
            n = 1
        else:
            marks = answer.trained if answer.target is None else np.ones(answer.target.size, bool)
            n = 0 if marks is None else int(np.count_nonzero(marks))
        if n == 0:
            raise BadExample(NOTHING_TRAINED)
        yield n
    if not rows:
        raise BadExample(NOTHING_TRAINED)


class _EndCheck:
    """Every generated answer must end in an end token that is predicted, or the model never learns to stop.

    An end token is the tokenizer's, or another special one in the last run of predicted ids: templates have their own.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.token_ids()
        self._eos = ids.eos_id
        self._ends = ids.special.copy()
        self._ends[self._eos] = True
        self._open = Faults()

    def look(self, row: Row, where: str) -> None:
        answer = row.answer or Answer()
        if answer.label is not None or answer.span is not None:
            return
        if answer.target is not None:
            closed = answer.target[-1] == self._eos
        else:
            closed = answer.trained is not None and self._ends[_last_run(row.ids, answer.trained)].any()
        if not closed:
            self._open.add("without an end token", where)

    def check(self) -> None:
        """Raises DataError if a row was open."""
        if self._open.total:
            what = f"the end of the answer is not trained: {self._open.lines()[0]}"
            fix = "use a tokenizer with an end token, or a chat template that ends the assistant's turn with one"
            raise DataError(what, where="tokenizer", fix=fix)


def _last_run(ids: NDArray[np.int64], trained: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The ids of the last run of predicted ones."""
    stop = int(np.flatnonzero(trained)[-1]) + 1
    before = np.flatnonzero(~trained[:stop])
    return ids[before[-1] + 1 if before.size else 0 : stop]


def _check_dropped(report: EncodeReport, n_kept: int, max_len: int, long_rows: str, max_bad_fraction: float) -> None:
    """Raises DataError for what ``encode_rows`` says."""
    n_long = sum(report.dropped.counts.get(reason, 0) for reason in (TOO_LONG, CUT_AWAY))
    n_bad = report.dropped.total - n_long
    summary = [f"of {report.n_questions:,} questions:", *report.dropped.lines()]
    if n_long and long_rows == "error":
        summary[0] = f"{n_long:,} of {report.n_questions:,} questions do not fit in {max_len} tokens"
        fix = "set data.long_rows=truncate or drop, or a larger data.seq_len"
        raise DataError("\n  ".join(summary), where="data.long_rows", fix=fix)
    fraction = n_bad / max(1, report.n_questions)
    if fraction > max_bad_fraction:
        summary[0] = f"{n_bad:,} of {report.n_questions:,} questions cannot be used ({fraction:.2%})"
        fix = f"mend the file, or leave them out: data.max_bad_fraction={-(-fraction * 1000 // 1) / 1000:.3f}"
        raise DataError("\n  ".join(summary), where="data.path", fix=fix)
    if not n_kept:
        summary[0] = f"no row is left {summary[0]}" if report.n_questions else "there is no question"
        raise DataError("\n  ".join(summary), where="data.path", fix="give rows that fit, or a larger data.seq_len")


def _measure(report: EncodeReport, dataset: TaskDataset) -> None:
    lengths, targets = dataset.lengths(), dataset.target_lengths()
    report.n_kept, report.n_rows, report.n_tokens = len(dataset.questions), dataset.n_sequences, dataset.n_tokens
    report.longest, report.longest_target = int(lengths.max()), int(targets.max())
    report.percentiles = _percentiles(lengths)
    report.target_percentiles = _percentiles(targets) if report.longest_target else {}


def _percentiles(lengths: NDArray[np.int64]) -> dict[int, int]:
    """Lengths that this share of the rows, in percent, does not exceed."""
    values = np.percentile(lengths, _PERCENTILES, method="higher")
    return {share: int(value) for share, value in zip(_PERCENTILES, values, strict=True)}


def _text_bytes(value: Any) -> int:
    """UTF-8 bytes of the texts in a value, at any depth."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, dict):
        return sum(map(_text_bytes, value.values()))
    return sum(map(_text_bytes, value)) if isinstance(value, list | tuple) else 0


class SomeRows:
    """``n`` rows of a dataset, evenly spread over it; implements ``interfaces.SequenceDataset``."""

    def __init__(self, dataset: TaskDataset, n: int) -> None:
        self.dataset, self.n_sequences = dataset, min(n, dataset.n_sequences)
        self._places = np.linspace(0, dataset.n_sequences - 1, self.n_sequences).astype(np.int64)

    @property
    def n_tokens(self) -> int:
        lengths = self.dataset.lengths() + self.dataset.target_lengths()
        return int(lengths[self._places].sum())

    @property
    def n_bytes(self) -> int:
        return 0  # bits per byte of a part mean nothing

    def row(self, index: int, seed: tuple[int, ...], position: int | None) -> Row:
        return self.dataset.row(int(self._places[index]), seed, position)
