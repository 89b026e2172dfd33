"""Whether a task head answers elsewhere as it does here: texts as the rows of training, and the logits of each row.

A row at a time: rows of several lengths would be padded, which files without a padding token do not allow.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkit.commands.exported import TEXTS, Exported, Finding, Reading, Subject, first_line, mismatch
from llmkit.errors import BadExample, ConfigError, LLMKitError
from llmkit.interfaces import Answer, Row
from llmkit.objectives.for_task import objective_for
from llmkit.settings import LossConfig
from llmkit.tasks.encoding import Prompt, as_document
from llmkit.tasks.spans import make_windows
from llmkit.tokenizers.folder import read_json
from llmkit.tokenizers.hf_files import CONFIG_FILE, FORMAT_KEY

QUESTION = "Which of them was it?"
LOADERS = {"class": "AutoModelForSequenceClassification", "span": "AutoModelForQuestionAnswering"}

log = logging.getLogger("llmkit.export")


class Probe(NamedTuple):
    """What a user asks, a text or a question and its text, and the row that training would make of it."""

    texts: tuple[str, ...]
    row: Row


def probes(subject: Subject) -> list[Probe]:
    """The texts that fit into the window. Raises ``ConfigError`` where none does."""
    found = list(_span_probes(subject) if subject.head and subject.head.kind == "span" else _class_probes(subject))
    if not found:
        what = f"no text fits into {subject.config.max_seq_len} tokens, so that the task head cannot be compared"
        raise ConfigError(what, where="init", fix="use a model with a larger window")
    return found


def _class_probes(subject: Subject) -> Iterator[Probe]:
    for text in filter(None, (text.strip() for text in TEXTS)):
        try:
            ids, _ = as_document(Prompt(text, 0, len(text)), subject.tokenizer, subject.config.max_seq_len, cut=False)
        except BadExample:
            continue
        yield Probe((text,), Row(ids, (), answer=Answer(label=0)))


def _span_probes(subject: Subject) -> Iterator[Probe]:
    for context in TEXTS:
        try:
            windows = make_windows(QUESTION, context, subject.tokenizer, subject.config.max_seq_len, 0)
        except BadExample:
            continue
        if len(windows) == 1:
            yield Probe((QUESTION, context), windows[0].row(None))


@torch.no_grad()
def head_logits(model: Any, subject: Subject) -> list[Tensor]:
    """QC in fp32 of every probe: one choice of C classes, or two of the row's C places."""
    objective: Any = objective_for(model.task_head.config.kind, model.config.kind, LossConfig(0.0, 0.0, None))
    ids = subject.tokenizer.token_ids()
    model.eval()
    found = []
    for probe in probes(subject):
        batch = objective.collate([probe.row], seq_len=len(probe.row.ids), ids=ids)
        found.append(objective.choices(model, batch).logits_NQC[0].float())
    return found


# -- transformers -----------------------------------------------------------------------------------------------------


def read_head(exported: Exported, model: Any, tokenizer: Any, library: str) -> Reading:
    """The same by the library that has opened the files. Raises ``CheckpointError`` for other rows or other labels."""
    subject, n_equal, found = exported.subject, 0, []
    _check_labels(exported, model)
    asked = probes(subject)
    for probe in asked:
        encoding, is_equal = _encoding(exported, tokenizer, probe)
        n_equal += is_equal
        inputs = encoding if is_equal else _own_inputs(model, probe)
        try:
            with torch.no_grad():
                output = model(**inputs)
        except LLMKitError:  # a stop signal's among them
            raise
        except Exception as error:  # of a library
            raise mismatch(exported, f"transformers cannot compute {probe.texts!s:.60}: {first_line(error)}") from error
        found.append(_logits(output))
    return Reading(library, found, None, [], [_rows_finding(n_equal, len(asked))])


def _check_labels(exported: Exported, model: Any) -> None:
    head = exported.subject.head
    if head is None or head.kind != "class":
        return
    theirs = [model.config.id2label.get(i) for i in range(len(model.config.id2label))]
    if theirs != list(head.labels):
        raise mismatch(exported, f"transformers reads the labels as {theirs!s:.100}, not {list(head.labels)!s:.100}")


def _encoding(exported: Exported, tokenizer: Any, probe: Probe) -> tuple[dict[str, Tensor], bool]:
    """What the library makes of a text by default, and whether it is the row of training.

    It is where llmkit trained the tokenizer. Tokenizers of others keep their own rules.
    """
    encoding: dict[str, Tensor] = dict(tokenizer(*probe.texts, return_tensors="pt"))
    got, row = encoding["input_ids"][0].tolist(), probe.row.ids.tolist()
    if got != row and FORMAT_KEY in read_json(exported.folder / CONFIG_FILE):
        raise mismatch(exported, f"transformers makes the row {got!s:.80} of {probe.texts!s:.40}, not {row!s:.80}")
    return encoding, got == row


def _own_inputs(model: Any, probe: Probe) -> dict[str, Tensor]:
    ids_1T = torch.from_numpy(probe.row.ids)[None]
    second = None if probe.row.answer is None else probe.row.answer.second
    if second is None or getattr(model.config, "type_vocab_size", 0) < 2:
        return {"input_ids": ids_1T}
    return {"input_ids": ids_1T, "token_type_ids": (torch.arange(ids_1T.shape[1]) >= second).long()[None]}


def _logits(output: Any) -> Tensor:
    """QC as above."""
    if "logits" in output:
        logits_1C: Tensor = output.logits
        return logits_1C.float()
    return torch.cat((output.start_logits, output.end_logits)).float()


def _rows_finding(n_equal: int, n: int) -> Finding:
    if n_equal == n:
        return Finding("rows of the task head", f"{n} texts equal")
    what = "the tokenizer's own rules put other special tokens around a text than training did"
    log.warning("transformers makes other rows of %d of %d texts: %s", n - n_equal, n, what)
    return Finding("rows of the task head", f"{n_equal} of {n} texts equal: {what}; logits are of the rows of training")
