"""The architecture of an encoder-decoder as data: sizes, counts, and what it costs to train.

Free of torch, so that a configuration is checked before torch is imported. Letters as in ``llmkit/interfaces.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from llmkit.models.config import GATED, GATED_WIDTH_MULTIPLE, Activation, Problems, known_vocab, round_up, vocab_for

if TYPE_CHECKING:
    from llmkit.models.encoder_decoder import EncoderDecoder

MIN_BUCKETS = 4  # half of them for each direction, half of those for exact distances


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """T5 style and BART or Marian style in one encoder-decoder. Null fields are derived (properties below).

    Every target begins with the pad id; where ``start_id`` is set, the decoder reads that id in its place.
    """

    kind: ClassVar[str] = "encoder_decoder"

    vocab_size: int | None
    max_seq_len: int
    d_model: int
    n_layers: int
    n_decoder_layers: int | None
    n_heads: int
    d_head: int | None
    d_ff: int | None
    norm: Literal["layernorm", "rmsnorm"]
    norm_bias: bool
    norm_eps: float
    norm_position: Literal["pre", "post"]
    embedding_norm: bool
    activation: Activation
    position: Literal["relative", "learned", "sinusoidal"]
    n_position_buckets: int | None
    max_position_distance: int | None
    scale_embedding: bool
    scale_attention: bool
    scale_logits: bool
    attention_bias: bool
    mlp_bias: bool
    head_bias: bool
    dropout: float
    attention_dropout: float | None
    tie_embeddings: bool
    init_std: float | None
    start_id: int | None

    # -- derived sizes ------------------------------------------------------------------------------------------

    @property
    def gated(self) -> bool:
        """Gated feed-forward layers have three matrices instead of two."""
        return self.activation in GATED.values()

    @property
    def decoder_layers(self) -> int:
        """Blocks of the decoder; as many as the encoder's unless ``n_decoder_layers`` says otherwise."""
        return self.n_layers if self.n_decoder_layers is None else self.n_decoder_layers

    @property
    def weights_dropout(self) -> float:
        """The share of attention weights zeroed in training."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def head_width(self) -> int:
        """K."""
        return self.d_head or self.d_model // self.n_heads

    @property
    def ff_width(self) -> int:
        """F: 4 D, or 8/3 D for a gated layer, which then has as many weights (Shazeer 2020, section 2)."""
        if self.d_ff is not None:
            return self.d_ff
        return round_up(-(-8 * self.d_model // 3), GATED_WIDTH_MULTIPLE) if self.gated else 4 * self.d_model

    @property
    def vocab_rows(self) -> int:
        """V; raises ``ConfigError`` while the tokenizer is not known."""
        return known_vocab(self.vocab_size)

    def with_vocab(self, tokenizer_vocab_size: int) -> EncoderDecoderConfig:
        """The same model with room for every id of the tokenizer; a size set by hand is kept if it is large enough."""
        return replace(self, vocab_size=vocab_for(self.vocab_size, tokenizer_vocab_size))

    # -- counts -------------------------------------------------------------------------------------------------

    def n_params(self) -> int:
        """All trainable parameters, exactly; one embedding serves both sides, and a tied head counts once."""
        V, D = self.vocab_rows, self.d_model
        head = (0 if self.tie_embeddings else V * D) + (V if self.head_bias else 0)
        return V * D + self._position_params() + self.n_params_without_embeddings() + head

    def n_params_without_embeddings(self) -> int:
        """Parameters outside token embedding, position tables and output head (Kaplan et al. 2020, section 2.1)."""
        matrices = self._encoder_matrices() + self._decoder_matrices() + self._cross_key_value_matrices()
        blocks = self.n_layers * self._block_vectors(cross=False) + self.decoder_layers * self._block_vectors(
            cross=True
        )
        outer = 2 * self._norm_params() * (int(self.embedding_norm) + int(self.norm_position == "pre"))
        return matrices + blocks + outer

    def matmul_params(self) -> int:
        """Parameters of all matrices: those of the blocks and the head, tied or not. No look-ups."""
        blocks = self._encoder_matrices() + self._decoder_matrices() + self._cross_key_value_matrices()
        return blocks + self.vocab_rows * self.d_model

    def flops_per_token(self, seq_len: int, target_len: int = 0) -> int:
        """FLOPs of a training token, forward and backward, averaged over S = ``seq_len`` source tokens and
        T = ``target_len`` target tokens::

            (6 (S (E + C) + T (M + V D)) + 12 H K (L S^2 + L' (T^2 + T S))) / (S + T)

        The encoder's matrices E and the cross-attention's key and value matrices C see the source tokens, the decoder's
        other matrices M and the head V D the target tokens. The second term is the two attention products over full
        rectangles, in L encoder and L' decoder blocks. Counted as in Kaplan et al. 2020, section 2.1; look-ups, norms,
        activations and softmax are left out. Rounded down.
        """
        S, T = seq_len, target_len
        source = self._encoder_matrices() + self._cross_key_value_matrices()
        target = self._decoder_matrices() + self.vocab_rows * self.d_model
        squares = self.n_layers * S * S + self.decoder_layers * (T * T + T * S)
        return (6 * (S * source + T * target) + 12 * self.n_heads * self.head_width * squares) // (S + T)

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

        ``target_len`` is ``seq_len`` when left out. ``value_bytes`` is the width of the compute type; the residual
        stream stays in fp32. ``logit_rows`` is the number of rows whose logits (fp32 and compute type) live at once.
        """
        S, T = seq_len, seq_len if target_len is None else target_len
        encoder = self._saved_bytes(S, S, value_bytes)
        decoder = self._saved_bytes(T, T, value_bytes) + self._saved_cross_bytes(T, S, value_bytes)
        stream, D = 4, self.d_model
        if checkpointing:
            blocks = stream * D * (self.n_layers * S + self.decoder_layers * T) + max(encoder, decoder)
        else:
            blocks = self.n_layers * encoder + self.decoder_layers * decoder
        bias = 4 * self.n_heads * (S * S + T * T) if self.position == "relative" else 0
        ends = 2 * stream * D * (S + T)
        return batch_size * (blocks + bias + ends) + logit_rows * self.vocab_rows * (4 + value_bytes)

    def hf_architecture(self) -> str | None:
        """The class of ``transformers`` that computes the same function; None when there is none."""
        from llmkit.models.hf.families import family_of

        return family_of(self).architecture

    # -- checks and building ------------------------------------------------------------------------------------

    def problems(self) -> Problems:
        """Every value that is out of range or contradicts another: (field, message)."""
        return [*self._range_problems(), *self._position_problems(), *self._contradictions()]

    def build(self) -> EncoderDecoder:
        """The module with uninitialised weights: call ``init_weights`` or load a checkpoint.

        Under ``with torch.device("meta")`` it takes no memory.
        """
        from llmkit.models.encoder_decoder import EncoderDecoder

        return EncoderDecoder(self)

    # -- private ------------------------------------------------------------------------------------------------

    def _attention_matrices(self) -> int:
        return 4 * self.d_model * self.n_heads * self.head_width

    def _mlp_matrices(self) -> int:
        return (3 if self.gated else 2) * self.d_model * self.ff_width

    def _encoder_matrices(self) -> int:
        return self.n_layers * (self._attention_matrices() + self._mlp_matrices())

    def _decoder_matrices(self) -> int:
        """Those that target tokens pass through: of the cross-attention, the query and output matrices."""
        return self.decoder_layers * (3 * self._attention_matrices() // 2 + self._mlp_matrices())

    def _cross_key_value_matrices(self) -> int:
        return self.decoder_layers * (self._attention_matrices() // 2)

    def _block_vectors(self, *, cross: bool) -> int:
        attention = 3 * self.n_heads * self.head_width + self.d_model if self.attention_bias else 0
        mlp = (2 if self.gated else 1) * self.ff_width + self.d_model if self.mlp_bias else 0
        n_attentions = 2 if cross else 1
        return n_attentions * attention + mlp + (n_attentions + 1) * self._norm_params()

    def _norm_params(self) -> int:
        return self.d_model * (2 if self.norm_bias else 1)

    def _position_params(self) -> int:
        """One table a stack."""
        if self.position == "relative":
            return 2 * (self.n_position_buckets or 0) * self.n_heads
        return 2 * self.max_seq_len * self.d_model if self.position == "learned" else 0

    def _saved_bytes(self, T: int, S: int, value_bytes: int) -> int:
        """Bytes a sequence leaves behind in one block, cross-attention left out, for its backward pass."""
        mlp = (4 if self.gated else 2) * self.ff_width
        return self._saved_attention_bytes(T, S, value_bytes) + T * (
            4 * self.d_model + (self.d_model + mlp) * value_bytes
        )

    def _saved_cross_bytes(self, T: int, S: int, value_bytes: int) -> int:
        return self._saved_attention_bytes(T, S, value_bytes)

    def _saved_attention_bytes(self, T: int, S: int, value_bytes: int) -> int:
        """The norm's input in fp32; what the matrices read; queries, keys, values and their mixture; a bias of the
        scores makes the kernel keep the T x S weights as well."""
        width = self.n_heads * self.head_width
        products = T * (self.d_model + 2 * width) + 2 * S * width
        weights = self.n_heads * T * S if self.position == "relative" else 0
        return 4 * T * self.d_model + (products + weights) * value_bytes

    def _range_problems(self) -> Problems:
        sizes = ("max_seq_len", "d_model", "n_layers", "n_heads")
        optional = ("vocab_size", "n_decoder_layers", "d_head", "d_ff")
        found = [(name, "must be at least 1") for name in sizes if getattr(self, name) < 1]
        found += [
            (name, "must be null or at least 1")
            for name in optional
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if not self.norm_eps > 0:
            found.append(("norm_eps", "must be above 0"))
        if self.init_std is not None and not self.init_std > 0:
            found.append(("init_std", "must be null or above 0"))
        if not 0 <= self.dropout < 1:
            found.append(("dropout", "must be in [0, 1)"))
        if self.attention_dropout is not None and not 0 <= self.attention_dropout < 1:
            found.append(("attention_dropout", "must be null or in [0, 1)"))
        if self.start_id is not None and not 0 <= self.start_id < (self.vocab_size or self.start_id + 1):
            found.append(("start_id", "must be null or an id of the vocabulary"))
        return found

    def _position_problems(self) -> Problems:
        n, furthest = self.n_position_buckets, self.max_position_distance
        if self.position != "relative":
            names = {"n_position_buckets": n, "max_position_distance": furthest}
            why = f"has no effect with position={self.position}; set it to null"
            return [(name, why) for name, value in names.items() if value is not None]
        if n is None or n < MIN_BUCKETS:
            return [("n_position_buckets", f"must be at least {MIN_BUCKETS} with position=relative")]
        if furthest is None or furthest <= n // 2:
            return [("max_position_distance", f"must be above half of n_position_buckets ({n}) with position=relative")]
        return []

    def _contradictions(self) -> Problems:
        found = []
        if self.n_heads > 0 and self.d_head is None and self.d_model % self.n_heads:
            found.append(("n_heads", f"must divide d_model ({self.d_model}), or set d_head"))
        if self.norm == "rmsnorm" and self.norm_bias:
            found.append(("norm_bias", "has no effect with norm=rmsnorm; set it to false"))
        return found
