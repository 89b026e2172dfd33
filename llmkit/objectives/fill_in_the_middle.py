"""Fill in the middle: a decoder learns to write what stands between two texts (Bavarian et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from llmkit.errors import ConfigError
from llmkit.interfaces import Batch, Roles, Row, TokenIds
from llmkit.objectives.causal_lm import CausalLM
from llmkit.objectives.rows import Ids

MIN_TEXT = 2  # tokens of a text that is rearranged


@dataclass(frozen=True)
class FillInTheMiddle(CausalLM):
    """Next-token prediction in which ``fim_rate`` of the documents have their middle moved to the end.

    A document, or the part of it in a row, is cut at two random places. It becomes one of (section 3 of the paper) ::

        prefix first     <fim_prefix> prefix <fim_suffix> suffix <fim_middle> middle eos
        suffix first     <fim_prefix> <fim_suffix> suffix <fim_middle> prefix middle eos

    the second with the probability ``spm_rate``. The begin of text stays in front. The end of text tells the model that
    the middle is complete, so it is added where the row cuts the document off before its end. As in the paper the loss
    is over all parts, not over the middle alone; the added ids are labels like any other.

    Validation is plain next-token prediction, so that its loss and bits per byte compare with those of other models.
    """

    fim_rate: float
    spm_rate: float

    def problems(self) -> list[tuple[str, str]]:
        rates = {"fim_rate": self.fim_rate, "spm_rate": self.spm_rate}
        found = [(name, "must be in [0, 1]") for name, rate in rates.items() if not 0 <= rate <= 1]
        return found + super().problems()

    def window(self, seq_len: int) -> tuple[int, int]:
        """Leaves room for the ids that are added, so that no document is longer than ``seq_len``."""
        return seq_len - 4, 1

    def lacks(self, ids: Roles, seq_len: int) -> tuple[str, str] | None:
        if ids.infill_ids is not None:
            return None
        what = "filling in the middle needs three symbols that this vocabulary does not have"
        return what, "tokenizer.extra_symbols=[<fim_prefix>,<fim_suffix>,<fim_middle>]"

    def collate(self, rows: Sequence[Row], *, seq_len: int, ids: TokenIds) -> Batch:
        """Windows of running text to one batch, as wide as its longest row: with many documents more than ``seq_len``.

        Raises ``ConfigError`` when the vocabulary lacks the three symbols.
        """
        if problem := self.lacks(ids, seq_len):
            what, fix = problem
            raise ConfigError(what, where="tokenizer.extra_symbols", fix=fix)
        arranged = [row if row.position is None else row._replace(ids=self.rearrange(row, ids)) for row in rows]
        longest = max(len(row.ids) for row in arranged) - 1  # the last id of a row is a label only
        return super().collate(arranged, seq_len=longest, ids=ids)

    def rearrange(self, row: Row, ids: TokenIds) -> Ids:
        """The row with some of its documents rearranged. Four numbers are drawn for each, whatever the rates."""
        edges = np.unique(np.concatenate([[0, len(row.ids)], np.flatnonzero(row.ids == ids.eos_id) + 1]))
        pieces = [row.ids[start:stop] for start, stop in pairwise(edges)]
        for number, (chance, order, *cuts) in enumerate(row.rng().random((len(pieces), 4))):
            if chance < self.fim_rate:
                pieces[number] = middle_last(pieces[number], cuts, suffix_first=order < self.spm_rate, ids=ids)
        return np.concatenate(pieces) if pieces else row.ids


def middle_last(piece: Ids, cuts: Sequence[float], *, suffix_first: bool, ids: TokenIds) -> Ids:
    """A document with its middle at the end; one with too little text as it is. ``cuts`` are two shares in [0, 1)."""
    first = int(piece[0] == ids.bos_id)
    text = piece[first : len(piece) - int(piece[-1] == ids.eos_id)]
    if ids.infill_ids is None or len(text) < MIN_TEXT:
        return piece
    low, high = sorted(int(cut * (len(text) + 1)) for cut in cuts)
    prefix, middle, suffix = text[:low], text[low:high], text[high:]
    before, after, between = ([symbol] for symbol in ids.infill_ids)
    parts = [before, after, suffix, between, prefix] if suffix_first else [before, prefix, after, suffix, between]
    return np.concatenate([piece[:first], *parts, middle, [ids.eos_id]])
