"""The thin waist: what the parts of llmkit know of one another.

Components (models, objectives, tokenizers, data, generation, tracking) import this module and never each other.

Shape legend, the same letters in every file (a tensor's suffix is its shape, ``q_BHTK``)::

    B batch   T target length   S source or cached length   D d_model   H heads   G key/value heads
    K per-head width   F feed-forward width   V vocabulary   L layers   P packed rows (B*T flattened)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
        """Put before every document when the vocabulary has it."""

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
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out."""

    def save(self, folder: Path) -> None:
        """Write the files from which ``transformers`` and ``load_tokenizer`` rebuild it."""


class SequenceDataset(Protocol):
    """Token sequences of one split. Row ``i`` is the window ``[i * seq_len, (i + 1) * seq_len]``, ends included."""

    @property
    def n_sequences(self) -> int: ...
    @property
    def n_tokens(self) -> int: ...
    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the text behind the tokens: the divisor of bits per byte."""

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """At most ``seq_len + 1`` ids: the inputs and one more, so that every token is a target exactly once."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of packed sequences.

    ``labels[b, t]`` is the id that position ``t`` has to predict (already shifted), or ``IGNORE_INDEX``.
    ``document_ids`` is None when every row holds one document only. ``n_targets`` is known on the host.
    """

    input_ids: Tensor  # BT int64
    labels: Tensor  # BT int64
    position_ids: Tensor  # BT int64, restart at 0 with every document
    document_ids: Tensor | None  # BT int64, NO_DOCUMENT at padding
    n_targets: int

    def to(self, where: device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(where, non_blocking=non_blocking)

        documents = None if self.document_ids is None else move(self.document_ids)
        return Batch(move(self.input_ids), move(self.labels), move(self.position_ids), documents, self.n_targets)


class LossSum(NamedTuple):
    """What an objective returns: sums, never means. The engine divides once, over all micro-batches and ranks.

    ``loss`` is differentiated; ``sums`` are extra scalars for the log, among them ``nll``, the plain negative
    log-likelihood in nats without smoothing or penalties.
    """

    loss: Tensor
    sums: dict[str, Tensor]


class Model(Protocol):
    """A decoder as the objectives and the generator see it."""

    @property
    def output_weight_VD(self) -> Tensor:
        """The matrix that turns hidden states into logits."""

    def hidden_states(self, batch: Batch) -> Tensor:
        """Final hidden states ``BTD``, after the last norm."""


class Objective(Protocol):
    """Turns token windows into batches, and batches into a loss."""

    def collate(self, rows: Sequence[NDArray[np.int64]], *, seq_len: int, eos_id: int, pad_id: int) -> Batch: ...
    def loss(self, model: Model, batch: Batch) -> LossSum: ...


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

    def open(self) -> Tokenizer | None:
        """The tokenizer at the node's ``path``; None when one must be trained."""

    def train(self, texts: Iterable[str], folder: Path) -> Tokenizer:
        """Train on ``texts`` and save into ``folder``."""

    def key(self) -> dict[str, Any]:
        """The settings that change the ids: a part of the cache key of prepared data."""
