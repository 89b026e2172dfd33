"""Hooks after an evaluation, for things that need the model and are no part of the training loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from llmkit.interfaces import RunInfo, Tokenizer
from llmkit.settings import GenerationConfig, Range
from llmkit.tracking.logs import visible

logger = logging.getLogger(__name__)


def write_samples(step: int, run: RunInfo, make: Callable[[], str]) -> None:
    """``samples/step_N.txt`` in the run folder, and the log. A failure is a warning, since a sample is worth no run."""
    try:
        text = make()
        path = run.folder / "samples" / f"step_{step}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        logger.info("samples at step %d:\n%s", step, text.rstrip())
    except Exception as error:  # out of memory, a full disk, a tokenizer that cannot read the prompt ...
        logger.warning("no samples at step %d: %s: %s", step, type(error).__name__, error)


@dataclass(frozen=True)
class FillMasks:
    """Shows what an encoder puts in place of the masks of a few prompts, after each evaluation.

    ``tokenizer`` is given when the node is built; no YAML can hold it.
    """

    prompts: list[str]
    candidates: Annotated[int, Range(1)]
    tokenizer: Tokenizer | None = None

    def on_evaluation(self, step: int, model: Any, run: RunInfo) -> None:
        """Write the fillings of ``step``."""
        write_samples(step, run, lambda: self.sample(model))

    def sample(self, model: Any) -> str:
        """Each prompt, and under it a line a mask."""
        from llmkit.mask_filling import fill_masks

        if self.tokenizer is None:
            raise ValueError("FillMasks was built without a tokenizer")
        where = next(model.parameters()).device
        filled = fill_masks(model, self.tokenizer, self.prompts, self.candidates, device=where)
        lines: list[str] = []
        for prompt, masks in zip(self.prompts, filled, strict=True):
            shown = ("  ".join(f"{visible(text)} {p:.3f}" for text, p in candidates) for candidates in masks)
            lines += [prompt, *(f"  mask {number}: {line}" for number, line in enumerate(shown, 1))]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class SampleText:
    """Continues a few prompts after each evaluation: ``samples/step_N.txt`` in the run folder, and the log.

    The same seed each time, so that two steps differ by their weights alone. ``tokenizer`` is given when the node is
    built; no YAML can hold it.
    """

    prompts: list[str]
    max_new_tokens: Annotated[int, Range(1)]
    temperature: Annotated[float, Range(0)]
    top_k: Annotated[int | None, Range(1)]
    seed: Annotated[int, Range(0, 2**63 - 1)]
    tokenizer: Tokenizer | None = None

    def on_evaluation(self, step: int, model: Any, run: RunInfo) -> None:
        """Write the samples of ``step``. Neither the model's mode nor any random state of the training changes."""
        write_samples(step, run, lambda: self.sample(model))

    def sample(self, model: Any) -> str:
        """Each prompt with its continuation, control characters spelt out, separated by ``---``."""
        from llmkit.generation import generate

        if self.tokenizer is None:
            raise ValueError("SampleText was built without a tokenizer")
        where = next(model.parameters()).device
        completions = generate(model, self.tokenizer, self.prompts, self._settings(), device=where)
        pairs = zip(self.prompts, completions, strict=True)
        return "\n---\n".join(visible(prompt + completion) for prompt, completion in pairs) + "\n"

    def _settings(self) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=None,
            repetition_penalty=1.0,
            no_repeat_ngram_size=None,
            n_beams=1,
            length_penalty=1.0,
            stop=[],
            seed=self.seed,
            use_cache=True,
        )
