"""Text from a decoder or an encoder-decoder: greedy or sampled, alone, in a batch, or streamed.

The order of the filters is that of ``transformers``: repetition penalty, temperature, top-k, top-p. A row's result
depends on its prompt and the seed only, not on the other rows: each row has its own random numbers, one a token.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from llmkit.errors import NumericsError
from llmkit.interfaces import NO_DOCUMENT, Tokenizer
from llmkit.seq2seq_generation import Seq2SeqModel, condition
from llmkit.settings import GenerationConfig

log = logging.getLogger("llmkit.generation")

CONTEXT_TOKENS = 8  # of the prompt, decoded with the first new tokens: how a token reads depends on those before it
INCOMPLETE = "\ufffd"  # what the bytes of an unfinished character decode to


class LanguageModel(Protocol):
    """A decoder with a cache (``llmkit.models.decoder.Decoder``)."""

    @property
    def max_seq_len(self) -> int: ...
    def __call__(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        document_ids_BT: Tensor | None,
        cache: Any,
        /,
        *,
        last_only: bool,
    ) -> Tensor: ...
    def new_cache(self, batch_size: int, max_len: int) -> Any: ...
    def modules(self) -> Iterator[torch.nn.Module]: ...


class Vocabulary(Protocol):
    """Of a tokenizer, what it takes to read ids as they come."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    def decode(self, ids: Sequence[int]) -> str: ...


def generate(
    model: LanguageModel | Seq2SeqModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: GenerationConfig,
    *,
    device: torch.device | str,
) -> list[str]:
    """The continuation of each prompt, without the prompt, up to the end token, a stop text or a limit.

    A prompt longer than the model's window loses its beginning, and a full window ends a row: both with a warning that
    says how many. An encoder-decoder reads the prompt with its encoder (see ``seq2seq_generation``). Equal prompts get
    different samples. Raises ``NumericsError`` when the model gives NaN.
    """
    writer, reader, rows = _prepare(model, tokenizer, prompts, settings, device)
    streams = [_text_stream(reader, row, settings, model.max_seq_len) for row in rows]
    texts = [""] * len(rows)
    with _evaluating(writer), closing(_tokens(writer, rows, prompts, reader, settings, device)) as steps:
        while not all(stream.ended for stream in streams):
            for i, token in enumerate(next(steps)):
                texts[i] += streams[i].feed(token)
    _report_full(streams, settings.max_new_tokens)
    return [text + stream.finish() for text, stream in zip(texts, streams, strict=True)]


def stream(
    model: LanguageModel | Seq2SeqModel,
    tokenizer: Tokenizer,
    prompt: str,
    settings: GenerationConfig,
    *,
    device: torch.device | str,
) -> Iterator[str]:
    """What ``generate`` gives for the prompt, in pieces as soon as they are certain (see ``TextStream``)."""
    writer, reader, rows = _prepare(model, tokenizer, [prompt], settings, device)
    text = _text_stream(reader, rows[0], settings, model.max_seq_len)
    with _evaluating(writer), closing(_tokens(writer, rows, [prompt], reader, settings, device)) as steps:
        while not text.ended:
            if piece := text.feed(next(steps)[0]):
                yield piece
    _report_full([text], settings.max_new_tokens)
    if piece := text.finish():
        yield piece


def _prepare(
    model: LanguageModel | Seq2SeqModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: GenerationConfig,
    device: torch.device | str,
) -> tuple[LanguageModel, Vocabulary, list[list[int]]]:
    """What writes, what reads the ids, and the rows that are continued."""
    if isinstance(model, Seq2SeqModel):
        return condition(model, tokenizer, prompts, device)
    return model, tokenizer, _read_prompts(tokenizer, prompts, model.max_seq_len, settings.max_new_tokens)


# -- text -----------------------------------------------------------------------------------------------------------


