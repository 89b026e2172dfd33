"""A tokenizer whose pieces are chosen by a pattern, and tasks as their recipes have them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkit.config.choices import recipes_dir
from llmkit.config.targets import resolve
from llmkit.config.yaml_file import read_yaml
from llmkit.task_interface import Question

BOS, EOS, PAD = 0, 1, 2
WORDS = r" ?\w+|\n| ?[^\w\s]+|\s"


class PatternTokenizer:
    """Implements ``interfaces.Tokenizer``: every match of the pattern is a piece, numbered when it is first met."""

    eos_id, pad_id, fingerprint = EOS, PAD, "pattern"

    def __init__(self, pattern: str = WORDS, bos_id: int | None = BOS) -> None:
        self._pattern, self.bos_id = re.compile(pattern), bos_id
        self._pieces: list[str] = ["", "", ""]

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def encode_spans(
        self, text: str, plain: Sequence[tuple[int, int]] | None = None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        found = list(self._pattern.finditer(text))
        return [self._id(match[0]) for match in found], [match.span() for match in found]

    def encode(self, text: str) -> list[int]:
        return self.encode_spans(text)[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._pieces[i] for i in ids)

    def _id(self, piece: str) -> int:
        if piece not in self._pieces[PAD + 1 :]:
            self._pieces.append(piece)
        return self._pieces.index(piece, PAD + 1)

    def token_ids(self) -> Any:
        raise AssertionError("tasks do not ask for it")

    def render_chat(self, messages: Any, *, add_generation_prompt: bool) -> str:
        raise AssertionError("no chat here")

    def save(self, folder: Path) -> None:
        raise AssertionError("nothing to save")


def task(name: str, **changes: Any) -> Any:
    """The task of ``recipes/task/NAME.yaml``."""
    fields = {**read_yaml(recipes_dir() / "task" / f"{name}.yaml").tree, **changes}
    return resolve(fields.pop("_target_"))(**fields)


def ask(task: Any, answered: bool = True, **fields: Any) -> Question:
    """The one question of a record."""
    (example,) = task.read(fields, answered=answered)
    return Question(example, "file:1", 0)


def written(row: Any, tokenizer: Any) -> str:
    """The text that a decoder's row trains, or that is the target of an encoder-decoder's; without the end token."""
    ids = row.answer.target if row.answer.trained is None else row.ids[row.answer.trained]
    assert ids[-1] == tokenizer.eos_id
    return str(tokenizer.decode([int(i) for i in ids[:-1]])).strip()
