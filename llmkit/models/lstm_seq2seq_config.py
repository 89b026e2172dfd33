"""The architecture of an LSTM encoder-decoder as data: sizes, counts, and what it costs to train. Free of torch.

Letters as in ``llmkit/interfaces.py``, and R for the width of the LSTM states.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from llmkit.models.config import Problems, known_vocab, vocab_for
from llmkit.models.lstm_config import attention_bytes, lstm_bytes, range_problems

if TYPE_CHECKING:
    from llmkit.models.lstm_seq2seq import LSTMSeq2Seq


@dataclass(frozen=True)
class LSTMSeq2SeqConfig:
    """A bidirectional LSTM encoder and an LSTM decoder with attention; both read one embedding. Nulls are derived."""

    kind: ClassVar[str] = "encoder_decoder"

    vocab_size: int | None
    max_seq_len: int
    d_model: int
    d_hidden: int | None
    n_layers: int
    dropout: float
    tie_embeddings: bool
    init_range: float

    # -- derived sizes ------------------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """R, of the decoder's states and of the encoder's two directions together."""
        return self.d_hidden or self.d_model

    @property
    def vocab_rows(self) -> int:
        """V; raises ``ConfigError`` while the tokenizer is not known."""
        return known_vocab(self.vocab_size)

    def with_vocab(self, tokenizer_vocab_size: int) -> LSTMSeq2SeqConfig:
        """The same model with room for every id of the tokenizer; a size set by hand is kept if it is large enough."""
        return replace(self, vocab_size=vocab_for(self.vocab_size, tokenizer_vocab_size))

    # -- counts -------------------------------------------------------------------------------------------------

    def n_params(self) -> int:
        """All trainable parameters, exactly; a tied head counts once."""
        table = self.vocab_rows * self.d_model
        return table + self.n_params_without_embeddings() + (0 if self.tie_embeddings else table)

    def n_params_without_embeddings(self) -> int:
        """Parameters outside token embedding and output head; a layer has two biases, as in torch."""
        return self._encoder_matrices() + self._decoder_matrices() + self.n_layers * 16 * self.width

    def matmul_params(self) -> int:
        """Parameters of all matrices: those of both sides and the head, tied or not. No look-ups."""
        return self._encoder_matrices() + self._decoder_matrices() + self.vocab_rows * self.d_model

    def flops_per_token(self, seq_len: int, target_len: int = 0) -> int:
        """FLOPs of a training token, forward and backward, averaged over S = ``seq_len`` source tokens and
        T = ``target_len`` target tokens: ``(6 (S E + T (M + V D)) + 12 R T S) / (S + T)``.

        Source tokens pass the encoder's matrices E, target tokens the decoder's M and the head; the last term is the
        two attention products over the full T x S rectangle. Counted as in Kaplan et al. 2020, section 2.1; look-ups,
        gates and softmax are left out. Rounded down.
        """
        S, T = seq_len, target_len
        target = self._decoder_matrices() + self.vocab_rows * self.d_model
        return (6 * (S * self._encoder_matrices() + T * target) + 12 * self.width * T * S) // (S + T)

    def activation_bytes(
        self,
        batch_size: int,
        seq_len: int,
        *,
        value_bytes: int,
        checkpointing: bool,
        logit_rows: int,
        target_len: int | None = None,
    ) -> int:
        """Estimated peak of what the backward pass needs, for the plan of a run (parameters not included).

        ``target_len`` is ``seq_len`` when left out. ``value_bytes`` is the width of the compute type; the LSTMs are
        counted in fp32, in which a CPU runs them. ``logit_rows`` is the number of rows whose logits (fp32 and compute
        type) live at once.
        """
        S, T, R, D = seq_len, seq_len if target_len is None else target_len, self.width, self.d_model
        L = self.n_layers
        layers = lstm_bytes(D, R, L, T, checkpointing) + lstm_bytes(D, R, L, S, checkpointing)
        layers += S * 4 * (D + (2 * L - 1) * R)  # a copy of the encoder's inputs from right to left, joined directions
        ends = (S + T) * D * 4 + T * D * value_bytes
        attention = attention_bytes(R, T, S, value_bytes)
        return batch_size * (layers + attention + ends) + logit_rows * self.vocab_rows * (4 + value_bytes)

    def hf_architecture(self) -> str | None:
        """The class of ``transformers`` that computes the same function: there is none."""
        return None

    # -- checks and building ------------------------------------------------------------------------------------

    def problems(self) -> Problems:
        """Every value that is out of range: (field, message)."""
        found = range_problems(self, ("vocab_size", "d_hidden"))
        if not found and self.width % 2:
            name = "d_model" if self.d_hidden is None else "d_hidden"
            found.append((name, "must be even: the encoder's two directions have half of it each"))
        return found

    def build(self) -> LSTMSeq2Seq:
        """The module with uninitialised weights: call ``init_weights`` or load a checkpoint.

        Under ``with torch.device("meta")`` it takes no memory.
        """
        from llmkit.models.lstm_seq2seq import LSTMSeq2Seq

        return LSTMSeq2Seq(self)

    # -- private ------------------------------------------------------------------------------------------------

    def _encoder_matrices(self) -> int:
        """Two directions of width R / 2 a layer."""
        R = self.width
        return 4 * R * (self.d_model + R // 2) + (self.n_layers - 1) * 4 * R * (R + R // 2)

    def _decoder_matrices(self) -> int:
        R, D = self.width, self.d_model
        return 4 * R * (D + R) + (self.n_layers - 1) * 8 * R * R + R * R + 2 * R * D
