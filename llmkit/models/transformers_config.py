"""Any text architecture of ``transformers`` as data. Free of torch and of transformers until something is counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmkit.models.config import Problems, known_vocab, vocab_for

if TYPE_CHECKING:
    from pathlib import Path

    from llmkit.models.transformers_build import Counts
    from llmkit.models.transformers_model import Wrapped

KEY = "transformers"  # in the ``llmkit`` key of a config.json: the task of a wrapped model
KINDS = {"causal_lm": "decoder", "masked_lm": "encoder", "seq2seq_lm": "encoder_decoder"}

# Of a config that llmkit did not write, keys that choose code, files or number formats instead of an architecture.
NOT_SETTINGS: tuple[str, ...] = (
    "auto_map",
    "custom_pipelines",
    "custom_generate",
    "fusion_config",
    "distributed_config",
)
NOT_SETTINGS += ("transformers_weights", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "llmkit")


@dataclass(frozen=True)
class TransformersConfig:
    """An ``AutoModelFor...`` of ``transformers`` in llmkit's engine, for architectures that llmkit has no table of.

    ``settings`` are fields of the architecture's own config class under their names there; sizes that are not among
    them have that class's defaults. ``vocab_size`` and ``max_seq_len`` are written into the fields of that meaning.
    """

    with_init: ClassVar[tuple[str, ...]] = ("task", "max_seq_len")  # fields that are read beside ``init``

    task: Literal["causal_lm", "masked_lm", "seq2seq_lm"]
    model_type: str | None
    settings: dict[str, Any]
    vocab_size: int | None
    max_seq_len: int

    @property
    def kind(self) -> str:
        """``decoder``, ``encoder`` or ``encoder_decoder``."""
        return KINDS[self.task]

    @property
    def vocab_rows(self) -> int:
        """V; raises ``ConfigError`` while the tokenizer is not known."""
        return known_vocab(self.vocab_size)

    @property
    def d_model(self) -> int:
        """D: the width of the states that the output matrix reads."""
        return self.counts.d_model

    def with_vocab(self, tokenizer_vocab_size: int) -> TransformersConfig:
        """The same model with room for every id of the tokenizer; a size set by hand is kept if it is large enough.

        Raises ``ConfigError`` for a setting that the architecture does not have: ``transformers`` would ignore it.
        """
        from llmkit.models.transformers_build import check_settings

        check_settings(self)
        return replace(self, vocab_size=vocab_for(self.vocab_size, tokenizer_vocab_size))

    def with_special_ids(self, bos_id: int | None, eos_id: int, pad_id: int) -> TransformersConfig:
        """The same model told the ids that some architectures treat apart; those in ``settings`` stay.

        Several train no embedding for the pad id, so there is none where the vocabulary ends texts with it.
        """
        ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": None if pad_id == eos_id else pad_id}
        if self.kind == "encoder_decoder":
            ids["decoder_start_token_id"] = pad_id  # what llmkit's objectives begin a target with
        return replace(self, settings=ids | self.settings)

    # -- counts -------------------------------------------------------------------------------------------------

    @cached_property
    def counts(self) -> Counts:
        """Taken from the module itself, built without memory. Errors as ``build``."""
        from llmkit.models.transformers_build import counts_of

        return counts_of(self)

    def n_params(self) -> int:
        """All trainable parameters, exactly; shared ones count once."""
        return self.counts.n_params

    def n_params_without_embeddings(self) -> int:
        """Parameters outside embedding tables and the output matrix."""
        return self.counts.n_params - self.counts.lookups

    def matmul_params(self) -> int:
        """Parameters of all matrices and the output matrix, tied or not. Experts that a token skips are counted too."""
        return self.counts.encoder_matrices + self.counts.decoder_matrices + self.head_params()

    def head_params(self) -> int:
        """Parameters of the output matrix, which only predicted tokens pass."""
        return self.vocab_rows * self.d_model

    def flops_per_token(self, seq_len: int, target_len: int = 0) -> int:
        """FLOPs of a training token, forward and backward: ``6 N + 12 L D T`` (Kaplan et al. 2020, section 2.1).

        N is ``matmul_params()``, the second term is full attention in each of L layers, left out where the
        architecture names no attention heads. With a target, T = ``target_len`` and S = ``seq_len``, the mean over all
        tokens of both sides, each through its own side's matrices.
        """
        counts, S, T = self.counts, seq_len, target_len
        if not T:
            return 6 * self.matmul_params() + counts.attention_width * 12 * S
        matrices = S * counts.encoder_matrices + T * (counts.decoder_matrices + self.head_params())
        attention = counts.attention_width * 12 * (S * S + T * T + T * S) // 2  # half of the layers on either side
        return (6 * matrices + attention) // (S + T)

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
        """Rough peak of what the backward pass needs, for the plan of a run (parameters not included).

        17 values a token, layer and unit of width (Korthikanti et al. 2022, section 4.1, without the scores, which a
        fused attention does not keep), for as many positions as the batch has: documents of unequal length are padded
        to less than twice that.
        """
        counts, tokens = self.counts, batch_size * (seq_len + (target_len or 0))
        layer = 17 * tokens * counts.width * value_bytes
        stream = tokens * counts.width * 4
        layers = counts.n_layers * stream + layer if checkpointing else counts.n_layers * layer
        return layers + 2 * stream + logit_rows * self.vocab_rows * (4 + value_bytes)

    def hf_architecture(self) -> str | None:
        """The class of ``transformers`` that is wrapped."""
        return self.counts.architecture

    # -- checks and building ------------------------------------------------------------------------------------

    def problems(self) -> Problems:
        """Every value that is out of range: (field, message). What ``settings`` may hold, only ``build`` knows."""
        found = []
        if self.vocab_size is not None and self.vocab_size < 1:
            found.append(("vocab_size", "must be null or at least 1"))
        if self.max_seq_len < 1:
            found.append(("max_seq_len", "must be at least 1"))
        for name in sorted(self.settings.keys() & {"vocab_size", "quantization_config", *NOT_SETTINGS}):
            found.append(("settings", f"must not hold {name}"))
        return found

    def build(self) -> Wrapped:
        """The module without weights, and without memory for them: ``init_weights`` makes them.

        Raises ``ConfigError`` for an architecture or a setting that ``transformers`` does not know, ``SetupError`` when
        it is not installed.
        """
        from llmkit.models.transformers_model import WRAPPERS

        return WRAPPERS[self.task](self)

    def opened(self, folder: Path) -> TransformersConfig:
        """The config of the model in a Hugging Face folder, opened for ``task``; all else comes from the folder.

        ``max_seq_len`` counts where the architecture has no limit of its own. Raises ``CheckpointError``.
        """
        from llmkit.models.transformers_files import wrapped_config

        return wrapped_config(folder, self)

    def load(self, folder: Path, *, seed: int) -> Wrapped:
        """The model of that folder in fp32; ``seed`` draws a head that the files lack. Raises ``CheckpointError``."""
        from llmkit.models.transformers_files import load_wrapped

        return load_wrapped(folder, self, seed=seed)


def is_wrapped(raw: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` was written for a wrapped model."""
    ours = raw.get("llmkit")
    return isinstance(ours, dict) and KEY in ours
