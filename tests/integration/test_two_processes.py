"""Two gloo processes under torchrun against one process: the same samples, the same curve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.pairs import PAIRS

TINY = [
    "data=python_docs",
    "data.seq_len=32",
    "data.n_workers=1",
    "tokenizer.vocab_size=512",
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.n_kv_heads=1",
    "model.d_ff=64",
    "engine.max_steps=20",
    "engine.micro_batch_size=2",
    "engine.n_threads=1",
    "engine.precision=fp32",
    "engine.log_every=1",
    "engine.eval_every=10",
    "engine.device=cpu",
    "callbacks=none",
    "tracking.wandb.mode=disabled",
]


SHORT = [
    "data=python_docs",
    "data.seq_len=64",
    "data.n_workers=1",
    "engine.max_steps=6",
    "engine.micro_batch_size=2",
    "engine.n_threads=1",
    "engine.precision=fp32",
    "engine.log_every=1",
    "engine.eval_every=3",
    "schedule.warmup_steps=2",
    "engine.device=cpu",
    "callbacks=none",
    "tracking.wandb.mode=disabled",
]
SLOW = ("masked_lm-modern_bert", "sentence_order-albert", "span_corruption-lstm", "prefix_lm-bart")
OBJECTIVES = [
    "next_sentence-bert",
    "span_corruption-t5",
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
]


def launch(
    root: Path, name: str, processes: int, *more: str, settings: Sequence[str] = TINY
) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "llmkit", "pretrain", *settings, f"run.root={root}", f"run.name={name}"]
    return subprocess.run([*command, *more], capture_output=True, text=True, timeout=300)


def curve(root: Path, name: str) -> dict[int, dict[str, float]]:
    rows: dict[int, dict[str, float]] = {}
    for line in (root / name / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["step"], {}).update(row)
    return rows


def test_twenty_steps_equal_one_process(tmp_path: Path) -> None:
    one = launch(tmp_path, "one", 1, "engine.grad_accum_steps=4")
    two = launch(tmp_path, "two", 2, "engine.grad_accum_steps=2")
    assert one.returncode == 0, one.stderr[-2000:]
    assert two.returncode == 0, two.stderr[-2000:]
    single, double = curve(tmp_path, "one"), curve(tmp_path, "two")
    assert list(single) == list(double) == list(range(1, 21))
    for step, row in single.items():
        assert row["data/first_sample_id"] == double[step]["data/first_sample_id"]
        assert row["train/n_targets"] == double[step]["train/n_targets"]
        assert double[step]["train/loss"] == pytest.approx(row["train/loss"], rel=1e-5)
        assert double[step]["optim/grad_norm"] == pytest.approx(row["optim/grad_norm"], rel=1e-4)
    assert double[20]["val/loss"] == pytest.approx(single[20]["val/loss"], rel=1e-5)
    assert double[20]["val/n_targets"] == single[20]["val/n_targets"]


@pytest.mark.parametrize("pair", OBJECTIVES)
def test_masks_pairs_and_spans_equal_those_of_one_process(tmp_path: Path, pair: str) -> None:
    """Every count and every loss, in training and in validation: the same rows are asked the same questions."""
    settings = [*PAIRS[pair], *SHORT, "tokenizer.vocab_size=512", "model.dropout=0.0"]
    one = launch(tmp_path, "one", 1, "engine.grad_accum_steps=2", settings=settings)
    two = launch(tmp_path, "two", 2, "engine.grad_accum_steps=1", settings=settings)
    assert one.returncode == 0, one.stderr[-2000:]
    assert two.returncode == 0, two.stderr[-2000:]
    single, double = curve(tmp_path, "one"), curve(tmp_path, "two")
    assert list(single) == list(double) == list(range(1, 7))
    for step, row in single.items():
        compared = {key: value for key, value in row.items() if key.startswith(("train/", "val/", "data/"))}
        assert {"train/loss", "train/n_targets"} <= compared.keys()
        assert {key: double[step][key] for key in compared} == pytest.approx(compared, rel=1e-5)
    assert "val/n_targets" in single[6]


def test_resume_on_one_process_what_two_began(tmp_path: Path) -> None:
    """The same samples on another number of processes, and the global batch is kept without being asked."""
    whole = launch(tmp_path, "whole", 1, "engine.grad_accum_steps=2")
    first = launch(tmp_path, "moved", 2, "engine.grad_accum_steps=1", "engine.max_hours=1e-9")
    assert whole.returncode == first.returncode == 0, first.stderr[-2000:]
    second = launch(tmp_path, "moved", 1, "engine.grad_accum_steps=1")
    assert second.returncode == 0, second.stderr[-2000:]
    expected, moved = curve(tmp_path, "whole"), curve(tmp_path, "moved")
    for step, row in expected.items():
        assert moved[step]["data/first_sample_id"] == row["data/first_sample_id"]
        assert moved[step]["train/loss"] == pytest.approx(row["train/loss"], rel=1e-5)


def test_launch_without_world_size_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmkit", "pretrain", *TINY, f"run.root={tmp_path}", "run.name=solo"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"SLURM_NTASKS": "2"}, timeout=120)
    assert done.returncode == 7
    assert "SLURM_NTASKS=2" in done.stderr
    assert "Traceback" not in done.stderr
