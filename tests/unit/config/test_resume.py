"""What may change when a run goes on, and what may not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from llmkit.config.check import known_keys
from llmkit.config.compose import compose
from llmkit.config.resume import LENGTH, SAFE, newest_step
from llmkit.config.yaml_file import dump
from llmkit.redact import redact
from tests.unit.config.helpers import checked, problems

START = ["schedule=wsd", "engine.max_steps=1000", "run.name=a"]


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    """The command line of a run that has a checkpoint at step 600."""
    line = [*START, f"run.root={tmp_path}"]
    return started(tmp_path, line, 600)


def started(root: Path, line: list[str], step: int) -> list[str]:
    cfg = checked(*line)
    (root / "a" / "checkpoints" / f"step_{step}").mkdir(parents=True)
    (root / "a" / "checkpoints" / ".tmp-step-9999-x").mkdir()
    (root / "a" / "config.yaml").write_text(dump(redact(asdict(cfg))))
    return line


def test_the_same_line_goes_on(line: list[str], tmp_path: Path) -> None:
    assert newest_step(tmp_path / "a") == 600
    assert newest_step(tmp_path / "b") is None
    assert problems(*line) == {}
    assert problems(*line, "optim.lr='1e-3'", "engine.max_steps=1e3", "run.resume=must") == {}


CHANGED = {
    "run.name": None,
    "run.root": None,  # these name the folder itself
    "run.resume": "must",
    "engine.max_hours": "2",
    "engine.micro_batch_size": "8",
    "engine.grad_accum_steps": "2",
    "engine.device": "cpu",
    "engine.n_threads": "1",
    "engine.compile": "true",
    "engine.fp32_matmul": "medium",
    "engine.attention": "matmul",
    "engine.memory": "low",
    "engine.log_every": "1",
    "engine.eval_every": "null",
    "engine.eval_batch_size": "3",
    "engine.save_every": "7",
    "engine.keep_last": "3",
    "engine.keep_best": "false",
    "engine.patience": "3",
    "engine.on_nonfinite": "skip",
    "engine.max_skipped_steps": "5",
    "engine.timeout_minutes": "3",
    "data.old_val_path": None,  # needs init
    "data.n_workers": "1",
    "data.cache_dir": "x",
    "loss.chunk_size": None,  # these are finetune's
    "data.max_answers": None,
    "generation": None,
    "objective.chunk_size": "64",
    "callbacks": "none",
    "tracking": "none",
}


def test_what_does_not_change_the_numbers_may_change(line: list[str]) -> None:
    assert set(CHANGED) == set(SAFE)
    assert problems(*line, *(f"{path}={value}" for path, value in CHANGED.items() if value)) == {}


OTHER = {
    "init": "x", "run.seed": "1", "optim": "muon", "schedule": "cosine", "model": "gpt2", "tokenizer": "unigram",
    "data": "python_source", "engine.precision": "bf16", "engine.max_grad_norm": "2", "data.seq_len": "128",
    "data.path": "x", "data.weights": "[1]", "data.val_path": "x", "data.val_fraction": "0.1", "data.text_field": "x",
    "data.max_document_bytes": "99", "data.max_line_bytes": "9999", "data.max_bad_fraction": "0.5",
    "data.deduplicate": "true", "optim.lr": "1", "optim.betas": "[0,0]", "optim.eps": "1", "optim.weight_decay": "1",
    "optim.layer_decay": "0.5",
    "schedule.warmup_steps": "1", "schedule.min_lr_ratio": "0", "schedule.decay_fraction": "0.5",
    "objective.label_smoothing": "0.1", "objective.z_loss": "0.1", "model.d_model": "128", "model.dropout": "0.1",
    "tokenizer.vocab_size": "512", "add_tokens": "[a]",
    "engine.best_metric": "accuracy",
}  # fmt: skip


@pytest.mark.parametrize("key", OTHER)
def test_what_changes_the_numbers_is_refused_with_both_values(line: list[str], key: str) -> None:
    found = problems(*line, f"{key}={OTHER[key]}")
    assert found
    assert all(path == key or path.startswith(key.split(".")[0]) for path in found)
    if key in found:
        assert "was started with" in found[key].what
        assert "run.name" in found[key].fix


def test_every_key_is_safe_a_length_or_tried_above() -> None:
    tried = {*OTHER, *CHANGED, *LENGTH}
    groups = ("model", "tokenizer", "tracking", "callbacks")
    keys = [key for key in known_keys(compose("pretrain", START)) if not key.startswith(tuple(f"{g}." for g in groups))]
    assert set(keys) <= tried


@pytest.mark.parametrize(
    ("schedule", "steps", "allowed"),
    [
        ("wsd", 2000, True),  # the decay had not begun: 80 % of 1000 steps lie after 600
        ("wsd", 700, False),  # it would have begun at 560
        ("constant", 2000, True),
        ("constant", 650, True),
        ("inverse_sqrt", 5000, True),
        ("cosine", 2000, False),
        ("linear", 1001, False),
    ],
)
def test_the_length_may_change_while_the_rates_so_far_do_not(
    tmp_path: Path, schedule: str, steps: int, allowed: bool
) -> None:
    line = started(
        tmp_path, [f"schedule={schedule}", "engine.max_steps=1000", "run.name=a", f"run.root={tmp_path}"], 600
    )
    found = problems(*line, f"engine.max_steps={steps}")
    assert (found == {}) == allowed
    if not allowed:
        assert "learning rates up to step 600" in found["engine.max_steps"].what


def test_a_length_in_tokens_needs_a_schedule_that_does_not_ask_for_it(tmp_path: Path) -> None:
    for name, allowed in (("constant", True), ("wsd", False)):
        root = tmp_path / name
        line = started(root, [f"schedule={name}", "engine.max_steps=1000", "run.name=a", f"run.root={root}"], 600)
        found = problems(*line, "engine.max_steps=null", "engine.max_epochs=3")
        assert (found == {}) == allowed


def test_never_and_must(line: list[str], tmp_path: Path) -> None:
    assert "already holds a run at step 600" in problems(*line, "run.resume=never")["run.resume"].what
    assert "no checkpoint" in problems(f"run.root={tmp_path}", "run.name=b", "run.resume=must")["run.resume"].what
    assert problems(f"run.root={tmp_path}", "run.name=b", "run.resume=never") == {}


def test_a_checkpoint_of_the_start_counts(tmp_path: Path) -> None:
    line = started(tmp_path, [*START, f"run.root={tmp_path}"], 0)
    assert "at step 0" in problems(*line, "run.resume=never")["run.resume"].what
    assert problems(*line, "engine.max_steps=50", "schedule.warmup_steps=20") == {}


def test_a_damaged_config_is_said_to_be_one(line: list[str], tmp_path: Path) -> None:
    (tmp_path / "a" / "config.yaml").write_text("a: [")
    assert "unreadable" in problems(*line)["run.name"].what


def test_masked_secrets_do_not_count_as_changes(tmp_path: Path) -> None:
    secret = "data.path='https://user:hunter22@host/x.txt'"
    line = started(tmp_path, [secret, "run.name=a", f"run.root={tmp_path}"], 5)
    assert "hunter22" not in (tmp_path / "a" / "config.yaml").read_text()
    assert problems(*line) == {}


def test_other_commands_do_not_look(line: list[str]) -> None:
    assert problems(*line, "optim.lr=1", command="prepare") == {}
