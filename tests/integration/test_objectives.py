"""Every objective with every family it trains keeps the promises: exact loss, exact resume, figures that come back.

The commands run as a user gives them, on a small text; packing and isolation have their own tests beside each part.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.cli import main
from llmkit.tracking.jsonl import read_metrics
from tests.pairs import PAIRS

COMMON = [
    "data.seq_len=48",
    "data.n_workers=1",
    "model.max_seq_len=64",
    "model.dropout=0.1",
    "engine.max_steps=4",
    "engine.n_threads=1",
    "engine.precision=fp32",
    "engine.log_every=1",
    "engine.eval_every=2",
    "engine.save_every=2",
    "optim.lr=1e-3",
    "schedule=constant",
    "schedule.warmup_steps=1",
    "callbacks=none",
    "tracking.wandb.mode=disabled",
]
NO_DROPOUT = ["model.dropout=0.0"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of some sentences each, with few words."""
    path = tmp_path_factory.mktemp("objectives") / "text.jsonl"
    names, verbs = ("The file", "A value", "This module", "Each line"), ("is read", "was closed", "has a name")
    rows = []
    for i in range(160):
        said = [f"{names[(i + k) % 4]} {i % 7} {verbs[(i * k) % 3]} before line {k + i % 5}." for k in range(3 + i % 6)]
        rows.append(json.dumps({"text": " ".join(said)}))
    path.write_text("\n".join(rows) + "\n")
    return path


def train(text: Path, name: str, pair: str, *overrides: str) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``, without what differs between any two runs."""
    command = ["pretrain", *PAIRS[pair], *COMMON, f"data.path={text}", "data.val_fraction=0.2"]
    command += [f"data.cache_dir={text.parent / 'cache'}", f"run.root={text.parent / 'runs'}", f"run.name={name}"]
    assert main([*command, *overrides]) == 0
    rows = read_metrics(text.parent / "runs" / name / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


def assert_close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], rel: float) -> None:
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for left, right in zip(ours, theirs, strict=True):
        for key, value in left.items():
            assert right[key] == pytest.approx(value, rel=rel, abs=1e-7), key


@pytest.mark.parametrize("pair", PAIRS)
def test_micro_batches_and_evaluation_batches_change_nothing(text: Path, pair: str) -> None:
    """8 x 1 and 2 x 4 micro-batches, whose counts of every kind of target differ; validation in batches of 8 and 3."""
    whole = train(text, f"{pair}-whole", pair, *NO_DROPOUT, "engine.micro_batch_size=8")
    parts = ["engine.micro_batch_size=2", "engine.grad_accum_steps=4", "engine.eval_batch_size=3"]
    assert_close(train(text, f"{pair}-parts", pair, *NO_DROPOUT, *parts), whole, rel=1e-4)
    assert whole[0]["train/objective"] == pytest.approx(
        train(text, f"{pair}-first", pair, *NO_DROPOUT, *parts, "engine.max_steps=1")[0]["train/objective"], rel=1e-6
    )


@pytest.mark.parametrize("pair", PAIRS)
def test_resume_repeats_the_unbroken_run(text: Path, pair: str) -> None:
    """Three starts against one: every figure, dropout and masks included, to the last bit."""
    unbroken = train(text, f"{pair}-unbroken", pair, "engine.micro_batch_size=4")
    for steps in (1, 3, 4):
        broken = train(text, f"{pair}-broken", pair, "engine.micro_batch_size=4", f"engine.max_steps={steps}")
    assert [row for row in broken if "train/loss" in row] == [row for row in unbroken if "train/loss" in row]
    last = [row for row in unbroken if "val/loss" in row][-1]
    assert [row for row in broken if "val/loss" in row][-1] == last


@pytest.mark.parametrize("pair", PAIRS)
def test_evaluate_repeats_the_validation_of_the_run(text: Path, pair: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without ``data.path``, on the run's own validation text: the same masks, pairs and figures."""
    rows = train(text, f"{pair}-scored", pair, "engine.micro_batch_size=4")
    capsys.readouterr()
    root = text.parent
    command = ["evaluate", f"init={root / 'runs' / f'{pair}-scored'}", "engine.micro_batch_size=5"]
    prepared = sorted((root / "cache").iterdir())
    assert main([*command, "pseudo_ppl_tokens=40"]) == 0
    assert sorted((root / "cache").iterdir()) == prepared, "the text was prepared once more"
    shown = json.loads(capsys.readouterr().out)
    trained = [row for row in rows if "val/loss" in row][-1]
    for name in (name for name in trained if name.startswith("val/")):
        assert shown[name] == pytest.approx(trained[name], rel=1e-5), name
    assert ("val/pseudo_ppl" in shown) == ("bert" in pair or pair.startswith(("next", "sentence")))
