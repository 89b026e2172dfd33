"""From token shards to the rows an objective asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit.data.token_shards import TokenShards, WindowDataset

if TYPE_CHECKING:
    from llmkit.interfaces import Objective, SequenceDataset


FEW = 0.5  # of the rows of pairs: when fewer have a question, most of the steps do not train it


def dataset_for(objective: Objective, shards: TokenShards, seq_len: int, split: str = "") -> SequenceDataset:
    """Windows of running text, or pairs of sentences, as ``objective.reads`` says. ``split`` is its name in errors."""
    if objective.reads == "windows":
        return WindowDataset(shards, *objective.window(seq_len))
    from llmkit.data.pairs import SentencePairDataset

    return SentencePairDataset(shards, seq_len, order=objective.reads == "ordered_pairs", split=split)


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


def few_questions(dataset: SequenceDataset) -> str:
    """What to do where less than half of the rows have a question to answer; empty elsewhere."""
    from llmkit.data.pairs import SentencePairDataset

    if not isinstance(dataset, SentencePairDataset):
        return ""
    counts = dataset.counts()
    if counts["n_rows_with_pair"] >= FEW * counts["n_rows"]:
        return ""
    what = f"only {counts['n_rows_with_pair']:,} of {counts['n_rows']:,} rows have a question"
    if counts["n_without_match"] > counts["n_without_split"]:
        return f"{what}, because few segments have a match in another document: give more documents"
    return f"{what}, because few sentences fit in {dataset.seq_len} tokens: raise data.seq_len to {2 * dataset.seq_len}"


def needs_sentences(objective: Objective) -> bool:
    """Whether preparation must note where sentences begin."""
    return objective.reads != "windows"
