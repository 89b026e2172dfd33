"""Sentence pairs, with masked language modelling or alone.

Does the second segment follow the first (BERT, Devlin et al. 2019)? Do the two stand in their order (ALBERT, Lan et al.
2020)?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from llmkit.interfaces import IGNORE_INDEX, NO_DOCUMENT, Batch, LossSum, Model, Roles, Row, TokenIds
from llmkit.objectives.masked_lm import MaskedLM
from llmkit.objectives.places import predicted_places, states_at
from llmkit.objectives.rows import Ids, isolation, pad_rows, to_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SentencePairs(MaskedLM):
    """Classifies each pair of a row from the state of its first token: 0 for a right pair, 1 for a wrong one.

    ``next_sentence``: the second segment of a wrong pair is of another document. ``sentence_order``: the segments of a
    wrong pair have changed places. The loss is the masked LM's per hidden token, unless ``masked_lm`` is off, plus
    ``pair_weight`` times the pairs' cross entropy per pair.
    """

    predict: Literal["next_sentence", "sentence_order"]
    masked_lm: bool
    pair_weight: float

    @property
    def reads(self) -> str:  # type: ignore[override]
        return "pairs" if self.predict == "next_sentence" else "ordered_pairs"

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        if not self.pair_weight > 0:
            found.append(("pair_weight", "must be above 0"))
        return found

    @property
    def predicted_share(self) -> float:
        return self.mask_rate if self.masked_lm else 0.0

    def lacks(self, ids: Roles, seq_len: int) -> tuple[str, str] | None:
        return super().lacks(ids, seq_len) if self.masked_lm else None

    def logit_rows(self, n_rows: int, vocab_size: int) -> int:
        return super().logit_rows(n_rows, vocab_size) if self.masked_lm else 0

    def collate(self, rows: Sequence[Row], *, seq_len: int, ids: TokenIds) -> Batch:
        """Rows of at most ``seq_len`` ids to one batch in which every pair is a document of its own.

        ``segment_ids`` are 1 in second segments. Pairs without a label count for the masked LM only.
        """
        inputs, lengths = pad_rows([row.ids for row in rows], seq_len, ids.pad_id)
        corrupted, labels = inputs, np.full_like(inputs, IGNORE_INDEX)
        if self.masked_lm:
            corrupted, labels = self.mask(rows, inputs, np.arange(seq_len) < lengths[:, None], ids)
        positions, documents, segments = _pair_columns(rows, seq_len)
        labelled = [(b * seq_len + pair.start, pair.label) for b, row in enumerate(rows) for pair in row.pairs]
        starts, answers = np.array([one for one in labelled if one[1] != IGNORE_INDEX], np.int64).reshape(-1, 2).T
        return Batch(
            input_ids=to_tensor(corrupted),
            labels=to_tensor(labels),
            position_ids=to_tensor(positions),
            document_ids=isolation(documents),
            n_targets=int((labels != IGNORE_INDEX).sum()),
            segment_ids=to_tensor(segments),
            pair_starts=to_tensor(starts),
            pair_labels=to_tensor(answers),
            n_pairs=starts.size,
        )

    def loss(self, model: Model, batch: Batch) -> LossSum:
        """Sums over hidden tokens and over pairs.

        Without masked LM the token loss is 0, but its head stays in the graph, because gradients that are averaged over
        processes must be there for every parameter.
        """
        from torch.nn import functional as F

        assert batch.pair_starts is not None, "a batch of sentence pairs says where they begin"
        assert batch.pair_labels is not None
        hidden_PD, labels_P, first_ND = _token_and_pair_states(model, batch, batch.pair_starts)
        losses, sums = self.token_loss(model, hidden_PD, labels_P, batch.n_targets)
        logits_N2 = model.pair_logits(first_ND).float()
        pair_nll = F.cross_entropy(logits_N2, batch.pair_labels, reduction="sum")
        n_correct = (logits_N2.detach().argmax(1) == batch.pair_labels).sum()
        sums |= {"pair_nll": pair_nll.detach(), "pair_correct": n_correct}
        return LossSum(losses | {"pair": self.pair_weight * pair_nll}, sums)

    @property
    def sum_names(self) -> tuple[str, ...]:
        return (*super().sum_names, "pair_nll", "pair_correct")

    def metrics(self, sums: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
        """``loss`` as it is trained on, ``mlm_loss`` and ``accuracy`` per hidden token, ``pair_loss`` and
        ``pair_accuracy`` per pair."""
        n_pairs = max(counts["pair"], 1)
        pair_loss = sums["pair_nll"] / n_pairs
        found = {"pair_loss": pair_loss, "pair_accuracy": sums["pair_correct"] / n_pairs}
        if not self.masked_lm:
            return {"loss": self.pair_weight * pair_loss, **found}
        of_tokens = super().metrics(sums, counts)
        mlm_loss = of_tokens.pop("loss")
        return {"loss": mlm_loss + self.pair_weight * pair_loss, "mlm_loss": mlm_loss, **of_tokens, **found}


def _token_and_pair_states(model: Model, batch: Batch, starts_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(states PD and labels P of tokens, states ND of the first token of each pair), from one pass."""
    import torch

    places_P, labels_P = predicted_places(batch), batch.labels.flatten()
    if places_P is None:
        hidden_PD = model.hidden_states(batch).flatten(0, 1)
        return hidden_PD, labels_P, hidden_PD.index_select(0, starts_N)
    states = states_at(model, batch, torch.cat((places_P, starts_N)))
    hidden_PD, first_ND = states[: places_P.shape[0]], states[places_P.shape[0] :]
    return hidden_PD, labels_P.index_select(0, places_P), first_ND


def _pair_columns(rows: Sequence[Row], seq_len: int) -> tuple[Ids, Ids, Ids]:
    """Positions, which begin again with every pair, numbers of pairs, and segments; all BT."""
    positions, documents, segments = np.zeros((3, len(rows), seq_len), np.int64)
    documents[:] = NO_DOCUMENT
    for b, row in enumerate(rows):
        for number, (start, second, stop, _) in enumerate(row.pairs):
            positions[b, start:stop] = np.arange(stop - start)
            documents[b, start:stop] = number
            segments[b, second:stop] = 1
    return positions, documents, segments