class TextStream:
    """Ids in, text out, as early as it is certain.

    Held back are the bytes of an unfinished character, and text that may turn out to be the beginning of a stop text.
    """

    def __init__(self, tokenizer: Vocabulary, prompt_ids: Sequence[int], stop: Sequence[str], limit: int) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._ids = list(prompt_ids)
        self._shown = len(self._ids)  # ids before it are in the text that was given out
        self._context = max(0, self._shown - CONTEXT_TOKENS)  # where decoding starts
        self._held = ""
        self.n_tokens, self.limit = 0, limit
        self.ended = self.stopped = False  # stopped: by a stop text

    def feed(self, token: int) -> str:
        """Text that became certain with one more id. Nothing comes after the end token, a stop text or the limit."""
        if self.ended:
            return ""
        self.n_tokens += 1
        is_end = token == self._tokenizer.eos_id
        self.ended = is_end or self.n_tokens == self.limit
        if is_end:
            return ""
        self._ids.append(token)
        return self._release(self._new_text())

    def finish(self) -> str:
        """What is still held back; bytes that never became a character show as U+FFFD."""
        text = "" if self.stopped else self._release(self._new_text(final=True))
        held, self._held = self._held, ""
        return text + held

    def _new_text(self, *, final: bool = False) -> str:
        """The text of the ids not given out yet; none while it ends within a character."""
        before = self._tokenizer.decode(self._ids[self._context : self._shown])
        text = self._tokenizer.decode(self._ids[self._context :])
        if len(text) <= len(before) or (text.endswith(INCOMPLETE) and not final):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def _release(self, text: str) -> str:
        """Add text; give out what cannot belong to a stop text, and all before one that is complete."""
        self._held += text
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            self.ended = self.stopped = True
            free, self._held = self._held[: min(places)], ""
            return free
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        free, self._held = self._held[:cut], self._held[cut:]
        return free


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _text_stream(tokenizer: Vocabulary, row: list[int], settings: GenerationConfig, max_seq_len: int) -> TextStream:
    room = max_seq_len - len(row) + 1  # the last new token need not be read
    return TextStream(tokenizer, row, settings.stop, min(settings.max_new_tokens, room))


def _report_full(streams: Sequence[TextStream], max_new_tokens: int) -> None:
    full = sum(stream.n_tokens == stream.limit < max_new_tokens for stream in streams)
    if full:
        log.warning(
            "%d of %d texts ended before max_new_tokens=%d: the model's window was full",
            full,
            len(streams),
            max_new_tokens,
        )


def _read_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str], max_seq_len: int, max_new_tokens: int
) -> list[list[int]]:
    """Ids of the prompts, begun like a document. Of one longer than the window the last ids stay, with a warning."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    rows = [begin + ids or [tokenizer.eos_id] for ids in tokenizer.encode_batch(prompts)]
    kept = max(max_seq_len - max_new_tokens, max_seq_len // 2, 1)
    dropped = [len(row) - kept for row in rows if len(row) > max_seq_len]
    if dropped:
        log.warning(
            "%d of %d prompts are longer than the model's %d tokens: the last %d of each were read, %d before them not",
            *(len(dropped), len(rows), max_seq_len, kept, sum(dropped)),
        )
    return [row[-kept:] if len(row) > max_seq_len else row for row in rows]


# -- tokens ---------------------------------------------------------------------------------------------------------


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def _tokens(
    model: LanguageModel,
    rows: Sequence[Sequence[int]],
    prompts: Sequence[str],
    tokenizer: Vocabulary,
    settings: GenerationConfig,
    device: torch.device | str,
) -> Generator[list[int], None, None]:
    """The next id of every row, step by step without end."""
    ids_BT, position_ids_BT, document_ids_BT = _left_padded(rows, tokenizer.pad_id, device)
    sampler = Sampler(settings, _seeds(prompts, settings.seed), rows, tokenizer.vocab_size)
    width = ids_BT.shape[1] + settings.max_new_tokens
    cache = model.new_cache(len(rows), width) if settings.use_cache else None
    while True:
        logits_BV = model(ids_BT, position_ids_BT, document_ids_BT, cache, last_only=True)[:, -1].float()
        next_B = sampler.pick(logits_BV)
        yield next_B.tolist()
        position_B1 = (position_ids_BT[:, -1:] + 1).clamp(max=model.max_seq_len - 1)  # rows at the limit have ended
        if cache is not None:
            ids_BT, position_ids_BT, document_ids_BT = next_B[:, None], position_B1, None
        else:
            ids_BT = torch.cat((ids_BT, next_B[:, None]), dim=1)
            position_ids_BT = torch.cat((position_ids_BT, position_B1), dim=1)
            document_ids_BT = None if document_ids_BT is None else torch.nn.functional.pad(document_ids_BT, (0, 1))


def _left_padded(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, positions and documents BT. Padding is on the left, so that every row's next token is in the same column."""
    width = max(map(len, rows))
    pads = [width - len(row) for row in rows]
    ids = torch.tensor([[pad_id] * n + list(row) for n, row in zip(pads, rows, strict=True)], device=device)
    columns = torch.arange(width, device=device) - torch.tensor(pads, device=device)[:, None]
    documents = torch.where(columns < 0, NO_DOCUMENT, 0)
    return ids, columns.clamp(min=0), documents if any(pads) else None


