"""``model=transformers`` through the commands: trained, resumed to the bit, evaluated, written from, named by init."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.cli import main
from llmkit.tracking.jsonl import read_metrics
from tests.integration.test_objectives import text  # noqa: F401  (a fixture)
from tests.pairs import BPE, FIM_TOKENS, MASK_TOKENS, T5_TOKENS

pytest.importorskip("transformers", reason="extra hf")

COMMON = [
    "data.seq_len=48",
    "data.n_workers=1",
    "data.val_fraction=0.2",
    "engine.max_steps=3",
    "engine.micro_batch_size=4",
    "engine.n_threads=1",
    "engine.precision=fp32",
    "engine.log_every=1",
    "engine.eval_every=3",
    "engine.save_every=1",
    "optim.lr=1e-3",
    "schedule=constant",
    "schedule.warmup_steps=1",
    "callbacks=none",
    "tracking.wandb.mode=disabled",
]
WRAPPED = ["model=transformers", "model.max_seq_len=64"]


def wrapped(task: str, model_type: str, settings: str) -> list[str]:
    return [*WRAPPED, f"model.task={task}", f"model.model_type={model_type}", f"model.settings={{{settings}}}"]


NEO = wrapped(
    *("causal_lm", "gpt_neo"),
    "hidden_size:32,num_layers:2,num_heads:2,attention_types:[[[global,local],1]],window_size:8,embed_dropout:0.1",
)
SIDE = "layers:1,{0}_attention_heads:2,{0}_ffn_dim:64"
PEGASUS = wrapped(
    *("seq2seq_lm", "pegasus"), f"d_model:32,encoder_{SIDE.format('encoder')},decoder_{SIDE.format('decoder')}"
)
OPT = wrapped(
    "causal_lm", "opt", "hidden_size:32,num_hidden_layers:2,num_attention_heads:2,ffn_dim:64,word_embed_proj_dim:16"
)
MODELS = {
    "gpt_neo": [*NEO, *BPE],
    "opt": [*OPT, "objective=fill_in_the_middle", *FIM_TOKENS],
    "mamba": [*wrapped("causal_lm", "mamba", "hidden_size:16,num_hidden_layers:1,state_size:4"), *BPE],
    "distilbert": [
        *wrapped("masked_lm", "distilbert", "dim:32,n_layers:2,n_heads:2,hidden_dim:64"),
        *("objective=masked_lm", *MASK_TOKENS),
    ],
    "pegasus": [*PEGASUS, "objective=span_corruption", *T5_TOKENS],
    "pegasus-prefix": [*PEGASUS, "objective=prefix_lm", *BPE],
}


def train(text: Path, name: str, *overrides: str) -> list[dict[str, Any]]:  # noqa: F811
    """The rows of ``metrics.jsonl``, without what differs between any two runs."""
    root = text.parent
    command = ["pretrain", *COMMON, f"data.path={text}", f"data.cache_dir={root / 'cache'}"]
    assert main([*command, f"run.root={root / 'runs'}", f"run.name={name}", *overrides]) == 0
    rows = read_metrics(root / "runs" / name / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


SLOW = ("opt", "mamba", "pegasus-prefix")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS])
def test_resume_repeats_the_unbroken_run(text: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """Two starts against one, to the last bit; then the run evaluates and writes as any other."""
    unbroken = train(text, f"{name}-unbroken", *MODELS[name])
    train(text, f"{name}-broken", *MODELS[name], "engine.max_steps=1")
    broken = train(text, f"{name}-broken", *MODELS[name])
    assert [row for row in broken if "train/loss" in row] == [row for row in unbroken if "train/loss" in row]
    last = [row for row in unbroken if "val/loss" in row][-1]
    assert [row for row in broken if "val/loss" in row][-1] == last
    run = text.parent / "runs" / f"{name}-broken"
    capsys.readouterr()
    assert main(["evaluate", f"init={run}", "engine.micro_batch_size=3", "pseudo_ppl_tokens=0"]) == 0
    assert json.loads(capsys.readouterr().out)["val/loss"] == pytest.approx(last["val/loss"], rel=1e-5)
    prompt = "The <mask> 3 is read" if name == "distilbert" else "The file 3"
    assert main(["generate", f"init={run}", "--prompt", prompt, "generation.max_new_tokens=5"]) == 0
    assert capsys.readouterr().out.startswith(prompt)


def test_micro_batches_change_nothing(text: Path) -> None:  # noqa: F811
    """Documents are read together with others of their length, whichever rows these are in."""
    still = [*MODELS["gpt_neo"], "model.settings.embed_dropout=0.0", "engine.max_steps=2", "engine.eval_every=2"]
    whole = train(text, "whole", *still, "engine.micro_batch_size=4")
    parts = train(text, "parts", *still, "engine.micro_batch_size=1", "engine.grad_accum_steps=4")
    for left, right in zip(whole, parts, strict=True):
        assert left == {key: pytest.approx(value, rel=1e-4, abs=1e-7) for key, value in right.items()}


def test_a_foreign_architecture_is_opened_by_init(text: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """A run's folder without llmkit's key is what anyone's checkpoint is."""
    import shutil

    train(text, "first", *MODELS["gpt_neo"], "engine.max_steps=1")
    steps = sorted((text.parent / "runs" / "first" / "checkpoints").glob("step_*"))
    foreign = text.parent / "foreign"
    shutil.copytree(steps[-1] / "model", foreign)
    raw = json.loads((foreign / "config.json").read_text())
    del raw["llmkit"]
    (foreign / "config.json").write_text(json.dumps(raw))
    rows = train(text, "second", f"init={foreign}", "model=transformers", "engine.max_steps=2")
    first = [
        row for row in train(text, "third", f"init={steps[-1] / 'model'}", "engine.max_steps=2") if "train/loss" in row
    ]
    assert [row for row in rows if "train/loss" in row] == first
    capsys.readouterr()
    command = ["pretrain", *COMMON, f"data.path={text}", f"init={foreign}", "run.name=none"]
    assert main([*command, "model=transformers", "--dry-run"]) == 0
    assert "GPTNeoForCausalLM" in capsys.readouterr().out
    assert main([*command, f"run.root={text.parent / 'runs'}"]) == 4
    assert "model=transformers" in capsys.readouterr().err
    assert main([*command, "model=transformers", "model.vocab_size=64"]) == 2
    assert "model.vocab_size" in capsys.readouterr().err


def test_an_architecture_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "model=transformers", "--dry-run"]) == 2
    assert "model.model_type" in capsys.readouterr().err
