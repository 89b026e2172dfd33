"""The commands one after another, as a user runs them; the next one and transformers agree with what one wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmkit.cli import main
from llmkit.models.hf import load_model

TINY = [
    "data.seq_len=32",
    "data.n_workers=1",
    "tokenizer.vocab_size=300",
    "model.max_seq_len=64",
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=2",
    "engine.max_steps=6",
    "engine.micro_batch_size=2",
    "engine.n_threads=1",
    "engine.precision=fp32",
    "schedule.warmup_steps=1",
    "callbacks=none",
    "tracking.wandb.mode=disabled",
]


def write_documents(path: Path, first: int, n: int) -> None:
    rows = [
        {"text": f"Document {i} says that {i} times {i} is {i * i}, and so on. " * 4} for i in range(first, first + n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run, its texts beside it."""
    root = tmp_path_factory.mktemp("commands")
    write_documents(root / "train.jsonl", 0, 60)
    write_documents(root / "val.jsonl", 1000, 12)
    command = ["pretrain", *TINY, f"data.path={root / 'train.jsonl'}", f"data.val_path={root / 'val.jsonl'}"]
    assert main([*command, f"run.root={root}", "run.name=run"]) == 0
    return root / "run"


def test_evaluate_repeats_the_validation_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model takes 64 tokens, the run used windows of 32: evaluation uses the run's."""
    capsys.readouterr()
    assert main(["evaluate", f"init={run}", f"data.path={run.parent / 'val.jsonl'}", "engine.micro_batch_size=5"]) == 0
    shown = json.loads(capsys.readouterr().out)
    trained = json.loads((run / "result.json").read_text())["metrics"]
    assert shown["seq_len"] == 32
    assert shown["val/n_targets"] == trained["val/n_targets"]
    for name in ("val/loss", "val/bpb", "val/ppl"):
        assert shown[name] == pytest.approx(trained[name], rel=1e-6)


def test_bits_per_byte_from_transformers_alone(run: Path) -> None:
    """Each document by itself, through transformers' model and tokenizer: the same loss and bits per byte.

    Documents of this text are longer than a window, so the run's windows of 32 are cut by hand.
    """
    transformers = pytest.importorskip("transformers")
    folder = run / "checkpoints" / "step_6" / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in (run.parent / "val.jsonl").read_text().splitlines()]
    row: list[int] = []
    for text in texts:
        row += [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    nll, n_targets = 0.0, 0
    for start in range(0, len(row) - 1, 32):
        window = row[start : start + 33]
        pieces: list[list[int]] = [[]]  # the window's documents, each with the ids it has to predict from
        for index, token in enumerate(window):
            pieces[-1].append(token)
            if token == tokenizer.eos_token_id and index < len(window) - 1:
                pieces.append([])
        for piece in pieces:
            if len(piece) > 1:
                with torch.no_grad():
                    logits = model(torch.tensor([piece[:-1]])).logits[0]
                nll += torch.nn.functional.cross_entropy(logits, torch.tensor(piece[1:]), reduction="sum").item()
                n_targets += len(piece) - 1
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    n_bytes = sum(len(text.encode()) for text in texts)
    assert metrics["val/n_targets"] == n_targets
    assert metrics["val/loss"] == pytest.approx(nll / n_targets, rel=1e-5)
    assert metrics["val/bpb"] == pytest.approx(nll / n_bytes / 0.6931471805599453, rel=1e-5)


def test_model_folder_gives_the_same_logits_in_transformers(run: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = run / "checkpoints" / "step_6" / "model"
    ids = torch.arange(4, 44).view(2, 20)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    torch.testing.assert_close(load_model(folder)(ids), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("override", ["data.val_fraction=0.5", "data.val_path=x.txt", "data.weights=[1]"])
def test_evaluate_refuses_what_would_change_nothing(
    run: Path, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", f"init={run}", f"data.path={run.parent / 'val.jsonl'}", override]) == 2
    assert f"{override.partition('=')[0]}: has no effect" in capsys.readouterr().err


def test_evaluate_refuses_a_window_that_the_model_does_not_take(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", f"init={run}", f"data.path={run.parent / 'val.jsonl'}", "data.seq_len=65"]) == 2
    assert "at most 64" in capsys.readouterr().err


def test_rows_left_out_are_said_by_training_too(tmp_path: Path) -> None:
    write_documents(tmp_path / "mixed.jsonl", 0, 60)
    with (tmp_path / "mixed.jsonl").open("a") as file:
        file.write('{"text": \n{"other": "x"}\n')
    for turn in ("built", "reused"):
        command = ["pretrain", *TINY, f"data.path={tmp_path / 'mixed.jsonl'}", "data.max_bad_fraction=0.1"]
        assert main([*command, f"run.root={tmp_path}", f"run.name={turn}"]) == 0
        text = (tmp_path / turn / "train.log").read_text()
        assert "1 broken json" in text
        assert "1 missing field" in text
        assert "mixed.jsonl:61" in text


def test_a_failed_run_says_why_in_its_result(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    command = ["pretrain", *TINY, f"data.path={tmp_path / 'empty.txt'}", f"run.root={tmp_path}", "run.name=bad"]
    assert main(command) == 3
    result = json.loads((tmp_path / "bad" / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("failed", 3)
    assert "no document" in result["error"]


def test_a_plan_for_text_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "recipe=gpt_tiny", "--dry-run", "data.path=nowhere.txt"]) == 3
    assert "nowhere.txt" in capsys.readouterr().err


def test_doctor_takes_no_words() -> None:
    assert main(["doctor", "x=1"]) == 2
