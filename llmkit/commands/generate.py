"""``llmkit generate``: continue prompts with a trained model, or fill the masks in them."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch

from llmkit.commands.open_model import open_model, open_tokenizer
from llmkit.config.schema import GenerateConfig
from llmkit.data.loader import check_vocabulary
from llmkit.engine.device import AUTOCAST_DTYPE, pick_device, set_threads
from llmkit.engine.init import resolve_init
from llmkit.errors import ConfigError, DataError
from llmkit.generation import generate, stream
from llmkit.mask_filling import MASK_TEXTS, Candidates, fill_masks
from llmkit.models.heads import head_of
from llmkit.tracking.logs import visible

log = logging.getLogger("llmkit.generate")

SEPARATOR = "---"  # between the texts of several prompts


def run(cfg: GenerateConfig, args: argparse.Namespace) -> int:
    """Print prompt and continuation of each prompt; one prompt on a terminal is shown as it is written."""
    prompts = read_prompts(args)
    folder = resolve_init(cfg.init)
    device = pick_device(cfg.engine.device)
    set_threads(cfg.engine.n_threads)
    tokenizer = open_tokenizer(folder)
    model = open_model(folder, device=device, dtype=AUTOCAST_DTYPE.get(cfg.engine.precision, torch.float32))
    check_vocabulary(tokenizer.vocab_size, model.config.vocab_rows)
    if head_of(model) is not None:
        raise ConfigError("the model was fine-tuned to answer, and writes no text", where="init", fix="llmkit predict")
    if model.config.kind == "encoder_decoder":
        hint_at_sentinels(prompts, len(tokenizer.token_ids().sentinel_ids))
    if model.config.kind != "encoder" and len(prompts) == 1 and sys.stdout.isatty():
        _show(prompts[0], stream(model, tokenizer, prompts[0], cfg.generation, device=device))
        return 0
    size = cfg.engine.micro_batch_size
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        if model.config.kind == "encoder":
            answers = [_fillings(masks) for masks in fill_masks(model, tokenizer, batch, cfg.candidates, device=device)]
        else:
            answers = generate(model, tokenizer, batch, cfg.generation, device=device)
            if model.config.kind == "encoder_decoder":
                answers = [f"\n  {answer}" for answer in answers]  # a text of its own, not the end of the prompt
        for i, (prompt, answer) in enumerate(zip(batch, answers, strict=True), start):
            print(f"{SEPARATOR}\n{prompt}{answer}" if i else f"{prompt}{answer}", flush=True)
    return 0


def hint_at_sentinels(prompts: Sequence[str], n_sentinels: int) -> None:
    """A mask is plain text to an encoder-decoder: warn who wrote one, and say what such a model fills."""
    written = next((mask for mask in MASK_TEXTS for prompt in prompts if mask in prompt), None)
    if written is not None:
        what = (
            "write <extra_id_0>, then <extra_id_1> ..., where text is to be found"
            if n_sentinels
            else "it fills no gaps"
        )
        log.warning("this model reads %s as plain text: %s", written, what)


def _fillings(masks: Sequence[Candidates]) -> str:
    """A line a mask under its prompt: what may stand there, likeliest first."""
    shown = ("  ".join(f"{visible(text)} {probability:.3f}" for text, probability in mask) for mask in masks)
    return "".join(f"\n  mask {number}: {line}" for number, line in enumerate(shown, 1))


def read_prompts(args: argparse.Namespace) -> list[str]:
    """``--prompt`` (each one prompt), ``--prompt-file`` (one a line, - is standard input), else all standard input."""
    prompts = list(args.prompt or [])
    if args.prompt_file:
        prompts += _lines(args.prompt_file)
    elif not prompts and not sys.stdin.isatty():
        prompts = [text] if (text := sys.stdin.read().rstrip("\n")) else []
    if not prompts:
        raise ConfigError("there is no prompt", where="--prompt", fix="llmkit generate init=... --prompt 'Once upon'")
    return prompts


def _lines(name: str) -> list[str]:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the prompts cannot be read: {error}", where=name) from error
    return [line for line in text.splitlines() if line.strip()]


def _show(prompt: str, pieces: Iterator[str]) -> None:
    """On a terminal; control characters are spelt out, since a model may produce any."""
    for piece in chain([prompt], pieces):
        print(visible(piece), end="", flush=True)
    print()
