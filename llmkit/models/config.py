"""The architecture of a decoder as data: sizes, counts, and what it costs to train.

Free of torch, so that a configuration is checked before torch is imported. Letters as in ``llmkit/interfaces.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmkit.errors import ConfigError
from llmkit.models.rope_scaling import scaling_faults

if TYPE_CHECKING:
    from llmkit.models.decoder import Decoder

Problems = list[tuple[str, str]]

VOCAB_MULTIPLE = 64  # embedding rows are rounded up to it: aligned rows make the head product faster on GPUs
MIN_FLEX_WIDTH = 16  # flex_attention's kernels need heads at least this wide
Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "geglu", "geglu_tanh", "reglu", "swiglu"]
GATED = {"gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu", "silu": "swiglu"}  # with the function in a gate
GATED_WIDTH_MULTIPLE = 64  # the default width of a gated feed-forward is rounded up to it


@dataclass(frozen=True)
class DecoderConfig:
    """One decoder for all families, whose differences are fields. Null fields are derived (properties below)."""

    kind: ClassVar[str] = "decoder"

    vocab_size: int | None
    max_seq_len: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None
    d_head: int | None
    d_ff: int | None
    norm: Literal["layernorm", "rmsnorm"]
    norm_bias: bool
    norm_eps: float
    norm_position: Literal["pre", "post", "both"]
    parallel_residual: bool
    activation: Activation
    position: Literal["learned", "rotary"]
    rope_theta: float | None
    rotary_fraction: float
    local_rope_theta: float | None
    rope_scaling: dict[str, Any] | None
    attention_windows: tuple[int | None, ...] | None
    qk_norm: Literal["head", "all"] | None
    attention_bias: bool
    attention_out_bias: bool
    attention_scale_dim: int | None
    scale_attention_by_layer: bool
    attention_softcap: float | None
    logit_softcap: float | None
    scale_embedding: bool
    mlp_bias: bool
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
    def kv_heads(self) -> int:
        """G: key/value heads; as many as query heads unless ``n_kv_heads`` says otherwise."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_width(self) -> int:
        """K."""
        return self.d_head or self.d_model // self.n_heads

    @property
    def rotary_width(self) -> int:
        """Dimensions of a head that are rotated, the first ones."""
        return int(self.rotary_fraction * self.head_width)

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """For each layer, how many tokens one sees, itself included; None is all."""
        return tuple(islice(cycle(self.attention_windows or (None,)), self.n_layers))

    @property
    def qk_norm_widths(self) -> tuple[int, int]:
        """Values that a norm of queries and one of keys span; 0 without such norms."""
        if self.qk_norm is None:
            return 0, 0
        K = self.head_width
        return (K, K) if self.qk_norm == "head" else (self.n_heads * K, self.kv_heads * K)

    @property
    def ff_width(self) -> int:
        """F: 4 D, or 8/3 D for a gated layer, which then has as many weights (Shazeer 2020, section 2)."""
        if self.d_ff is not None:
            return self.d_ff
        if not self.gated:
            return 4 * self.d_model
        return round_up(-(-8 * self.d_model // 3), GATED_WIDTH_MULTIPLE)

    @property
    def vocab_rows(self) -> int:
        """V; raises ``ConfigError`` while the tokenizer is not known."""
        return known_vocab(self.vocab_size)

    def with_vocab(self, tokenizer_vocab_size: int) -> DecoderConfig:
        """The same model with room for every id of the tokenizer; a size set by hand is kept if it is large enough."""
        return replace(self, vocab_size=vocab_for(self.vocab_size, tokenizer_vocab_size))

    # -- counts -------------------------------------------------------------------------------------------------

    def n_params(self) -> int:
        """All trainable parameters, exactly; a tied head counts once."""
        V, D = self.vocab_rows, self.d_model
        positions = self.max_seq_len * D if self.position == "learned" else 0
        return V * D + positions + self.n_params_without_embeddings() + (0 if self.tie_embeddings else V * D)

    def n_params_without_embeddings(self) -> int:
        """Parameters outside token embedding, position embedding and output head (Kaplan et al. 2020, section 2.1)."""
        return self.n_layers * (self._block_matrices() + self._block_vectors()) + self._norm_params()

    def matmul_params(self) -> int:
        """Parameters that multiply every token: all matrices of the blocks and the head, tied or not. No look-ups."""
        return self.n_layers * self._block_matrices() + self.vocab_rows * self.d_model

    def flops_per_token(self, seq_len: int, target_len: int = 0) -> int:
        """FLOPs of one training token, forward and backward: ``6 N + 12 L H K T``.

        N is ``matmul_params()``; the second term is the two attention products over the full T x T square (a causal
        kernel may skip half of it), or over T times the window in the layers whose window is smaller than T. Kaplan et
        al. 2020, section 2.1, and Chowdhery et al. 2022 (PaLM), appendix B.
        Not counted: look-ups, norms, activations, softmax, and what activation checkpointing computes twice.
        ``target_len`` belongs to encoder-decoders.
        """
        keys = sum(seq_len if window is None else min(seq_len, window) for window in self.layer_windows)
        return 6 * self.matmul_params() + 12 * self.n_heads * self.head_width * keys

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
        number of rows whose logits (fp32 and compute type; twice fp32 with a soft cap) live at once.
        """
        tokens = batch_size * seq_len
        block = tokens * (self._saved_bytes_per_token(value_bytes) + self._score_bytes_per_token(seq_len, value_bytes))
        stream = tokens * self.d_model * 4
        blocks = self.n_layers * stream + block if checkpointing else self.n_layers * block
        logit_bytes = 4 + value_bytes + (0 if self.logit_softcap is None else 4)
        return blocks + 2 * stream + logit_rows * self.vocab_rows * logit_bytes

    def hf_architecture(self) -> str | None:
        """The class of ``transformers`` that computes the same function; None when there is none."""
        from llmkit.models.hf.families import family_of

        return family_of(self).architecture

    # -- checks and building ------------------------------------------------------------------------------------

    def problems(self) -> Problems:
        """Every value that is out of range or contradicts another: (field, message)."""
        return [*self._range_problems(), *self._shape_problems(), *self._contradictions()]

    def build(self) -> Decoder:
        """The module with uninitialised weights: call ``init_weights`` or load a checkpoint.

        Under ``with torch.device("meta")`` it takes no memory.
        """
        from llmkit.models.decoder import Decoder

        return Decoder(self)

    # -- private ------------------------------------------------------------------------------------------------

    def _block_matrices(self) -> int:
        D, K = self.d_model, self.head_width
        attention = 2 * D * self.n_heads * K + 2 * D * self.kv_heads * K
        return attention + (3 if self.gated else 2) * D * self.ff_width

    def _block_vectors(self) -> int:
        attention = (self.n_heads + 2 * self.kv_heads) * self.head_width if self.attention_bias else 0
        out = self.d_model if self.attention_out_bias else 0
        mlp = (2 if self.gated else 1) * self.ff_width + self.d_model if self.mlp_bias else 0
        norms = (4 if self.norm_position == "both" else 2) * self._norm_params()
        return attention + out + mlp + sum(self.qk_norm_widths) + norms

    def _norm_params(self) -> int:
        return self.d_model * (2 if self.norm_bias else 1)

    def _saved_bytes_per_token(self, value_bytes: int) -> int:
        """What a token leaves behind in one block for its backward pass (checked against a real one in the tests)."""
        D, F, K = self.d_model, self.ff_width, self.head_width
        heads = (self.n_heads + 2 * self.kv_heads) * K
        norms = (4 if self.norm_position == "both" else 2) * D * 4  # their inputs
        if self.qk_norm is not None:
            norms += (self.n_heads + self.kv_heads) * K * 4
        products = 2 * D + 2 * heads + self.n_heads * K  # inputs of q/k/v, of the attention, of o and mlp
        mlp = (4 if self.gated else 2) * F
        return norms + (products + mlp) * value_bytes

    def _score_bytes_per_token(self, seq_len: int, value_bytes: int) -> int:
        """Soft-capped scores: two copies in fp32, one for the product. A GPU holds none, unless it needs dropout."""
        if self.attention_softcap is None or (self.dropout == 0 and self.head_width >= MIN_FLEX_WIDTH):
            return 0
        return self.n_heads * seq_len * (8 + value_bytes)

    def _range_problems(self) -> Problems:
        sizes = ("max_seq_len", "d_model", "n_layers", "n_heads")
        optional = ("vocab_size", "n_kv_heads", "d_head", "d_ff", "attention_scale_dim")
        found = [(name, "must be at least 1") for name in sizes if getattr(self, name) < 1]
        found += [
            (name, "must be null or at least 1")
            for name in optional
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        found += [(name, "must be above 0") for name in ("norm_eps", "init_std") if not getattr(self, name) > 0]
        found += [
            (name, "must be null or above 0")
            for name in ("attention_softcap", "logit_softcap")
            if getattr(self, name) is not None and not getattr(self, name) > 0
        ]
        if not 0 <= self.dropout < 1:
            found.append(("dropout", "must be in [0, 1)"))
        if not 0 < self.rotary_fraction <= 1:
            found.append(("rotary_fraction", "must be in (0, 1]"))
        windows = self.attention_windows
        if windows is not None and (not windows or any(window is not None and window < 1 for window in windows)):
            found.append(("attention_windows", "must be null or a list of nulls and numbers of at least 1"))
        return found

    def _shape_problems(self) -> Problems:
        if self._range_problems():
            return []  # the quotients below would mislead
        found = []
        if self.d_head is None and self.d_model % self.n_heads:
            found.append(("n_heads", f"must divide d_model ({self.d_model}), or set d_head"))
        if self.n_heads % self.kv_heads:
            found.append(("n_kv_heads", f"must divide n_heads ({self.n_heads})"))
        if self.position == "learned":
            return found
        if self.rotary_fraction < 1 and (self.rotary_width < 2 or self.rotary_width % 2):
            found.append(("rotary_fraction", f"must give an even number of dimensions, gives {self.rotary_width}"))
        elif self.rotary_width % 2:
            found.append(("d_head", f"must be even for rotary positions, got {self.head_width}"))
        elif self.rope_scaling is not None:
            found += [("rope_scaling", fault) for fault in scaling_faults(self.rope_scaling, self.rotary_width)]
        return found

    def _contradictions(self) -> Problems:
        found = []
        if self.norm == "rmsnorm" and self.norm_bias:
            found.append(("norm_bias", "has no effect with norm=rmsnorm; set it to false"))
        if self.parallel_residual and self.norm_position != "pre":
            found.append(("parallel_residual", "needs norm_position=pre"))
        return [*found, *(self._learned_problems() if self.position == "learned" else self._rotary_problems())]

    def _learned_problems(self) -> Problems:
        names = ("rope_theta", "local_rope_theta", "rope_scaling")
        found = [
            (name, "has no effect with position=learned; set it to null")
            for name in names
            if getattr(self, name) is not None
        ]
        if self.rotary_fraction != 1:
            found.append(("rotary_fraction", "has no effect with position=learned; set it to 1"))
        return found

    def _rotary_problems(self) -> Problems:
        found = []
        if self.rope_theta is None or not self.rope_theta > 1:
            found.append(("rope_theta", "must be above 1 with position=rotary"))
        if self.local_rope_theta is None:
            return found
        if not self.local_rope_theta > 1:
            found.append(("local_rope_theta", "must be null or above 1"))
        if not any(self.attention_windows or ()):
            found.append(("local_rope_theta", "has no effect without attention_windows; set it to null"))
        return found


def known_vocab(vocab_size: int | None) -> int:
    """Embedding rows. Raises ``ConfigError`` while the tokenizer is not known."""
    if vocab_size is None:
        raise ConfigError(
            "the vocabulary size is not known yet",
            where="model.vocab_size",
            fix="set it, or train a tokenizer first",
        )
    return vocab_size


def vocab_for(vocab_size: int | None, tokenizer_vocab_size: int) -> int:
    """Embedding rows for a tokenizer: its size rounded up, or the size set by hand where it is large enough."""
    if vocab_size is None:
        return round_up(tokenizer_vocab_size, VOCAB_MULTIPLE)
    if vocab_size < tokenizer_vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer_vocab_size} ids, the model only {vocab_size} embedding rows",
            where="model.vocab_size",
            fix=f"set it to null or to at least {tokenizer_vocab_size}",
        )
    return vocab_size


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
