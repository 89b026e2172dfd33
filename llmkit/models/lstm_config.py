"""The architecture of an LSTM language model as data: sizes, counts, and what it costs to train. Free of torch.

Letters as in ``llmkit/interfaces.py``, and R for the width of the LSTM states.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from llmkit.models.config import Problems, known_vocab, vocab_for

if TYPE_CHECKING:
    from llmkit.models.lstm import LSTMLanguageModel


VALUES_A_LAYER = 15  # kept for the backward pass, in widths of the state a token


@dataclass(frozen=True)
class LSTMConfig:
    """An LSTM over token embeddings, with attention over its past states or without. Null fields are derived."""

    kind: ClassVar[str] = "decoder"

    vocab_size: int | None
    max_seq_len: int
    d_model: int
    d_hidden: int | None
    n_layers: int
    attention: bool
    attention_window: int | None
    dropout: float
    tie_embeddings: bool
    init_range: float

    # -- derived sizes ------------------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """R; the width of the embedding unless ``d_hidden`` says otherwise."""
        return self.d_hidden or self.d_model

    @property
    def projected(self) -> bool:
        """Whether a matrix brings the states to the width of the output; with attention it is the one that combines."""
        return not self.attention and self.width != self.d_model

    @property
    def vocab_rows(self) -> int:
        """V; raises ``ConfigError`` while the tokenizer is not known."""
        return known_vocab(self.vocab_size)

    def with_vocab(self, tokenizer_vocab_size: int) -> LSTMConfig:
        """The same model with room for every id of the tokenizer; a size set by hand is kept if it is large enough."""
        return replace(self, vocab_size=vocab_for(self.vocab_size, tokenizer_vocab_size))

    # -- counts -------------------------------------------------------------------------------------------------

    def n_params(self) -> int:
        """All trainable parameters, exactly; a tied head counts once."""
        table = self.vocab_rows * self.d_model
        return table + self.n_params_without_embeddings() + (0 if self.tie_embeddings else table)

    def n_params_without_embeddings(self) -> int:
        """Parameters outside token embedding and output head; a layer has two biases, as in torch."""
        return self._matrices() + self.n_layers * 8 * self.width

    def matmul_params(self) -> int:
        """Parameters that multiply every token: all matrices and the head, tied or not. No look-ups."""
        return self._matrices() + self.vocab_rows * self.d_model

    def flops_per_token(self, seq_len: int, target_len: int = 0) -> int:
        """FLOPs of one training token, forward and backward: ``6 N + 12 R T``.

        N is ``matmul_params()``; the second term, absent without attention, is the two attention products over the
        full T x T square, which the dense kernel computes with a window too. Counted as in Kaplan et al. 2020, section
        2.1; look-ups, gates, softmax, and what activation checkpointing computes twice are left out. ``target_len``
        belongs to encoder-decoders.
        """
        return 6 * self.matmul_params() + (12 * self.width * seq_len if self.attention else 0)

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

        ``value_bytes`` is the width of the compute type; the LSTM is counted in fp32, in which a CPU runs it.
        ``logit_rows`` is the number of rows whose logits (fp32 and compute type) live at once.
        """
        R, D = self.width, self.d_model
        layers = lstm_bytes(D, R, self.n_layers, seq_len, checkpointing)
        attention = attention_bytes(R, seq_len, seq_len, value_bytes) if self.attention else 0
        ends = seq_len * D * (4 + value_bytes)
        return batch_size * (layers + attention + ends) + logit_rows * self.vocab_rows * (4 + value_bytes)

    def hf_architecture(self) -> str | None:
        """The class of ``transformers`` that computes the same function: there is none."""
        return None

    # -- checks and building ------------------------------------------------------------------------------------

    def problems(self) -> Problems:
        """Every value that is out of range or contradicts another: (field, message)."""
        found = range_problems(self, ("vocab_size", "d_hidden", "attention_window"))
        if not self.attention and self.attention_window is not None:
            found.append(("attention_window", "has no effect with attention=false; set it to null"))
        return found

    def build(self) -> LSTMLanguageModel:
        """The module with uninitialised weights: call ``init_weights`` or load a checkpoint.

        Under ``with torch.device("meta")`` it takes no memory.
        """
        from llmkit.models.lstm import LSTMLanguageModel

        return LSTMLanguageModel(self)

    # -- private ------------------------------------------------------------------------------------------------

    def _matrices(self) -> int:
        R, D = self.width, self.d_model
        layers = 4 * R * (D + R) + (self.n_layers - 1) * 8 * R * R
        if self.attention:
            return layers + R * R + 2 * R * D
        return layers + (R * D if self.projected else 0)


def lstm_bytes(n_inputs: int, width: int, n_layers: int, seq_len: int, checkpointing: bool) -> int:
    """What the layers of one stack keep of a row, in fp32: inputs, states, gates, and the workspace of a CPU's kernel,
    the largest part (measured; cuDNN and packed rows keep about half). Checkpointing keeps inputs, and one layer while
    it is computed again."""
    inputs = seq_len * 4 * (n_inputs + (n_layers - 1) * width)
    layer = seq_len * 4 * VALUES_A_LAYER * width
    return inputs + (1 if checkpointing else n_layers) * layer


def attention_bytes(width: int, seq_len: int, memory_len: int, value_bytes: int) -> int:
    """What global attention keeps of a row: queries, states, their mixture and both side by side, memory and mask."""
    return (seq_len * 6 * width + memory_len * width + seq_len * memory_len) * value_bytes


def range_problems(config: Any, optional: tuple[str, ...]) -> Problems:
    """Values out of range in an LSTM's config; ``optional`` names the sizes that may be null."""
    sizes = ("max_seq_len", "d_model", "n_layers")
    found = [(name, "must be at least 1") for name in sizes if getattr(config, name) < 1]
    found += [
        (name, "must be null or at least 1")
        for name in optional
        if getattr(config, name) is not None and getattr(config, name) < 1
    ]
    if not config.init_range > 0:
        found.append(("init_range", "must be above 0"))
    if not 0 <= config.dropout < 1:
        found.append(("dropout", "must be in [0, 1)"))
    return found
