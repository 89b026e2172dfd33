"""The thin waist: what the parts of llmkit know of one another.

Components (models, objectives, tokenizers, data, generation, tracking) import this module and never each other.

Shape legend, the same letters in every file (a tensor's suffix is its shape, ``q_BHTK``)::

    B batch   T target length   S source or cached length   D d_model   H heads   G key/value heads
    K per-head width   F feed-forward width   V vocabulary   L layers   P packed rows (B*T flattened)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, device

IGNORE_INDEX = -100  # a label that is not counted
NO_DOCUMENT = -1  # the document id of padding


class Tokenizer(Protocol):
    """Text to ids and back. Ids are ``0 .. vocab_size - 1``."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None:
        """Put before every document; None where the tokenizer's files put nothing there."""

    @property
    def bos_token_id(self) -> int | None:
        """The begin symbol, whether rows begin with it or not: chat templates write it, ``config.json`` names it."""

    @property
    def eos_id(self) -> int:
        """Ends every document; never produced by ``encode``."""

    @property
    def pad_id(self) -> int: ...
    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the ids."""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` alone: no special token is added, and none is recognised inside the text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def encode_spans(
        self, text: str, plain: Sequence[tuple[int, int]] | None = None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """``encode(text)``, and for each id the characters ``start:stop`` of ``text`` it stands for.

        Spans never go back; an id without text of its own (a prefix space that the tokenizer adds) has an empty one.
        ``plain`` not None: names of special tokens are those tokens, save where they touch one of these ranges of
        characters (what people wrote, between the marks of a chat template).
        """

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """The conversation as the model's chat template writes it. Raises ConfigError where there is no template."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out."""

    def token_ids(self) -> TokenIds:
        """What the objectives must know of the vocabulary."""

    def save(self, folder: Path) -> None:
        """Write the files from which ``transformers`` and ``load_tokenizer`` rebuild it."""


@dataclass(frozen=True)
class TokenIds:
    """The vocabulary as objectives see it. Roles that a tokenizer does not have are None or empty."""

    vocab_size: int
    bos_id: int | None  # [CLS] of a BERT vocabulary
    eos_id: int  # [SEP] of a BERT vocabulary
    pad_id: int
    mask_id: int | None
    sentinel_ids: tuple[int, ...]  # <extra_id_0>, <extra_id_1> ...: stand for a span taken out
    infill_ids: tuple[int, int, int] | None  # <fim_prefix>, <fim_suffix>, <fim_middle>
    special: NDArray[np.bool_]  # V: no text has these ids; never chosen, never drawn
    word_starts: NDArray[np.bool_]  # V: ids that begin a word; the others go on with the word before them


class Roles(Protocol):
    """The part of ``TokenIds`` that is known before a tokenizer is trained."""

    @property
    def mask_id(self) -> int | None: ...
    @property
    def sentinel_ids(self) -> tuple[int, ...]: ...
    @property
    def infill_ids(self) -> tuple[int, int, int] | None: ...


class Pair(NamedTuple):
    """Two segments in a row of ids: ``start .. second - 1`` and ``second .. stop - 1``, special tokens included.

    ``label`` says which of the objective's two answers is right; ``IGNORE_INDEX`` where there is only one segment.
    """

    start: int
    second: int
    stop: int
    label: int


class Answer(NamedTuple):
    """What a task's row has to say. Set is what the row's objective reads."""

    trained: NDArray[np.bool_] | None = None  # decoder, same length as the row's ids: those that are predicted
    target: NDArray[np.int64] | None = None  # encoder-decoder: what the decoder says, end token included
    label: int | None = None  # classification
    span: tuple[int, int] | None = None  # span QA: first and last id of the answer; (0, 0) is "no answer"
    second: int | None = None  # where the second segment begins (question and context), in models with segments
    n_cut: int = 0  # ids of the question that were left out to make the row fit


class Row(NamedTuple):
    """One sequence on its way into a batch, and all that random choices about it may depend on."""

    ids: NDArray[np.int64]
    seed: tuple[int, ...]  # (what names the epoch ..., row); in validation the same in every evaluation
    position: int | None = None  # sequences drawn before it in training; None in validation
    pairs: tuple[Pair, ...] = ()  # of sentence pairs, in order, without gaps
    answer: Answer | None = None  # of a task's row, which is one document: special tokens included

    def rng(self) -> np.random.Generator:
        """Random numbers of this row: the same whatever the batch, the process and the time."""
        import numpy

        return numpy.random.default_rng(self.seed)


