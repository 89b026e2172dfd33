"""What becomes of the text when rows are made of it: counts for the log, and warnings with the way to mend it."""

from __future__ import annotations

import logging

from llmkit.data.datasets import counts_of, few_questions
from llmkit.data.short_pieces import MOST_TOKENS, pieces_of
from llmkit.data.token_shards import WindowDataset
from llmkit.interfaces import Objective, SequenceDataset
from llmkit.objectives.prefix_lm import PrefixLM
from llmkit.objectives.span_corruption import SpanCorruption

log = logging.getLogger("llmkit.training")


def say_counts(objective: Objective, dataset: SequenceDataset, split: str) -> None:
    """Log what the rows of a split (``training``, ``validation``) hold, and what of its text has no use in them."""
    if counts := counts_of(dataset):
        log.info("%s pairs: %s", split, counts)
    if unused := without_target(objective, dataset):
        log.info("%s text: %s", split, unused)
    if few := few_questions(dataset):
        log.warning("%s pairs: %s", split, few)


def without_target(objective: Objective, dataset: SequenceDataset) -> str:
    """How many pieces of text are too short for the objective; empty where none is."""
    if not isinstance(objective, SpanCorruption | PrefixLM) or not isinstance(dataset, WindowDataset):
        return ""
    n_short = n_pieces = 0
    for pieces in pieces_of(dataset, objective.n_parts):
        n_short += int(objective.too_short(pieces.n_ids_K, pieces.n_text_K).sum())
        n_pieces += pieces.n_ids_K.size
    where = f" (of the first {MOST_TOKENS:,} tokens)" if dataset.n_tokens > MOST_TOKENS else ""
    what = f"{n_short:,} of {n_pieces:,} documents, or parts of one in a row{where}, {objective.fate_of_short()}"
    return what if n_short else ""
