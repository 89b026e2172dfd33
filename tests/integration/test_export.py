"""A run is trained, exported, and used by other programs as llmkit uses it: the same text, the same loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmkit.cli import main
from llmkit.generation import generate
from llmkit.models.hf import load_model
from llmkit.tokenizers.load import load_tokenizer
from tests.integration.test_commands import TINY, write_documents
from tests.unit.generation_settings import GREEDY as BASE

transformers = pytest.importorskip("transformers")
GREEDY = replace(BASE, max_new_tokens=40)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went on from another one with new text."""
    root = tmp_path_factory.mktemp("export")
    write_documents(root / "old.jsonl", 0, 60)
    write_documents(root / "new.jsonl", 5000, 60)
    write_documents(root / "val.jsonl", 1000, 12)
    common = [f"run.root={root}", f"data.val_path={root / 'val.jsonl'}", "optim.lr=0.01", "engine.max_steps=30"]
    assert main(["pretrain", *TINY, *common, f"data.path={root / 'old.jsonl'}", "run.name=base"]) == 0
    without_model = [word for word in TINY if not word.startswith(("model.", "tokenizer."))]
    more = [f"data.path={root / 'new.jsonl'}", f"init={root / 'base'}", "run.name=more"]
    assert main(["pretrain", *without_model, *common, *more]) == 0
    return root / "more"


def greedy_there(folder: Path, prompt: str, **place: str) -> str:
    """What transformers alone writes after a prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **place)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **place).eval()
    ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    settings = transformers.GenerationConfig(max_new_tokens=40, do_sample=False, eos_token_id=2, pad_token_id=3)
    model.generation_config = settings
    row = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64))[0]
    return str(tokenizer.decode(row[len(ids) :], skip_special_tokens=True))


@pytest.mark.parametrize(
    ("format", "dtype"),
    [("hf", "float32"), ("hf", "bfloat16"), ("gguf", "float16"), ("gguf", "q8_0")],
)
def test_a_continued_run_is_used_elsewhere(run: Path, format: str, dtype: str) -> None:
    if format == "gguf":
        pytest.importorskip("gguf")
    out = run.parent / f"{format}-{dtype}"
    assert main(["export", f"init={run}", f"format={format}", f"dtype={dtype}", f"out={out}"]) == 0
    place = out if format == "hf" else out / "model.gguf"
    ours = generate(load_model(place), load_tokenizer(place), [" Document 7"], GREEDY, device="cpu")
    # transformers puts a space before every text of a GGUF file and takes it away again
    there = greedy_there(out, " Document 7", **({} if format == "hf" else {"gguf_file": "model.gguf"}))
    assert there.lstrip() == ours[0].lstrip()
    assert len(there) > 20
    card = (out / "README.md").read_text()
    trained = json.loads((run / "result.json").read_text())["metrics"]
    assert f"| val/loss | {trained['val/loss']:.6g} |" in card
    assert "| started from | base |" in card
    assert "| text | new.jsonl |" in card
    assert str(run.parent) not in card


def test_an_export_is_evaluated_like_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run.parent / "again"
    assert main(["export", f"init={run}", f"out={out}"]) == 0
    capsys.readouterr()
    words = [f"data.path={run.parent / 'val.jsonl'}", "data.seq_len=32", "engine.n_threads=1"]
    assert main(["evaluate", f"init={out}", *words]) == 0
    shown = json.loads(capsys.readouterr().out)
    trained = json.loads((run / "result.json").read_text())["metrics"]
    assert shown["val/loss"] == pytest.approx(trained["val/loss"], rel=1e-6)
    assert main(["export", f"init={out}", f"out={out}"]) == 2
    assert "not a new or an empty folder" in capsys.readouterr().err