class SequenceDataset(Protocol):
    """Token sequences of one split."""

    @property
    def n_sequences(self) -> int: ...
    @property
    def n_tokens(self) -> int: ...
    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the text behind the tokens: the divisor of bits per byte."""

    def row(self, index: int, seed: tuple[int, ...], position: int | None) -> Row:
        """Row ``index``; ``seed`` decides whatever is random about it."""


@dataclass(frozen=True)
class Tokens:
    """Packed token sequences without labels: what an encoder reads for its decoder."""

    input_ids: Tensor  # BS int64
    position_ids: Tensor  # BS int64, restart at 0 with every document
    document_ids: Tensor | None  # BS int64, NO_DOCUMENT at padding; the ids that the batch gives its targets


@dataclass(frozen=True)
class Examples:
    """What a task asks of whole rows of a batch, in the order of the rows. Places are in B*T flattened."""

    first_N: Tensor  # int64: the first token of each example
    last_N: Tensor  # int64: its last token
    labels: Tensor  # int64: N classes, or N2 places of the first and last token of the answer


@dataclass(frozen=True)
class Batch:
    """One micro-batch of packed sequences.

    ``labels[b, t]`` is the id that position ``t`` has to predict (already shifted), or ``IGNORE_INDEX``.
    ``document_ids`` is None when every row holds one document only. Counts are known on the host.
    """

    input_ids: Tensor  # BT int64
    labels: Tensor  # BT int64
    position_ids: Tensor  # BT int64, restart at 0 with every document
    document_ids: Tensor | None  # BT int64, NO_DOCUMENT at padding
    n_targets: int
    segment_ids: Tensor | None = None  # BT int64, 0 and 1 for the two segments of a pair
    source: Tokens | None = None  # encoder-decoder: what the targets are conditioned on
    pair_starts: Tensor | None = None  # N int64: the first token of every pair, in B*T flattened
    pair_labels: Tensor | None = None  # N int64, 0 or 1
    n_pairs: int = 0
    examples: Examples | None = None  # of tasks that ask one question a row
    n_examples: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """Targets of each loss, by the names of ``LossSum.losses``."""
        return {"token": self.n_targets, "pair": self.n_pairs, "example": self.n_examples}

    @property
    def n_tokens(self) -> int:
        """Positions that hold a token, on both sides; padding is not one."""
        return _n_tokens(self) + (0 if self.source is None else _n_tokens(self.source))

    @property
    def n_computed(self) -> int:
        """Positions that are computed, padding included."""
        return self.input_ids.numel() + (0 if self.source is None else self.source.input_ids.numel())

    def to(self, where: device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        moved: Batch = _mapped(self, lambda tensor: tensor.to(where, non_blocking=non_blocking))
        return moved

    def pinned(self) -> Batch:
        """The same batch in memory that a GPU copies from while it computes."""
        pinned: Batch = _mapped(self, lambda tensor: tensor.pin_memory())
        return pinned


def _n_tokens(side: Batch | Tokens) -> int:
    if side.document_ids is None:
        return side.input_ids.numel()
    return int((side.document_ids != NO_DOCUMENT).sum())


def _mapped(group: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass with its tensors, and those of dataclasses in it, changed."""
    changes = {}
    for field in fields(group):
        value = getattr(group, field.name)
        if is_dataclass(value):
            changes[field.name] = _mapped(value, change)
        elif hasattr(value, "to"):
            changes[field.name] = change(value)
    return replace(group, **changes)


class LossSum(NamedTuple):
    """What an objective returns: sums, never means. The engine divides once, over all micro-batches and ranks.

    ``losses`` are differentiated, each divided by its own count (``Batch.counts``). ``sums`` are extra scalars for
    the log, among them ``nll``, the plain negative log-likelihood in nats without smoothing or penalties.
    """

    losses: dict[str, Tensor]
    sums: dict[str, Tensor]


class Model(Protocol):
    """A model as the objectives see it."""

    @property
    def output_weight_VD(self) -> Tensor:
        """The matrix that turns output states into logits."""

    @property
    def output_bias_V(self) -> Tensor | None:
        """Added to the logits."""

    @property
    def logit_softcap(self) -> float | None:
        """Logits z become ``cap * tanh(z / cap)``, after the bias; None leaves them."""

    def hidden_states(self, batch: Batch) -> Tensor:
        """Final hidden states ``BTD`` at the positions of ``batch.labels``, after the last norm."""

    def output_states(self, hidden_PD: Tensor) -> Tensor:
        """What stands between hidden states and the output matrix: nothing in a decoder, BERT's transform in BERT."""

    def pair_logits(self, hidden_ND: Tensor) -> Tensor:
        """``N2`` from the states of each pair's first token; only of models with a pair head."""


