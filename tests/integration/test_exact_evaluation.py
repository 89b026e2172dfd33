"""A validation score does not depend on how the work is laid out: batch sizes, processes. Every row counts once."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from llmkit.commands.finetuning import spread
from llmkit.task_interface import Question
from tests.integration.task_place import Place, row_of

N_VAL = 13  # divided by neither batch size nor number of processes
KINDS = [("sentiment", "encoder"), ("qa", "encoder"), ("translation", "encoder_decoder"), ("summarization", "decoder")]
ROUNDED = ("loss", "ppl")  # sums in another order


def settings(place: Place, task: str) -> list[str]:
    """The model knows enough for answers to differ from one another."""
    val = place.write(f"{task}-val", [row_of(task, i) for i in range(100, 100 + N_VAL)])
    return [f"data.val_path={val}", "optim.lr=1e-2", "engine.eval_every=null"]


def figures(place: Place, name: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
    answers = (place.run(name) / "samples" / "answers.jsonl").read_text().splitlines()
    return place.scores(name), [json.loads(line) for line in answers]


def assert_same(one: tuple[dict[str, float], Any], other: tuple[dict[str, float], Any]) -> None:
    assert one[0].keys() == other[0].keys()
    for name, value in one[0].items():
        assert other[0][name] == (pytest.approx(value, rel=1e-5) if name in ROUNDED else value), name
    assert one[1] == other[1]


@pytest.mark.parametrize(("task", "kind"), KINDS)
def test_batch_sizes_do_not_change_a_score(place: Place, task: str, kind: str) -> None:
    found = []
    for size in (1, 3, 16):
        name = f"exact-{task}-{size}"
        more = [*settings(place, task), f"engine.eval_batch_size={size}"]
        assert place.finetune(task, kind, name, *more) == 0
        found.append(figures(place, name))
        assert len(found[-1][1]) == N_VAL
        assert found[-1][0].get("n_examples", N_VAL) == N_VAL
    for other in found[1:]:
        assert_same(found[0], other)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "kind"), [*KINDS, ("sentiment", "encoder_decoder")])
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_processes_do_not_change_a_score(place: Place, task: str, kind: str, adapter: str) -> None:
    """Two processes take half of the rows each, and train the same: 13 rows are 7 and 6."""
    names = []
    for processes, accum in ((1, 2), (2, 1)):
        names.append(f"ranks-{task}-{kind}-{adapter}-{processes}")
        # without dropout, which differs from process to process
        model = copy_without_dropout(place, kind)
        more = [*settings(place, task), f"init={model}", "engine.micro_batch_size=2"]
        more += [f"engine.grad_accum_steps={accum}", f"adapter={adapter}"]
        more += ["adapter.r=4", "adapter.dropout=0.0"] if adapter == "lora" else []
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = place.command(task, None, names[-1], *more)
        words = [sys.executable, *(launcher if processes > 1 else []), "-m", "llmkit", *command]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (figures(place, name) for name in names)
    assert one[0]["n_targets"] == two[0]["n_targets"]
    assert one[0].keys() == two[0].keys()
    assert {name: two[0][name] for name in one[0]} == pytest.approx(one[0], rel=1e-4)
    assert one[1] == two[1]
    losses = [[row["train/loss"] for row in place.rows(name) if "train/loss" in row] for name in names]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def copy_without_dropout(place: Place, kind: str) -> str:
    from llmkit.models.hf import load_model, save_model
    from llmkit.tokenizers.load import load_tokenizer
    from llmkit.tokenizers.save import save_tokenizer

    folder = place.root / f"{kind}-plain"
    if not folder.exists():
        from dataclasses import replace

        model, tokenizer = load_model(place.model(kind)), load_tokenizer(place.model(kind))
        plain = replace(model.config, dropout=0.0).build()
        plain.load_state_dict(model.state_dict())
        save_model(plain, folder, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        save_tokenizer(tokenizer, folder, kind)
    return str(folder)


@pytest.mark.parametrize(("n", "numbers"), [(None, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4]), (2, [0, 2]), (1, [0])])
def test_some_questions_are_spread_over_all(n: int | None, numbers: list[int]) -> None:
    questions = [Question({}, "", number) for number in range(5)]
    assert [question.number for question in spread(questions, n)] == numbers