def _seeds(prompts: Sequence[str], seed: int) -> list[int]:
    """One seed a row: the same for every prompt, counted up where a prompt comes again."""
    before: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append(seed + before[prompt])
        before[prompt] += 1
    return seeds


# -- sampling -------------------------------------------------------------------------------------------------------


class Sampler:
    """Chooses the next id of every row from its logits."""

    def __init__(
        self, settings: GenerationConfig, seeds: Sequence[int], rows: Sequence[Sequence[int]], vocab_size: int
    ) -> None:
        self.settings, self.vocab_size = settings, vocab_size
        self.generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
        self.seen_BV = torch.zeros(len(rows), vocab_size, dtype=torch.bool)
        for seen, row in zip(self.seen_BV, rows, strict=True):
            seen[torch.tensor(row)] = True

    def pick(self, logits_BV: Tensor) -> Tensor:
        """The next ids; never one that the tokenizer does not know (the embedding may have more rows)."""
        settings, logits_BV = self.settings, logits_BV[:, : self.vocab_size]
        if bool(logits_BV.isnan().any()):
            raise NumericsError(
                "the model's logits are not numbers", fix="use an earlier checkpoint, or precision fp32"
            )
        self.seen_BV = self.seen_BV.to(logits_BV.device)
        if settings.repetition_penalty != 1:
            logits_BV = penalize(logits_BV, self.seen_BV, settings.repetition_penalty)
        next_B = logits_BV.argmax(-1) if settings.temperature == 0 else self._draw(logits_BV)
        self.seen_BV.scatter_(1, next_B[:, None], True)
        return next_B

    def _draw(self, logits_BV: Tensor) -> Tensor:
        """One uniform number a row, looked up in the cumulative probabilities."""
        settings = self.settings
        logits_BV = logits_BV / settings.temperature
        if settings.top_k is not None:
            logits_BV = keep_top_k(logits_BV, settings.top_k)
        if settings.top_p is not None:
            logits_BV = keep_top_p(logits_BV, settings.top_p)
        exact_BV = logits_BV.cpu() if logits_BV.device.type == "mps" else logits_BV  # MPS has no fp64
        cumulative_BV = exact_BV.double().softmax(-1).cumsum(-1)
        uniform_B1 = torch.stack([torch.rand(1, generator=g) for g in self.generators]).to(exact_BV.device)
        # right: the first id whose cumulative probability exceeds the number, so never one of probability 0
        next_B1 = torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True)
        return next_B1.squeeze(1).to(logits_BV.device)


def penalize(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make ids that are already there less likely: logits divided by ``penalty``, or multiplied where negative.

    Keskar et al. 2019 (CTRL), section 4.1, in the form ``transformers`` gives it.
    """
    return torch.where(seen_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """The ``k`` largest logits of a row, and those equal to the smallest of them; the others become -inf."""
    smallest_B1 = logits_BV.topk(min(k, logits_BV.shape[1])).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < smallest_B1, float("-inf"))


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """The fewest likeliest ids whose probabilities reach ``p`` (Holtzman et al. 2020), at least one."""
    sorted_BV, order_BV = logits_BV.sort(descending=False)
    tail_BV = sorted_BV.softmax(-1).cumsum(-1) <= 1 - p
    tail_BV[:, -1] = False
    return logits_BV.masked_fill(tail_BV.scatter(1, order_BV, tail_BV), float("-inf"))
