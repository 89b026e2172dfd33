"""The card of an export says what the run recorded, "not stated" for the rest, and nothing of the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkit.commands.exported import Subject
from llmkit.commands.model_card import NOT_STATED, read_run, write_card
from llmkit.commands.open_model import open_model, open_tokenizer
from tests.unit.commands.exporting import config, write_source

RUN = {
    "run": {"name": "notes", "root": "/srv/people/ann/runs", "seed": 1337},
    "init": None,
    "data": {"path": ["/srv/people/ann/diary.jsonl", "builtin:python_docs"], "val_path": None, "val_fraction": 0.01}
    | {"weights": [0.9, 0.1], "seq_len": 32},
    "objective": {"_target_": "llmkit.objectives.causal_lm.CausalLM", "z_loss": 0.0},
    "optim": {"_target_": "llmkit.engine.optim.AdamW", "lr": 0.001, "betas": [0.9, 0.95]},
    "schedule": {"_target_": "llmkit.engine.schedule.Cosine", "warmup_steps": 10},
    "engine": {"precision": "bf16"},
}
METRICS = [
    {"step": 4, "val/loss": 3.5, "train/loss": 3.7, "optim/lr": 0.1},
    {"step": 6, "val/loss": 3.25},
    {"step": 8, "val/loss": 2.0},
]


def write_run(root: Path, **changes: Any) -> Path:
    """A run folder with a checkpoint of step 6; returns the checkpoint's model folder."""
    checkpoint = root / "notes" / "checkpoints" / "step_6"
    model = write_source(checkpoint / "model", "llama")
    (root / "notes" / "config.yaml").write_text(yaml.safe_dump({**RUN, **changes}, sort_keys=False))
    (root / "notes" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    (root / "notes" / "environment.json").write_text(json.dumps({"host": "annspc", "gpus": [], "n_cpus": 4}))
    progress = {"n_tokens": 12288, "elapsed_seconds": 61.2}
    (checkpoint / "state.json").write_text(json.dumps({"progress": progress, "global_batch_size": 64}))
    (checkpoint / "manifest.json").write_text(json.dumps({"versions": {"llmkit": "0.1.0", "torch": "2.13.0"}}))
    return model


def card(source: Path, out: Path, init: str | None = None, **given: str) -> tuple[dict[str, Any], dict[str, str], str]:
    """Front matter, rows of all tables, text."""
    out.mkdir()
    cfg = config(init or source, out, **given)
    findings = [("greedy tokens", "32 of 32 equal")]
    write_card(cfg, source, Subject.of(open_model(source), open_tokenizer(source)), findings, out)
    text = (out / "README.md").read_text(encoding="utf-8")
    _, matter, body = text.split("---\n", 2)
    lines = [
        line.strip("| ").split(" | ", 1) for line in body.splitlines() if line.startswith("| ") and line != "| | |"
    ]
    return yaml.safe_load(matter), dict(lines), text


def test_a_run_is_described(tmp_path: Path) -> None:
    matter, rows, text = card(write_run(tmp_path), tmp_path / "out")
    assert matter == {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llmkit"],
    }
    assert "\n# notes\n" in text
    expected = {
        "architecture": "LlamaForCausalLM",
        "window": "48 tokens",
        "format": "hf, float32",
        "started from": "random weights",
        "text": "diary.jsonl, builtin:python_docs",
        "shares": "0.9, 0.1",
        "validation text": "1.0% of the documents",
        "objective": "CausalLM(z_loss=0.0)",
        "steps": "6",
        "tokens": "12,288",
        "batch": "64 sequences of 32 tokens",
        "optimizer": r"AdamW(lr=0.001, betas=\[0.9, 0.95\])",
        "schedule": "Cosine(warmup_steps=10)",
        "precision": "bf16",
        "seed": "1337",
        "hardware": "4 CPU cores",
        "time": "61 seconds",
        "software": "llmkit 0.1.0, torch 2.13.0",
        "val/loss": "3.25",
        "train/loss": "3.7",
        "weights": NOT_STATED,
        "training text": NOT_STATED,
        "language": NOT_STATED,
        "greedy tokens": "32 of 32 equal",
    }
    assert {name: rows[name] for name in expected} == expected
    assert "optim/lr" not in rows


TUNED = {
    "objective": None,
    "task": {"_target_": "llmkit.tasks.sentiment.Sentiment", "labels": None},
    "data": {"path": "/srv/people/ann/reviews.jsonl", "target_path": None, "val_path": None, "val_fraction": 0.1}
    | {"seq_len": None},
    "loss": {"label_smoothing": 0.1, "r_drop": 0.0},
    "freeze": {"n_layers": 2, "embeddings": False},
    "engine": {"precision": "fp32", "best_metric": None},
}
LOG = """2026-01-01 10:00:00 data: /srv/people/ann/old.jsonl: 10 questions; columns: text
2026-01-02 10:00:00 data: /srv/people/ann/reviews.jsonl: 1,200 questions; columns: text=review, label
2026-01-02 10:00:00 data: questions: 1,080 for training, 120 for validation
2026-01-02 10:00:01 training rows: 1,080 rows of 1,080 questions, 9,000 tokens
2026-01-02 10:00:01 training rows: left out: 3 too long (first: /srv/people/ann/reviews.jsonl:7)
2026-01-02 10:00:01 validation rows: 120 rows of 120 questions, 1,000 tokens
"""


def write_tuned_run(root: Path, best_step: int, **changes: Any) -> Path:
    model = write_run(root, **{**TUNED, **changes})
    (root / "notes" / "train.log").write_text(LOG)
    state = json.loads((model.parent / "state.json").read_text())
    state["progress"]["best_step"] = best_step
    (model.parent / "state.json").write_text(json.dumps(state))
    return model


def test_a_fine_tuned_run_is_described(tmp_path: Path) -> None:
    _, rows, text = card(write_tuned_run(tmp_path, best_step=4), tmp_path / "out")
    expected = {
        "task": "Sentiment(labels=None)",
        "answers with": "text",
        "rows": "reviews.jsonl",
        "columns": "text=review, label",
        "questions": "1,080 for training, 120 for validation",
        "training rows": "1,080 rows of 1,080 questions, 9,000 tokens",
        "validation rows": "120 rows of 120 questions, 1,000 tokens",
        "held out": "10.0% of the rows",
        "loss": "label_smoothing=0.1, r_drop=0.0",
        "frozen": "n_layers=2, embeddings=False",
        "batch": "64 rows of at most 48 tokens",
        "val/loss": "3.25",
        "best step": "4, by val/accuracy",
        "val/loss at step 4": "3.5",
        "train/loss at step 4": "3.7",
    }
    assert {name: rows[name] for name in expected} == expected
    assert "objective" not in rows
    assert "ann" not in text


def test_the_best_step_itself(tmp_path: Path) -> None:
    """Its metrics stand once; and a task that is unknown to this version is no reason to fail."""
    changes = {"task": {"_target_": "llmkit.tasks.gone.Gone"}}
    _, rows, _ = card(write_tuned_run(tmp_path, best_step=6, **changes), tmp_path / "out")
    assert rows["best step"] == "6, by val/loss"
    assert rows["task"] == "Gone()"
    assert not [name for name in rows if " at step " in name]


def test_rows_that_come_with_llmkit(tmp_path: Path) -> None:
    data = {**TUNED["data"], "path": None}  # type: ignore[dict-item]
    _, rows, _ = card(write_tuned_run(tmp_path, best_step=6, data=data), tmp_path / "out")
    assert rows["rows"].startswith("the rows that come with llmkit")


def test_nothing_of_the_machine(tmp_path: Path) -> None:
    _, _, text = card(write_run(tmp_path), tmp_path / "out")
    for private in ("ann", "srv", "people", str(tmp_path)):
        assert private not in text.replace("pytest", ""), private


def test_what_the_user_says(tmp_path: Path) -> None:
    given = {"license": "apache-2.0", "data_license": "cc-by-4.0", "language": "en"}
    matter, rows, _ = card(write_run(tmp_path), tmp_path / "out", **given)
    assert (matter["license"], matter["language"]) == ("apache-2.0", "en")
    assert (rows["weights"], rows["training text"], rows["language"]) == ("apache-2.0", "cc-by-4.0", "en")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    source = write_source(tmp_path / "base", "bert", "wordpiece")
    matter, rows, text = card(source, tmp_path / "out")
    assert matter["pipeline_tag"] == "fill-mask"
    assert "base_model" not in matter
    assert "# base\n" in text
    assert rows["started from"] == "base"
    for name in (
        "text",
        "validation text",
        "objective",
        "steps",
        "tokens",
        "optimizer",
        "seed",
        "software",
        "validation",
    ):
        assert rows[name] == NOT_STATED, name
    assert "AutoModelForMaskedLM" in text


def test_the_licence_of_what_it_started_from(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# Base\n---\nlicense: none\n---\n")
    source = write_run(tmp_path, init=str(base))
    matter, rows, _ = card(source, tmp_path / "out")
    assert (matter["license"], rows["started from"]) == ("mit", "base")
    matter, _, _ = card(source, tmp_path / "other", license="apache-2.0")
    assert matter["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "text",
    ["no front matter", "---\n[1\n---\n", "---\n- x\n---\n", "---\nlicense: [1]\n---\n", "---\nlicense: mit\n", "\0"],
)
def test_a_card_that_says_nothing_readable(tmp_path: Path, text: str) -> None:
    source = write_source(tmp_path / "base", "llama")
    (source / "README.md").write_text(text)
    matter, _, _ = card(source, tmp_path / "out")
    assert matter["license"] == "unknown"


def test_a_hub_id_is_the_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the hub's cache has: a folder that was renamed since has the same form."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    source = write_run(tmp_path, init="owner/small@v1")
    matter, rows, _ = card(source, tmp_path / "first")
    assert "base_model" not in matter
    (tmp_path / "hub" / "models--owner--small").mkdir(parents=True)
    matter, rows, _ = card(source, tmp_path / "second")
    assert (matter["base_model"], rows["started from"]) == ("owner/small", "owner/small@v1")


def test_words_cannot_break_out_of_their_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "s3cr3t-v4lue")
    hostile = "x | <script>alert(1)</script>\n# heading\n[click](http://evil) s3cr3t-v4lue"
    _, rows, text = card(write_run(tmp_path), tmp_path / "out", data_license=hostile)
    assert "<script" not in text
    assert "\n# heading" not in text
    assert "[click](" not in text.replace(r"\[click\](", "")
    assert rows["training text"].startswith(r"x \| &lt;script>")
    assert "s3cr3t" not in text


def test_a_damaged_run_leaves_gaps(tmp_path: Path) -> None:
    source = write_run(tmp_path)
    folder = tmp_path / "notes"
    (folder / "metrics.jsonl").write_text("{\n{}\n")
    (folder / "environment.json").write_text("[")
    (source.parent / "state.json").unlink()
    run = read_run(source)
    assert (run.step, run.metrics, run.state, run.machine) == (6, {}, {}, {})
    _, rows, _ = card(source, tmp_path / "out")
    assert (rows["tokens"], rows["validation"], rows["steps"]) == (NOT_STATED, NOT_STATED, "6")
