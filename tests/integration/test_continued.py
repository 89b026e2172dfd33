"""Continued pretraining: what the model knew is measured before, during and after; the vocabulary can grow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.cli import main
from llmkit.models.hf import load_model
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tracking.jsonl import read_metrics

SHORT = [
    "data.n_workers=1",
    "data.seq_len=48",
    "engine.n_threads=1",
    "engine.precision=fp32",
    "engine.micro_batch_size=4",
    "engine.log_every=1",
    "engine.eval_every=3",
    "engine.save_every=3",
    "schedule.warmup_steps=1",
    "callbacks=none",
    "tracking.wandb.mode=disabled",
]
TINY = ["model.d_model=32", "model.n_layers=1", "model.n_heads=2", "model.max_seq_len=64", "tokenizer.vocab_size=320"]


class Place:
    """Two kinds of text, and runs on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.old, self.new, self.old_val = (root / f"{name}.jsonl" for name in ("old", "new", "old_val"))
        self.write(self.old, "The river runs past hill {}, and the boat waits at {}.", 200)
        self.write(self.old_val, "The boat waits at {}, and the river runs past hill {}.", 30)
        self.write(self.new, "def f{}(x): return x + {}", 200)
        assert self.train("first", f"data.path={self.old}", *TINY, "engine.max_steps=30") == 0

    def write(self, path: Path, form: str, n: int) -> None:
        rows = (form.format(i % 17, i * 7 % 23) for i in range(n))
        path.write_text("".join(json.dumps({"text": " ".join([row] * 3)}) + "\n" for row in rows))

    def train(self, name: str, *overrides: str) -> int:
        places = [f"run.root={self.root / 'runs'}", f"run.name={name}", f"data.cache_dir={self.root / 'cache'}"]
        return main(["pretrain", *SHORT, *places, *overrides])

    def go_on(self, name: str, *overrides: str) -> int:
        old = [f"data.path={self.new}", f"data.old_val_path={self.old_val}"]
        return self.train(name, f"init={self.root / 'runs' / 'first'}", *old, "engine.max_steps=6", *overrides)

    def rows(self, name: str) -> list[dict[str, Any]]:
        return read_metrics(self.root / "runs" / name / "metrics.jsonl")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("continued"))


def evaluated(place: Place, name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    capsys.readouterr()
    where = [
        f"init={place.root / 'runs' / name}",
        f"data.path={place.old_val}",
        f"data.cache_dir={place.root / 'cache'}",
    ]
    assert main(["evaluate", *where, "data.seq_len=48", "engine.n_threads=1", "data.n_workers=1"]) == 0
    figures: dict[str, float] = json.loads(capsys.readouterr().out)
    return figures


def test_old_text_is_scored_before_during_and_after(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The first and the last figure are those of ``llmkit evaluate`` on the same text."""
    assert place.go_on("more") == 0
    said = capsys.readouterr()
    scored = {row["step"]: row for row in place.rows("more") if "val_old/loss" in row}
    assert list(scored) == [0, 3, 6]
    assert all("val/loss" in row for row in scored.values())
    for step, name in ((0, "first"), (6, "more")):
        figures = evaluated(place, name, capsys)
        for metric in ("loss", "bpb", "accuracy", "n_targets"):
            assert scored[step][f"val_old/{metric}"] == pytest.approx(figures[f"val/{metric}"], rel=1e-6)
    assert scored[6]["val/loss"] < scored[0]["val/loss"]
    before, after = scored[0]["val_old/loss"], scored[6]["val_old/loss"]
    assert f"val_old/loss {before:.4f} before, {after:.4f} after ({after - before:+.4f})" in said.err + said.out


def test_replay_of_old_text_forgets_less(place: Place) -> None:
    assert place.go_on("alone", "engine.max_steps=40", "optim.lr=3e-3") == 0
    both = f"data.path=[{place.new},{place.old}]"
    assert place.go_on("mixed", both, "data.weights=[0.7,0.3]", "engine.max_steps=40", "optim.lr=3e-3") == 0
    alone, mixed = (place.rows(name)[-1]["val_old/loss"] for name in ("alone", "mixed"))
    assert mixed < alone


def test_a_stopped_run_keeps_what_it_measured_first(place: Place) -> None:
    assert place.go_on("whole") == 0
    assert place.go_on("parts", "engine.max_hours=1e-9") == 0
    assert place.go_on("parts") == 0
    kept = ("val_old/loss", "val/loss", "train/loss")
    figures = [[{k: row[k] for k in kept if k in row} for row in place.rows(name)] for name in ("whole", "parts")]
    assert [row for row in figures[0] if row] == [row for row in figures[1] if row]


def test_added_tokens_get_rows_and_change_no_other_id(place: Place) -> None:
    assert place.go_on("grown", "add_tokens=['<|user|>','<|end|>']") == 0
    folder = place.root / "runs" / "grown" / "checkpoints" / "step_6" / "model"
    before = load_tokenizer(next((place.root / "runs" / "first" / "checkpoints").glob("step_30")) / "model")
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    assert tokenizer.vocab_size == before.vocab_size + 2
    assert model.config.vocab_rows >= tokenizer.vocab_size
    text = "The river runs past hill 3."
    assert tokenizer.encode(text) == before.encode(text)


def test_old_text_that_is_not_there_is_found_first(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    cache = place.root / "unused"
    assert place.go_on("nothing", "data.old_val_path=nope.txt", f"data.cache_dir={cache}") == 3
    said = capsys.readouterr().err
    assert "nothing is found at 'nope.txt'" in said
    assert "where: data.old_val_path" in said
    assert not cache.exists()


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["data.old_val_path=x.txt"], "data.old_val_path: has no effect: a new model knows no text"),
        (["add_tokens=[a]"], "add_tokens: has no effect"),
        (["init=somewhere", "tokenizer.vocab_size=700"], "tokenizer.vocab_size: has no effect"),
    ],
)
def test_what_would_be_ignored_is_refused(
    place: Place, overrides: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.train("refused", f"data.path={place.new}", *overrides) == 2
    assert what in capsys.readouterr().err