class Objective(Protocol):
    """Turns rows into batches, and batches into a loss.

    ``trains``: the kinds of model it can train (``decoder``, ``encoder``, ``encoder_decoder``). ``reads``: the rows it
    wants, ``windows`` of running text, ``pairs`` of sentences, or ``ordered_pairs``, some of them swapped.
    ``scores_all_text``: every token of the text is predicted once, so that bits per byte mean something.
    """

    @property
    def trains(self) -> tuple[str, ...]: ...
    @property
    def reads(self) -> str: ...
    @property
    def scores_all_text(self) -> bool: ...

    @property
    def predicted_share(self) -> float:
        """Of the tokens that pass through an encoder, those that are predicted; 1 for other models."""

    def window(self, seq_len: int) -> tuple[int, int]:
        """(ids from one row to the next, ids a row shares with the next) for sequences of ``seq_len``."""

    def target_len(self, seq_len: int) -> int:
        """Decoder tokens a row, for encoder-decoders; 0 where there is one sequence only."""

    def lacks(self, ids: Roles, seq_len: int) -> tuple[str, str] | None:
        """(what the vocabulary lacks, how to mend it), or None when it has every symbol the objective writes."""

    def collate(self, rows: Sequence[Row], *, seq_len: int, ids: TokenIds) -> Batch: ...
    def loss(self, model: Model, batch: Batch) -> LossSum: ...

    @property
    def sum_names(self) -> tuple[str, ...]:
        """The names in ``LossSum.sums``, ``nll`` first."""

    def metrics(self, sums: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
        """Means from summed ``LossSum.sums`` and counts: ``loss``, by which checkpoints are compared, and others."""


class ModelConfig(Protocol):
    """An architecture as data: what commands, plan and checkpoints ask of it. Free of torch; a frozen dataclass."""

    @property
    def kind(self) -> str:
        """``decoder``, ``encoder`` or ``encoder_decoder``."""

    @property
    def max_seq_len(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def vocab_rows(self) -> int: ...
    def with_vocab(self, tokenizer_vocab_size: int) -> ModelConfig: ...
    def n_params(self) -> int: ...
    def n_params_without_embeddings(self) -> int: ...
    def matmul_params(self) -> int: ...
    def flops_per_token(self, seq_len: int, target_len: int = 0) -> int: ...
    def activation_bytes(
        self,
        batch_size: int,
        seq_len: int,
        *,
        value_bytes: int,
        checkpointing: bool,
        logit_rows: int,
        target_len: int | None = None,
    ) -> int: ...
    def hf_architecture(self) -> str | None: ...
    def problems(self) -> list[tuple[str, str]]: ...
    def build(self) -> Any: ...


class Schedule(Protocol):
    """Learning-rate factor as a pure function of the step."""

    def factor(self, step: int, max_steps: int) -> float:
        """Multiplier of the peak learning rate for update ``step`` in ``1 .. max_steps``."""


class Tracker(Protocol):
    """A destination of logged values. A tracker never raises into the training loop and never blocks it."""

    def start(self, run: RunInfo) -> None: ...
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def finish(self, status: str) -> None:
        """``status`` is ``finished``, ``stopped`` or ``failed``."""


class Callback(Protocol):
    """A hook after an evaluation; used for things that need the model and are not part of the loop."""

    def on_evaluation(self, step: int, model: Any, run: RunInfo) -> None: ...


@dataclass(frozen=True)
class RunInfo:
    """What trackers and callbacks may know of the run."""

    name: str
    folder: Path
    command: str  # pretrain, finetune ...
    config: Mapping[str, Any]  # resolved, plain
    max_steps: int
    facts: Mapping[str, Any]  # parameter count, data and tokenizer fingerprints, tokens per step, versions


class TokenizerSpec(Protocol):
    """The ``tokenizer`` node of a configuration: opens an existing tokenizer or trains one."""

    def symbols(self) -> list[str] | None:
        """The symbols that a trained tokenizer will have; None when an existing one is opened."""

    def open(self) -> Tokenizer | None:
        """The tokenizer at the node's ``path``; None when one must be trained."""

    def train(self, texts: Iterable[str], folder: Path) -> Tokenizer:
        """Train on ``texts`` and save into ``folder``."""

    def key(self) -> dict[str, Any]:
        """The settings that change the ids: a part of the cache key of prepared data."""
