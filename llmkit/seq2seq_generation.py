"""An encoder-decoder and its prompts in the shape of a decoder: the encoder reads the prompt, the text starts anew.

Sentinels such as ``<extra_id_0>`` count as such in prompts and are shown in texts, so that a model that was trained
with span corruption fills the gaps of a prompt.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from llmkit.interfaces import NO_DOCUMENT, TokenIds, Tokenizer, Tokens

log = logging.getLogger("llmkit.generation")

# The space before a sentinel belongs to the word it stands for: vocabularies hold words with the space before them
_SENTINEL = re.compile(r" ?<extra_id_(\d+)>")
_WORD = "a"  # stands for what is before a sentinel, when the text after it is encoded or decoded


@runtime_checkable
class Seq2SeqModel(Protocol):
    """A model that continues a target for a source (``llmkit.models.encoder_decoder.EncoderDecoder``)."""

    @property
    def max_seq_len(self) -> int: ...
    def encode(self, source: Tokens) -> Any:
        """What the decoder needs of the source."""

    def decode(
        self,
        memory: Any,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        document_ids_BT: Tensor | None,
        cache: Any,
        /,
        *,
        last_only: bool,
    ) -> Tensor: ...
    def new_cache(self, memory: Any, max_len: int) -> Any: ...
    def modules(self) -> Iterator[torch.nn.Module]: ...


class Conditioned:
    """An encoder-decoder with one source a row, as a decoder. Sources are encoded once, when they are first needed."""

    def __init__(self, model: Seq2SeqModel, source: Tokens) -> None:
        self._model, self._source = model, source
        self._sources_B = torch.arange(len(source.input_ids))  # that each row reads

    @property
    def max_seq_len(self) -> int:
        return self._model.max_seq_len

    def __call__(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        document_ids_BT: Tensor | None,
        cache: Any,
        /,
        *,
        last_only: bool,
    ) -> Tensor:
        return self._model.decode(
            self._memory, input_ids_BT, position_ids_BT, document_ids_BT, cache, last_only=last_only
        )

    def new_cache(self, batch_size: int, max_len: int) -> Any:
        return self._model.new_cache(self._memory, max_len)

    def modules(self) -> Iterator[torch.nn.Module]:
        return self._model.modules()

    def keep(self, rows_B: Tensor) -> None:
        """Go on with these of the rows, in this order; one may be there several times."""
        sources_B = self._sources_B.to(rows_B.device)[rows_B]
        if not torch.equal(sources_B, self._sources_B.to(rows_B.device)):
            self._memory = self._memory.of_rows(rows_B)
        self._sources_B = sources_B

    @cached_property
    def _memory(self) -> Any:
        return self._model.encode(self._source)


class SentinelText:
    """A tokenizer whose texts show sentinels."""

    def __init__(self, tokenizer: Tokenizer, sentinel_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._names = {index: f"<extra_id_{number}>" for number, index in enumerate(sentinel_ids)}
        self._before = tokenizer.encode(_WORD)
        self.vocab_size, self.eos_id, self.pad_id = tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens but sentinels left out."""
        parts: list[str] = []
        for is_sentinel, run in groupby(ids, self._names.__contains__):
            if is_sentinel:
                parts += [self._names[i] for i in run]
            elif parts:
                before = self._tokenizer.decode(self._before)
                parts.append(self._tokenizer.decode([*self._before, *run])[len(before) :])
            else:
                parts.append(self._tokenizer.decode(list(run)))
        return "".join(parts)


def condition(
    model: Seq2SeqModel, rows: Sequence[Sequence[int]], ids: TokenIds, device: torch.device | str
) -> Conditioned:
    """The model with ``rows`` as its sources; its own rows start with the pad id.

    Of a source that is longer than the model's window the first ids and the end token are read, with a warning that
    says how many are not. An empty one is an end token.
    """
    limit = model.max_seq_len
    dropped = [len(row) - limit for row in rows if len(row) > limit]
    if dropped:
        log.warning(
            "%d of %d prompts are longer than the model's %d tokens: their last tokens, %d in all, were not read",
            *(len(dropped), len(rows), limit, sum(dropped)),
        )
    rows = [row if len(row) <= limit else [*row[: limit - 1], ids.eos_id] for row in rows]
    return Conditioned(model, _right_padded([row or [ids.eos_id] for row in rows], ids.pad_id, device))


def source_ids(tokenizer: Tokenizer, ids: TokenIds, prompt: str) -> list[int]:
    """A prompt as a document, its sentinels recognised: those that the vocabulary has."""
    row, start = [] if ids.bos_id is None else [ids.bos_id], 0
    for found in _SENTINEL.finditer(prompt):
        number = int(found[1])
        if number < len(ids.sentinel_ids):
            row += _part(tokenizer, prompt[start : found.start()], after_sentinel=start > 0)
            row.append(ids.sentinel_ids[number])
            start = found.end()
    return [*row, *_part(tokenizer, prompt[start:], after_sentinel=start > 0), ids.eos_id]


def _part(tokenizer: Tokenizer, text: str, *, after_sentinel: bool) -> list[int]:
    """Ids of a part of a prompt; after a sentinel as they would be after a word, where that changes no id of it."""
    if not after_sentinel or not text:
        return tokenizer.encode(text)
    before, both = tokenizer.encode_batch([_WORD, _WORD + text])
    return both[len(before) :] if both[: len(before)] == before else tokenizer.encode(text)


def _right_padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> Tokens:
    """One document a row."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    columns = torch.arange(max(map(len, rows), default=0)).expand(len(rows), -1)
    real = columns < lengths[:, None]
    ids = torch.full(columns.shape, pad_id)
    ids[real] = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
    documents = None if bool(real.all()) else torch.where(real, 0, NO_DOCUMENT).to(device)
    return Tokens(ids.to(device), (columns * real).to(device), documents)
