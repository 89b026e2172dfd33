"""Tiny models of three families and tiny rows of six tasks, for runs that take less than a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkit.cli import main
from llmkit.config.build import build
from llmkit.config.compose import compose
from llmkit.engine.init import resolve_init
from llmkit.models.hf import save_model
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.save import save_tokenizer
from llmkit.tracking.jsonl import read_metrics

SHORT = [
    "engine.max_steps=4",
    "engine.micro_batch_size=4",
    "engine.n_threads=1",
    "engine.precision=fp32",
    "engine.device=cpu",
    "engine.log_every=1",
    "engine.eval_every=2",
    "schedule.warmup_steps=1",
    "optim.lr=3e-3",
    "generation.max_new_tokens=4",
    "tracking=none",
]
SIZES = ["model.d_model=32", "model.n_layers=2", "model.n_heads=2", "model.max_seq_len=64", "model.dropout=0.1"]
FAMILIES = {
    "decoder": ["model=gpt2", "tokenizer=bpe", "tokenizer.vocab_size=330"],
    "encoder": ["model=bert", "tokenizer=wordpiece", "tokenizer.vocab_size=90"],
    "encoder_decoder": ["model=t5", "tokenizer=bpe", "tokenizer.vocab_size=330"],
}
PROMPTS = {  # short ones, since models take 64 tokens
    "qa": ["task.decoder_prompt='{context} {question}'", "task.source_prompt='{question} {context}'", "task.stride=4"],
    "summarization": ["task.decoder_prompt='{document}:'", "task.source_prompt='{document}'"],
}
COLOURS = ("red", "blue", "green")
N_ROWS = 40


def row_of(task: str, i: int) -> dict[str, Any]:
    """Row ``i`` of a task; no two are alike."""
    colour = COLOURS[i % 3]
    if task == "sentiment":
        return {"text": f"the food number {i} was {('bad', 'good')[i % 2]}", "label": ("negative", "positive")[i % 2]}
    if task == "qa":
        answers = {"text": [colour], "answer_start": [len(f"box {i} is ")]}
        return {"question": f"what is box {i}?", "context": f"box {i} is {colour}, I say", "answers": answers}
    if task == "summarization":
        return {"document": f"It rained for {i} days. The sea rose.", "summary": f"{i} days of rain"}
    if task == "translation":
        return {"en": f"the house {i}", "de": f"das Haus {i}"}
    if task == "code":
        return {"prompt": f"add {i} to x", "code": f"def f(x):\n    return x + {i}"}
    said = [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"well: {i}"}]
    return {"messages": said}


TASKS = ("sentiment", "qa", "summarization", "translation", "code", "chat")


class Place:
    """Models, rows and runs in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for task in TASKS:
            self.write(task, [row_of(task, i) for i in range(N_ROWS)])
        for kind in FAMILIES:
            self._make_model(kind)

    def write(self, name: str, rows: Sequence[dict[str, Any]]) -> Path:
        path = self.root / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def _make_model(self, kind: str) -> None:
        plain = compose("pretrain", [*FAMILIES[kind], *SIZES]).plain
        texts = [" ".join(map(str, row_of(task, i).values())) for task in TASKS for i in range(N_ROWS)]
        build(plain["tokenizer"]).train(texts, self.root / f"{kind}-tokenizer")
        tokenizer = load_tokenizer(self.root / f"{kind}-tokenizer")
        model = build(plain["model"]).with_vocab(tokenizer.vocab_size).build()
        model.init_weights(0)
        special = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
        save_model(model, self.model(kind), **special)
        save_tokenizer(tokenizer, self.model(kind), kind)

    def model(self, kind: str) -> Path:
        return self.root / kind

    def run(self, name: str) -> Path:
        return self.root / "runs" / name

    def command(self, task: str, kind: str | None, name: str, *more: str) -> list[str]:
        """The words of a short run; ``kind`` None names no ``init``."""
        init = [] if kind is None else [f"init={self.model(kind)}"]
        places = [f"data.path={self.root / task}.jsonl", f"run.root={self.root / 'runs'}", f"run.name={name}"]
        is_split = not any(word.startswith("data.val_path=") for word in more)
        settings = [*SHORT, *["data.val_fraction=0.2"][:is_split], *PROMPTS.get(task, [])]
        return without_repeats(["finetune", f"task={task}", *init, *places, *settings, *more])

    def finetune(self, task: str, kind: str | None, name: str, *more: str) -> int:
        return main(self.command(task, kind, name, *more))

    def done(self, task: str, kind: str, *more: str) -> Path:
        """The folder of a finished run; an equal one is used again."""
        name = "-".join([task, kind, *(word.replace("=", ".").replace("/", ".") for word in more)])
        if not (self.run(name) / "result.json").is_file():
            assert self.finetune(task, kind, name, *more) == 0
        return self.run(name)

    def rows(self, name: str) -> list[dict[str, Any]]:
        return read_metrics(self.run(name) / "metrics.jsonl")

    def scores(self, name: str) -> dict[str, float]:
        """The last evaluation's."""
        row = next(row for row in reversed(self.rows(name)) if "val/loss" in row)
        return {key.removeprefix("val/"): value for key, value in row.items() if key.startswith("val/")}

    def best_scores(self, name: str) -> dict[str, float]:
        """Those of the checkpoint that ``init=<run>`` opens."""
        step = int(opened_model(self.run(name)).parent.name.removeprefix("step_"))
        row = next(row for row in self.rows(name) if row["step"] == step and "val/loss" in row)
        return {key.removeprefix("val/"): value for key, value in row.items() if key.startswith("val/")}


def without_repeats(words: list[str]) -> list[str]:
    """The last value of every key; a key may be given once."""
    return list({word.partition("=")[0]: word for word in words}.values())


def newest_model(run: Path) -> Path:
    """The model in a run's last checkpoint."""
    steps = sorted((run / "checkpoints").glob("step_*"), key=lambda folder: int(folder.name[5:]))
    return steps[-1] / "model"


def opened_model(run: Path) -> Path:
    """The model that ``init=<run>`` opens: that of the best checkpoint."""
    return resolve_init(str(run))
