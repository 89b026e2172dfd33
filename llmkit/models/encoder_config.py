"""The architecture of an encoder as data: sizes, counts, and what it costs to train.

Free of torch, so that a configuration is checked before torch is imported. Letters as in ``llmkit/interfaces.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from llmkit.models.config import GATED, GATED_WIDTH_MULTIPLE, Activation, Problems, known_vocab, round_up, vocab_for

if TYPE_CHECKING:
    from llmkit.models.encoder import Encoder


@dataclass(frozen=True)
class EncoderConfig:
    """BERT, RoBERTa, DistilBERT, ELECTRA and ModernBERT in one encoder. Null fields are derived (properties below).

    BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019): ``norm_position`` post, learned positions, GELU, biases.
    DistilBERT (Sanh et al. 2019): the same without segments. ELECTRA (Clark et al. 2020): the same with embeddings of
    a width of their own, ``d_embedding``; null in all others, so that an ELECTRA with equal widths is known as one.
    ModernBERT (Warner et al. 2024): ``norm_position`` pre, rotary positions, GeGLU, no biases, and of every
    ``global_every`` layers only the first sees the whole document.
    """

    kind: ClassVar[str] = "encoder"

    vocab_size: int | None
    max_seq_len: int
    d_model: int
    d_embedding: int | None
    n_layers: int
    n_heads: int
    d_ff: int | None
    norm_position: Literal["post", "pre"]
    norm_bias: bool
    norm_eps: float
    activation: Activation
    position: Literal["learned", "rotary"]
    rope_theta: float | None
    local_rope_theta: float | None
    global_every: int
    local_window: int | None
    n_segments: int
    attention_bias: bool
    mlp_bias: bool
    transform_activation: Literal["gelu", "gelu_tanh", "relu", "silu"] | None
    transform_bias: bool
    head_bias: bool
    pooler: bool
    share_layers: bool
    dropout: float
    tie_embeddings: bool
    init_std: float
    residual_init_scale: bool

    # -- derived sizes ------------------------------------------------------------------------------------------

    @property
    def gated(self) -> bool:
        """Gated feed-forward layers have three matrices instead of two."""
        return self.activation in GATED.values()

    @property
    def transform_function(self) -> str:
        """The activation between the blocks and the output matrix: the blocks' own, or GELU where they are gated."""
        if self.transform_activation is not None:
            return self.transform_activation
        return "gelu" if self.gated else self.activation

    @property
    def embedding_width(self) -> int:
        """E: the width of the embeddings and of what the output matrix reads."""
        return self.d_model if self.d_embedding is None else self.d_embedding

    @property
    def projected(self) -> bool:
        """Whether a dense layer stands between the embeddings and the first block."""
        return self.embedding_width != self.d_model

    @property
    def head_width(self) -> int:
        """K."""
        return self.d_model // self.n_heads

    @property
    def ff_width(self) -> int:
        """F: 4 D, or 8/3 D for a gated layer, which then has as many weights (Shazeer 2020, section 2)."""
        if self.d_ff is not None:
            return self.d_ff
        if not self.gated:
            return 4 * self.d_model
        return round_up(-(-8 * self.d_model // 3), GATED_WIDTH_MULTIPLE)

    @property
    def reach(self) -> int | None:
        """Tokens that a local layer sees on either side: half the window. None without local layers."""
        return None if self.local_window is None or self.global_every == 1 else self.local_window // 2

    @property
    def n_blocks(self) -> int:
        """Blocks with parameters of their own."""
        return 1 if self.share_layers else self.n_layers

    @property
    def norms_first_block(self) -> bool:
        """False where the first block reads what has just had a norm, and so has none before its attention."""
        return self.norm_position == "post" or self.share_layers or self.projected

    @property
    def vocab_rows(self) -> int:
        """V; raises ``ConfigError`` while the tokenizer is not known."""
        return known_vocab(self.vocab_size)

    def is_global(self, layer: int) -> bool:
        """Whether a layer (counted from 0) sees the whole document."""
        return layer % self.global_every == 0

    def with_vocab(self, tokenizer_vocab_size: int) -> EncoderConfig:
        """The same model with room for every id of the tokenizer; a size set by hand is kept if it is large enough."""
        return replace(self, vocab_size=vocab_for(self.vocab_size, tokenizer_vocab_size))

    # -- counts -------------------------------------------------------------------------------------------------

    def n_params(self) -> int:
        """All trainable parameters, exactly; a tied output matrix counts once, and so does a shared block."""
        V, E = self.vocab_rows, self.embedding_width
        positions = self.max_seq_len if self.position == "learned" else 0
        outputs = (0 if self.tie_embeddings else V * E) + (V if self.head_bias else 0)
        return (V + positions + self.n_segments) * E + self.n_params_without_embeddings() + outputs

    def n_params_without_embeddings(self) -> int:
        """Parameters outside the three embeddings and the output head (Kaplan et al. 2020, section 2.1)."""
        D, E, norm = self.d_model, self.embedding_width, self._norm_params()
        blocks = self.n_blocks * (self._block_matrices() + self._block_vectors())
        pre = self.norm_position == "pre"
        norms = self._norm_params(E) + (norm if pre else 0)  # of the embeddings; before the output
        first = 0 if self.norms_first_block else norm
        projection = self._projection_matrix() + (D if self.projected else 0)
        transform = D * E + (E if self.transform_bias else 0) + self._norm_params(E)
        pooler = D * D + D + 2 * D + 2 if self.pooler else 0
        return blocks - first + norms + projection + transform + pooler

    def matmul_params(self) -> int:
        """Parameters that multiply every token: all matrices of the blocks, projection, transform and output matrix.

        A shared block counts as often as it is used, the output matrix tied or not. No look-ups, and not the pooler,
        which reads one token a pair.
        """
        return self.n_layers * self._block_matrices() + self._projection_matrix() + self.head_params()

    def head_params(self) -> int:
        """Those of them that only predicted tokens meet: the transform and the output matrix."""
        return (self.d_model + self.vocab_rows) * self.embedding_width

    def flops_per_token(self, seq_len: int, target_len: int = 0) -> int:
        """FLOPs of one training token, forward and backward: ``6 N + 12 D (seen in layer 1 + seen in layer 2 ...)``.

        N is ``matmul_params()``. A global layer sees all T tokens, a local one those of its window at most; the dense
        kernel computes the whole square of both (``models/encoder.py``). Counted as if every token were predicted
        (``objectives/pairing.py`` takes off what is spared). Not counted: look-ups,
        norms, activations, softmax, and what activation checkpointing computes twice. Kaplan et al. 2020, section 2.1.
        ``target_len`` belongs to encoder-decoders.
        """
        local = seq_len if self.reach is None else min(2 * self.reach + 1, seq_len)
        seen = sum(seq_len if self.is_global(layer) else local for layer in range(self.n_layers))
        return 6 * self.matmul_params() + 12 * self.d_model * seen

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

        ``value_bytes`` is the width of the compute type; the residual stream stays in fp32. ``logit_rows`` is the
        number of rows whose logits (fp32 and compute type) live at once. The attention masks of packed rows, one for
        global and one for local layers, are squares.
        """
        tokens = batch_size * seq_len
        block = tokens * self._saved_bytes_per_token(value_bytes)
        stream = tokens * self.d_model * 4
        blocks = self.n_layers * stream + block if checkpointing else self.n_layers * block
        masks = (1 if self.reach is None else 2) * tokens * seq_len * value_bytes
        return blocks + masks + 2 * stream + logit_rows * self.vocab_rows * (4 + value_bytes)

    def hf_architecture(self) -> str | None:
        """The class of ``transformers`` that computes the same function; None when there is none."""
        from llmkit.models.hf.families import family_of

        family = family_of(self)
        named: list[str | None] = family.write(self).get("architectures", [family.architecture])
        return named[0]

    # -- checks and building ------------------------------------------------------------------------------------

    def problems(self) -> Problems:
        """Every value that is out of range or contradicts another: (field, message)."""
        return [*self._range_problems(), *self._shape_problems(), *self._position_problems(), *self._local_problems()]

    def build(self) -> Encoder:
        """The module with uninitialised weights: call ``init_weights`` or load a checkpoint.

        Under ``with torch.device("meta")`` it takes no memory.
        """
        from llmkit.models.encoder import Encoder

        return Encoder(self)

    # -- private ------------------------------------------------------------------------------------------------

    def _block_matrices(self) -> int:
        D = self.d_model
        return 4 * D * D + (3 if self.gated else 2) * D * self.ff_width

    def _block_vectors(self) -> int:
        attention = 4 * self.d_model if self.attention_bias else 0
        mlp = (2 if self.gated else 1) * self.ff_width + self.d_model if self.mlp_bias else 0
        return attention + mlp + 2 * self._norm_params()

    def _projection_matrix(self) -> int:
        return self.embedding_width * self.d_model if self.projected else 0

    def _norm_params(self, width: int | None = None) -> int:
        return (width or self.d_model) * (2 if self.norm_bias else 1)

    def _saved_bytes_per_token(self, value_bytes: int) -> int:
        """What a token leaves behind in one block for its backward pass (checked against a real one in the tests)."""
        D, F = self.d_model, self.ff_width
        stream = 2 * D * 4  # the inputs of the two norms
        products = 6 * D  # inputs of q/k/v; q, k and v; inputs of o and of the feed-forward layer
        mlp = (4 if self.gated else 2) * F
        return stream + (products + mlp) * value_bytes

    def _range_problems(self) -> Problems:
        sizes = ("max_seq_len", "d_model", "n_layers", "n_heads", "global_every")
        optional = ("vocab_size", "d_embedding", "d_ff", "local_window")
        found = [(name, "must be at least 1") for name in sizes if getattr(self, name) < 1]
        found += [
            (name, "must be null or at least 1")
            for name in optional
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        found += [(name, "must be above 0") for name in ("norm_eps", "init_std") if not getattr(self, name) > 0]
        if self.n_segments < 0:
            found.append(("n_segments", "must be at least 0"))
        if not 0 <= self.dropout < 1:
            found.append(("dropout", "must be in [0, 1)"))
        return found

    def _shape_problems(self) -> Problems:
        if self._range_problems():
            return []  # the quotients below would mislead
        if self.d_model % self.n_heads:
            return [("n_heads", f"must divide d_model ({self.d_model})")]
        if self.position == "rotary" and self.head_width % 2:
            return [("n_heads", f"gives heads of {self.head_width}, and rotary positions need an even width")]
        return []

    def _position_problems(self) -> Problems:
        thetas = {"rope_theta": self.rope_theta, "local_rope_theta": self.local_rope_theta}
        if self.position == "learned":
            without = "has no effect with position=learned; set it to null"
            return [(name, without) for name, theta in thetas.items() if theta is not None]
        found = [(name, "must be above 1") for name, theta in thetas.items() if theta is not None and not theta > 1]
        if self.rope_theta is None:
            found.append(("rope_theta", "must be above 1 with position=rotary"))
        return found

    def _local_problems(self) -> Problems:
        if self.global_every > 1:
            needed = f"must be set with global_every={self.global_every}: the other layers are local"
            return [("local_window", needed)] if self.local_window is None else []
        without = "has no effect with global_every=1; set it to null"
        found = [("local_window", without)] if self.local_window is not None else []
        if self.position == "rotary" and self.local_rope_theta is not None:
            found.append(("local_rope_theta", without))
        return found
