"""Hooks after an evaluation, for things that need the model and are no part of the training loop."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated, Any

from llmkit.interfaces import RunInfo, Tokenizer
from llmkit.settings import GenerationConfig, Range
from llmkit.tracking.logs import visible

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleText:
    """Continues a few prompts after each evaluation: ``samples/step_N.txt`` in the run folder, and the log.

    The same seed each time, so that two steps differ by their weights alone. ``tokenizer`` is given when the node is
    built; no YAML can hold it. A failure is a warning, since a sample is worth no run.
    """

    prompts: list[str]
    max_new_tokens: Annotated[int, Range(1)]
    temperature: Annotated[float, Range(0)]
    top_k: Annotated[int | None, Range(1)]
    seed: Annotated[int, Range(0, 2**63 - 1)]
    tokenizer: Tokenizer | None = None

    def on_evaluation(self, step: int, model: Any, run: RunInfo) -> None:
        """Write the samples of ``step``. Neither the model's mode nor any random state of the training changes."""
        try:
            text = self.sample(model)
            path = run.folder / "samples" / f"step_{step}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            logger.info("samples at step %d:\n%s", step, text.rstrip())
        except Exception as error:  # out of memory, a full disk, a tokenizer that cannot read the prompt ...
            logger.warning("no samples at step %d: %s: %s", step, type(error).__name__, error)

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
            stop=[],
            seed=self.seed,
            use_cache=True,
        )
