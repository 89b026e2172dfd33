"""Masked language modelling: restore hidden tokens from the text on both sides (BERT, Devlin et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llmkit.errors import ConfigError
from llmkit.interfaces import IGNORE_INDEX, Batch, Roles, Row, TokenIds
from llmkit.objectives import masking
from llmkit.objectives.masking import Flags
from llmkit.objectives.rows import Ids, document_columns, isolation, pad_rows, to_tensor
from llmkit.objectives.token_loss import TokenPrediction

NO_MASK = (
    "masked language modelling needs a mask token, which this tokenizer does not have",
    "tokenizer=wordpiece, or tokenizer.extra_symbols=[<mask>]",
)
SPAN_MEANS = (1.0, 5.0)  # of lengths up to ``masking.SPAN_MAX``


@dataclass(frozen=True)
class MaskedLM(TokenPrediction):
    """Hides ``mask_rate`` of the tokens of each row and predicts them; special tokens are never hidden.

    Of the hidden tokens ``mask_share`` become the mask, ``random_share`` a random token of the vocabulary, and the rest
    stay: decided for each token, also inside whole words, as in BERT's program, and for each span as in SpanBERT (Joshi
    et al. 2020, section 3.1). Formulas of smoothing and z-loss are in ``linear_cross_entropy.py``.
    """

    trains: ClassVar[tuple[str, ...]] = ("encoder",)

    mask_rate: float
    mask_rate_start: float | None
    mask_rate_sequences: int | None
    mask_share: float
    random_share: float
    whole_word: bool
    span_mean: float | None

    def problems(self) -> list[tuple[str, str]]:
        found = []
        if not 0 < self.mask_rate <= 1:
            found.append(("mask_rate", "must be in (0, 1]"))
        if self.mask_rate_start is not None and not 0 < self.mask_rate_start <= 1:
            found.append(("mask_rate_start", "must be null or in (0, 1]"))
        if self.mask_rate_sequences is not None and self.mask_rate_sequences < 1:
            found.append(("mask_rate_sequences", "must be null or at least 1"))
        elif (self.mask_rate_start is None) != (self.mask_rate_sequences is None):
            found.append(("mask_rate_sequences", "must be set together with mask_rate_start, or both be null"))
        if not 0 <= self.mask_share <= 1:
            found.append(("mask_share", "must be in [0, 1]"))
        elif not 0 <= self.random_share <= 1 - self.mask_share + 1e-9:
            found.append(("random_share", "must be at least 0 and at most 1 - mask_share"))
        if self.span_mean is not None and not SPAN_MEANS[0] <= self.span_mean <= SPAN_MEANS[1]:
            found.append(("span_mean", f"must be null or in [{SPAN_MEANS[0]:g}, {SPAN_MEANS[1]:g}]"))
        return found + super().problems()

    def window(self, seq_len: int) -> tuple[int, int]:
        """Rows share nothing: every token of a row is an input."""
        return seq_len, 0

    @property
    def predicted_share(self) -> float:
        return self.mask_rate

    def logit_rows(self, n_rows: int, vocab_size: int) -> int:
        """Of ``n_rows`` tokens, those whose logits are held at once: of as many as are hidden, at the highest rate."""
        hidden = math.ceil(n_rows * max(self.mask_rate, self.mask_rate_start or 0.0))
        return super().logit_rows(hidden, vocab_size)

    def lacks(self, ids: Roles, seq_len: int) -> tuple[str, str] | None:
        return NO_MASK if ids.mask_id is None else None

    def rate(self, position: int | None) -> float:
        """Share of tokens to hide in the training sequence at ``position``; None asks for validation's."""
        if position is None or self.mask_rate_start is None or self.mask_rate_sequences is None:
            return self.mask_rate
        progress = min(position / self.mask_rate_sequences, 1.0)
        return self.mask_rate_start + (self.mask_rate - self.mask_rate_start) * progress

    def mask(self, rows: Sequence[Row], inputs_BT: Ids, real_BT: Flags, ids: TokenIds) -> tuple[Ids, Ids]:
        """(inputs with hidden tokens, labels), both BT. ``real_BT`` is false at padding, which is on the right.

        Raises ``ConfigError`` when the vocabulary has no mask.
        """
        if ids.mask_id is None:
            what, fix = NO_MASK
            raise ConfigError(what, where="tokenizer", fix=fix)
        eligible = real_BT & ~ids.special[inputs_BT]
        draws = masking.draw(rows, real_BT)
        starts, kinds = eligible, draws.kind_BT
        if self.whole_word:
            starts = masking.word_starts(inputs_BT, eligible, ids.word_starts)
        if self.span_mean is not None:
            starts = masking.span_starts(starts, eligible, self.span_mean, draws.length_BT)
            kinds = masking.per_unit(kinds, starts)
        rates = np.array([self.rate(row.position) for row in rows])
        chosen = masking.choose(starts, eligible, rates, draws)
        corrupted = masking.corrupt(
            inputs_BT,
            chosen,
            kinds,
            draws.token_BT,
            mask_share=self.mask_share,
            random_share=self.random_share,
            mask_id=ids.mask_id,
            special_V=ids.special,
        )
        return corrupted, masking.labels_of(inputs_BT, chosen)

    def collate(self, rows: Sequence[Row], *, seq_len: int, ids: TokenIds) -> Batch:
        """Windows of at most ``seq_len`` ids to one batch; positions and documents are those of the text unmasked."""
        inputs, lengths = pad_rows([row.ids for row in rows], seq_len, ids.pad_id)
        real = np.arange(seq_len) < lengths[:, None]
        corrupted, labels = self.mask(rows, inputs, real, ids)
        positions, documents = document_columns(inputs, real, ids.eos_id)
        return Batch(
            input_ids=to_tensor(corrupted),
            labels=to_tensor(labels),
            position_ids=to_tensor(positions),
            document_ids=isolation(documents),
            n_targets=int((labels != IGNORE_INDEX).sum()),
        )
