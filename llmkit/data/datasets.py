"""From token shards to the rows an objective asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit.data.token_shards import TokenShards, WindowDataset

if TYPE_CHECKING:
    from llmkit.interfaces import Objective, SequenceDataset


def dataset_for(objective: Objective, shards: TokenShards, seq_len: int) -> SequenceDataset:
    """Windows of running text, or pairs of sentences, as ``objective.reads`` says."""
    if objective.reads == "windows":
        return WindowDataset(shards, *objective.window(seq_len))
    from llmkit.data.pairs import SentencePairDataset

    return SentencePairDataset(shards, seq_len, order=objective.reads == "ordered_pairs")


def counts_of(dataset: SequenceDataset) -> str:
    """What was made of the text, where it is more than cutting windows; empty otherwise."""
    from llmkit.data.pairs import SentencePairDataset

    if not isinstance(dataset, SentencePairDataset):
        return ""
    counts = dataset.counts()
    return (
        f"{counts['n_pairs']:,} in {counts['n_rows']:,} rows; without a label {counts['n_without_split']:,} of one "
        f"sentence and {counts['n_without_match']:,} with no match elsewhere; {counts['n_cut_sentences']:,} sentences "
        "go on in the next row"
    )


def needs_sentences(objective: Objective) -> bool:
    """Whether preparation must note where sentences begin."""
    return objective.reads != "windows"
