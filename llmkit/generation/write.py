"""The ways to have a model write. A row's result depends on the row, the settings and the seed only, not on the other
rows; a prompt of text that comes again in a batch is the one exception."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from llmkit.errors import ConfigError
from llmkit.generation.beams import search
from llmkit.generation.choice import Sampler
from llmkit.generation.steps import LanguageModel, Steps, evaluating
from llmkit.generation.text import TextStream, Vocabulary
from llmkit.interfaces import Tokenizer
from llmkit.seq2seq_generation import SentinelText, Seq2SeqModel, condition, source_ids
from llmkit.settings import GenerationConfig

log = logging.getLogger("llmkit.generation")


@dataclass
class Job:
    """What is written, by what. ``seeds`` has as many for each row as texts are wanted of it."""

    writer: LanguageModel
    reader: Vocabulary
    rows: list[list[int]]
    seeds: list[list[int]]
    ends: Collection[int]
    settings: GenerationConfig
    device: torch.device | str

    def beginnings(self, n: int) -> list[TextStream]:
        """The reader of the text after each row, ``n`` times."""
        found = []
        for row in self.rows:
            room = self.writer.max_seq_len - len(row) + 1  # the last new token need not be read
            limit = min(self.settings.max_new_tokens, room)
            found += [TextStream(self.reader, row, self.settings.stop, limit, self.ends) for _ in range(n)]
        return found


def generate(
    model: LanguageModel | Seq2SeqModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: GenerationConfig,
    *,
    device: torch.device | str,
) -> list[str]:
    """The continuation of each prompt, without the prompt, up to an end token, a stop text or a limit.

    A prompt longer than the model's window loses its beginning, and a full window ends a row: both with a warning that
    says how many. An encoder-decoder reads the prompt with its encoder (see ``seq2seq_generation``). Equal prompts get
    different samples. Raises ``NumericsError`` when the model gives NaN.
    """
    return _collect(_text_job(model, tokenizer, prompts, settings, device), len(prompts))


def stream(
    model: LanguageModel | Seq2SeqModel,
    tokenizer: Tokenizer,
    prompt: str,
    settings: GenerationConfig,
    *,
    device: torch.device | str,
) -> Iterator[str]:
    """What ``generate`` gives for the prompt, in pieces as soon as they are certain (see ``TextStream``).

    Of a beam search nothing is certain before its end: then it is one piece.
    """
    with closing(_pieces(_text_job(model, tokenizer, [prompt], settings, device))) as pieces:
        yield from (piece for _, piece in pieces)


def generate_from_ids(
    model: LanguageModel | Seq2SeqModel,
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[int]],
    settings: GenerationConfig,
    *,
    device: torch.device | str,
    n_samples: int = 1,
    end_ids: Collection[int] = (),
) -> list[list[str]]:
    """``n_samples`` texts for each row of ids: what follows the row, or an encoder-decoder's answer to it.

    Special tokens are not shown. ``end_ids`` end a text as the end tokens of tokenizer and model do. Rows longer than
    the model's window are cut (a decoder's at the beginning), and a full window ends a text: both with a warning that
    says how many. Equal rows get equal samples, the first ones the same however many are asked for. Raises
    ``ConfigError`` where samples would all be the same, and ``NumericsError`` when the model gives NaN.
    """
    check_samples(settings, n_samples)
    texts = _collect(_ids_job(model, tokenizer, rows, settings, device, n_samples, end_ids), len(rows) * n_samples)
    return [texts[start : start + n_samples] for start in range(0, len(texts), n_samples)]


def stream_from_ids(
    model: LanguageModel | Seq2SeqModel,
    tokenizer: Tokenizer,
    row: list[int],
    settings: GenerationConfig,
    *,
    device: torch.device | str,
    end_ids: Collection[int] = (),
) -> Iterator[str]:
    """What ``generate_from_ids`` gives for the row, in pieces as ``stream`` does."""
    with closing(_pieces(_ids_job(model, tokenizer, [row], settings, device, 1, end_ids))) as pieces:
        yield from (piece for _, piece in pieces)


def check_samples(settings: GenerationConfig, n_samples: int) -> None:
    """Raises ``ConfigError`` where ``n_samples`` texts of a row cannot differ."""
    if n_samples == 1:
        return
    what = f"{n_samples} texts are wanted for each prompt, but "
    if settings.n_beams > 1:
        raise ConfigError(
            what + f"a search with {settings.n_beams} beams gives one",
            where="generation.n_beams",
            fix="set generation.n_beams=1 and raise generation.temperature",
        )
    if settings.temperature == 0:
        raise ConfigError(
            what + "at temperature 0 they are all the same",
            where="generation.temperature",
            fix="raise generation.temperature, to 0.8 for example",
        )


# -- prompts --------------------------------------------------------------------------------------------------------


def _text_job(
    model: LanguageModel | Seq2SeqModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: GenerationConfig,
    device: torch.device | str,
) -> Job:
    """Prompts are read as documents. Each has the same seed, counted up where a prompt comes again."""
    before: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append([settings.seed + before[prompt]])
        before[prompt] += 1
    ends = _ends(model, tokenizer)
    if isinstance(model, Seq2SeqModel):
        ids = tokenizer.token_ids()
        writer = condition(model, [source_ids(tokenizer, ids, prompt) for prompt in prompts], ids, device)
        reader, rows = SentinelText(tokenizer, ids.sentinel_ids), [[ids.pad_id] for _ in prompts]
        return Job(writer, reader, rows, seeds, ends, settings, device)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    rows = [begin + ids for ids in tokenizer.encode_batch(prompts)]
    rows = _fitting(rows, tokenizer.eos_id, model.max_seq_len, settings.max_new_tokens)
    return Job(model, tokenizer, rows, seeds, ends, settings, device)


def _ids_job(
    model: LanguageModel | Seq2SeqModel,
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[int]],
    settings: GenerationConfig,
    device: torch.device | str,
    n_samples: int,
    end_ids: Collection[int],
) -> Job:
    seeds = [[_seed(settings.seed, row, number) for number in range(n_samples)] for row in rows]
    ends = _ends(model, tokenizer) | {*end_ids}
    if isinstance(model, Seq2SeqModel):
        ids = tokenizer.token_ids()
        writer = condition(model, rows, ids, device)
        return Job(writer, tokenizer, [[ids.pad_id] for _ in rows], seeds, ends, settings, device)
    fitting = _fitting(rows, tokenizer.eos_id, model.max_seq_len, settings.max_new_tokens)
    return Job(model, tokenizer, fitting, seeds, ends, settings, device)


def _ends(model: object, tokenizer: Tokenizer) -> set[int]:
    """Every token that ends a text: the tokenizer's, and those that the files of the model name (``end_ids``)."""
    return {tokenizer.eos_id, *getattr(model, "end_ids", ())}


def _seed(seed: int, row: Sequence[int], number: int) -> int:
    """Of a row's sample: rows that differ do not share their luck."""
    digest = hashlib.sha256(f"{seed} {number} {[*map(int, row)]}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _fitting(rows: Sequence[Sequence[int]], eos_id: int, max_seq_len: int, max_new_tokens: int) -> list[list[int]]:
    """Of a row longer than the window the last ids stay, with a warning. An empty row is what follows a document."""
    kept = max(max_seq_len - max_new_tokens, max_seq_len // 2, 1)
    dropped = [len(row) - kept for row in rows if len(row) > max_seq_len]
    if dropped:
        log.warning(
            "%d of %d prompts are longer than the model's %d tokens: the last %d of each were read, %d before them not",
            *(len(dropped), len(rows), max_seq_len, kept, sum(dropped)),
        )
    return [list(row[-kept:] if len(row) > max_seq_len else row) or [eos_id] for row in rows]


# -- texts ----------------------------------------------------------------------------------------------------------


def _collect(job: Job, n_texts: int) -> list[str]:
    texts = [""] * n_texts
    if texts:
        for place, piece in _pieces(job):
            texts[place] += piece
    return texts


@torch.no_grad()
def _pieces(job: Job) -> Generator[tuple[int, str], None, None]:
    """(number of the text, what comes next in it)"""
    with evaluating(job.writer):
        settings = job.settings
        shape = {"n_more": settings.max_new_tokens, "use_cache": settings.use_cache}
        steps = Steps(job.writer, job.rows, job.reader.pad_id, **shape, device=job.device)  # type: ignore[arg-type]
        yield from _searched(job, steps) if settings.n_beams > 1 else _sampled(job, steps)


def _searched(job: Job, steps: Steps) -> Generator[tuple[int, str], None, None]:
    """By beam search."""
    beginnings = job.beginnings(1)
    best = search(steps, job.rows, beginnings, job.settings, job.reader.vocab_size, job.ends)
    for number, (text, ids) in enumerate(zip(beginnings, best, strict=True)):
        yield number, "".join(map(text.feed, ids)) + text.finish()
    _report_full(beginnings, job.settings.max_new_tokens)


def _sampled(job: Job, steps: Steps) -> Generator[tuple[int, str], None, None]:
    """Token by token. Rows are read once for all their samples, and left out once half of those there have ended."""
    n_samples = len(job.seeds[0])
    texts = job.beginnings(n_samples)
    seeds = [seed for seeds in job.seeds for seed in seeds]
    rows = [row for row in job.rows for _ in range(n_samples)]
    sampler = Sampler(job.settings, seeds, rows, job.reader.vocab_size)
    logits_BV, numbers = steps.logits(), list(range(len(texts)))
    if n_samples > 1:
        rows_B = torch.arange(len(texts), device=logits_BV.device) // n_samples
        steps.keep(rows_B)
        logits_BV = logits_BV[rows_B]
    while True:
        next_B = sampler.pick(logits_BV)
        for number, token in zip(numbers, next_B.tolist(), strict=True):
            if piece := texts[number].feed(token):
                yield number, piece
        going = [row for row, number in enumerate(numbers) if not texts[number].ended]
        if not going:
            break
        if 2 * len(going) <= len(numbers):
            rows_B, numbers = torch.tensor(going, device=next_B.device), [numbers[row] for row in going]
            steps.keep(rows_B)
            sampler.keep(rows_B)
            next_B = next_B[rows_B]
        steps.append(next_B)
        logits_BV = steps.logits()
    _report_full(texts, job.settings.max_new_tokens)
    yield from ((number, piece) for number, text in enumerate(texts) if (piece := text.finish()))


def _report_full(texts: Sequence[TextStream], max_new_tokens: int) -> None:
    full = sum(text.n_tokens == text.limit < max_new_tokens for text in texts)
    if full:
        log.warning(
            "%d of %d texts ended before max_new_tokens=%d: the model's window was full",
            *(full, len(texts), max_new_tokens),
        )
