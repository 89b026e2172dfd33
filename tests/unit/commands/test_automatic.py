"""What ``auto`` becomes: the rules on given speeds, the measurements on this machine, and what a resume keeps."""

from __future__ import annotations

import ctypes
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit.cli import main
from llmkit.commands import automatic
from llmkit.commands.automatic import CHOICES, Workload, apply, attention_shape, race, settle
from llmkit.config.build import build
from llmkit.config.choices import recipes_dir
from llmkit.config.yaml_file import read_yaml
from llmkit.settings import EngineConfig
from tests.unit.engine.settings import ENGINE

CPU = torch.device("cpu")
AUTO = replace(ENGINE, precision="auto", fp32_matmul="auto", attention="auto", compile="auto")
WORK = Workload(flops=2e13, attention=(2, 16, 8), can_compile=True)
Speeds = Callable[..., None]


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> Speeds:
    """Sets the seconds that every race of the named candidates ends with."""

    def give(**seconds: float) -> None:
        monkeypatch.setattr(automatic, "race", lambda candidates, rounds=0: {n: seconds[n] for n in candidates})

    return give


@pytest.fixture(autouse=True)
def settings_put_back() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
    automatic.use_written_out(False)


def settled(engine: EngineConfig, work: Workload, **saved: Any) -> EngineConfig:
    """With an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        return settle(engine, CPU, work, state={"choices": saved}, cache=Path(folder))


def test_the_faster_of_each_is_taken(speeds: Speeds, caplog: pytest.LogCaptureFixture) -> None:
    speeds(fp32=1.0, bf16=3.0, highest=2.0, medium=1.0, sdpa=2.0, matmul=1.0, product=1e-3)
    with caplog.at_level(logging.INFO, logger="llmkit.engine"):
        found = settled(AUTO, WORK)
    assert (found.precision, found.fp32_matmul, found.attention) == ("fp32", "medium", "matmul")
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "engine.precision=fp32", "engine.fp32_matmul=medium", "engine.attention=matmul", "engine.compile=false",
    ]  # fmt: skip
    speeds(fp32=1.0, bf16=0.5, highest=1.0, medium=0.95, sdpa=1.0, matmul=0.95, product=1e-3)
    found = settled(AUTO, WORK)
    assert (found.precision, found.fp32_matmul, found.attention) == ("bf16", "highest", "sdpa")
    speeds(fp32=1.0, bf16=0.9, highest=1.0, medium=0.95, sdpa=1.0, matmul=0.95, product=1e-3)
    assert settled(AUTO, WORK).precision == "fp32", "bf16 rounds: a little faster is not enough"


def test_what_is_configured_or_saved_is_not_measured(speeds: Speeds) -> None:
    speeds()  # every race would be a KeyError
    assert settled(ENGINE, WORK) == ENGINE
    saved = {"precision": "bf16", "fp32_matmul": "medium", "attention": "matmul", "compile": True}
    assert settled(AUTO, WORK, **saved) == replace(AUTO, **saved)
    assert settled(replace(ENGINE, attention="auto"), WORK, **saved).attention == "matmul"


def test_what_was_measured_holds_for_the_same_work_only(speeds: Speeds, tmp_path: Path) -> None:
    """The next start of the run takes it, another shape, setting or number of threads does not; nor damage."""
    one = replace(ENGINE, attention="auto")

    def kernel(engine: EngineConfig = one, work: Workload = WORK) -> str:
        return settle(engine, CPU, work, state={}, cache=tmp_path).attention

    speeds(sdpa=2.0, matmul=1.0)
    assert kernel() == "matmul"
    speeds(sdpa=1.0, matmul=2.0)
    assert kernel() == "matmul"
    assert kernel(work=replace(WORK, attention=(2, 32, 8))) == "sdpa"
    assert kernel(replace(one, precision="bf16")) == "sdpa"
    assert kernel(replace(one, n_threads=2)) == "sdpa"
    assert kernel(work=replace(WORK, flops=7e14)) == "matmul"
    for file in (tmp_path / "measured").iterdir():
        file.write_text("{}")
    assert kernel() == "sdpa"
    torch.set_num_threads(1)


def test_a_cache_that_cannot_be_written_costs_nothing_more(speeds: Speeds, tmp_path: Path) -> None:
    speeds(sdpa=2.0, matmul=1.0)
    (tmp_path / "file").write_text("")
    one = replace(ENGINE, attention="auto")
    assert settle(one, CPU, WORK, state={}, cache=tmp_path / "file").attention == "matmul"


@pytest.mark.parametrize(("minutes", "possible", "compiled"), [(29, True, False), (31, True, True), (31, False, False)])
def test_a_run_is_compiled_where_it_is_long_enough(
    speeds: Speeds, monkeypatch: pytest.MonkeyPatch, minutes: float, possible: bool, compiled: bool
) -> None:
    speeds(product=1.0)
    monkeypatch.setattr(automatic, "compiler", lambda: "g++")
    rate = 2 * automatic.ROWS * automatic.INNER * automatic.OUTER * automatic.SHARE_OF_PEAK  # FLOP/s
    work = Workload(rate * 60 * minutes, None, can_compile=possible)
    assert settled(replace(ENGINE, compile="auto"), work).compile is compiled
    monkeypatch.setattr(automatic, "compiler", lambda: None)
    assert settled(replace(ENGINE, compile="auto"), work).compile is False


def test_a_setting_that_rounds_is_not_taken(speeds: Speeds, monkeypatch: pytest.MonkeyPatch) -> None:
    """``medium`` is bf16 on a CPU with AMX: the error is looked at, and the setting of the process stays."""
    speeds(highest=10.0, medium=1.0)
    monkeypatch.setattr(automatic, "_relative_error", lambda product: 3e-3)
    assert settled(replace(ENGINE, fp32_matmul="auto"), WORK).fp32_matmul == "highest"
    monkeypatch.undo()
    assert automatic._relative_error(automatic._product(torch.float32)()) < 1e-6
    assert 1e-3 < automatic._relative_error(automatic._product(torch.bfloat16)()) < 1e-2
    assert torch.get_float32_matmul_precision() == "highest"


def test_long_rows_are_not_written_out(speeds: Speeds) -> None:
    speeds()
    long = Workload(1e14, (1, 1025, 8), can_compile=False)
    assert settled(replace(ENGINE, attention="auto"), long).attention == "sdpa"
    assert settled(replace(ENGINE, attention="auto"), Workload(1e14, None, can_compile=False)).attention == "sdpa"


def test_the_kernels_of_a_short_run_are_not_measured(speeds: Speeds) -> None:
    speeds(fp32=1.0, bf16=0.5, product=1e-3)  # a race of kernels would be a KeyError
    found = settled(AUTO, replace(WORK, flops=9e12))
    assert (found.precision, found.fp32_matmul, found.attention) == ("bf16", "highest", "sdpa")
    speeds(fp32=1.0, bf16=2.0, product=1e-3)
    assert settled(AUTO, replace(WORK, flops=9e12)).fp32_matmul == "highest"


def test_everything_is_settled_by_real_measurements() -> None:
    found = settled(AUTO, WORK)
    assert "auto" not in [getattr(found, name) for name in CHOICES]


def test_a_race_is_run_in_turns() -> None:
    turns: list[str] = []
    found = race({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, rounds=2)
    assert turns == ["a", "b"] * 3
    assert set(found) == {"a", "b"}


class Model:
    def __init__(self) -> None:
        self.told: list[Any] = []

    def compile_blocks(self) -> None:
        self.told.append("compiled")

    def set_activation_checkpointing(self, on: bool) -> None:
        self.told.append(on)


def test_what_is_settled_is_applied() -> None:
    model = Model()
    apply(replace(ENGINE, fp32_matmul="high", attention="matmul", memory="low", compile=True), model)
    assert model.told == [True, "compiled"]
    assert torch.get_float32_matmul_precision() == "high"
    assert automatic.attend_written_out.__module__ == "llmkit.models.attention"
    model = Model()
    apply(ENGINE, model)
    assert model.told == []
    assert torch.get_float32_matmul_precision() == "highest"


def test_models_say_the_shape_of_their_attention() -> None:
    class Config:
        n_heads, head_width = 3, 5

    assert attention_shape(Config(), 7) == (3, 7, 5)
    assert attention_shape(object(), 7) is None


def test_a_resumed_run_keeps_its_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun where two products are faster, gone on with where they are not."""
    for i in range(50):
        (tmp_path / f"{i}.txt").write_text(f"Text {i}: one, two, three, four words are here.")
    line = [
        "pretrain", "model=gpt2", "model.d_model=16", "model.n_heads=2", "model.n_layers=1", "model.max_seq_len=16",
        "model.dropout=0.0", f"data.path={tmp_path}/*.txt", "data.seq_len=16", "data.val_fraction=0.2",
        "tokenizer.vocab_size=300", "engine.micro_batch_size=2", "engine.max_steps=4", "engine.save_every=2",
        "engine.eval_every=null", "engine.precision=fp32", "schedule=constant", "schedule.warmup_steps=0",
        "callbacks=none", "tracking.wandb.mode=disabled", f"run.root={tmp_path}", f"data.cache_dir={tmp_path}/cache",
    ]  # fmt: skip

    def winner(name: str) -> Callable[..., dict[str, float]]:
        def finished(candidates: Mapping[str, Callable[[], object]], rounds: int = 0) -> dict[str, float]:
            return {candidate: 1.0 if candidate == name else 2.0 for candidate in candidates}

        return finished

    monkeypatch.setattr(automatic, "SHORT_RUN_FLOPS", 0.0)
    monkeypatch.setattr(automatic, "race", winner("matmul"))
    assert main([*line, "run.name=a"]) == 0
    state = tmp_path / "a" / "checkpoints" / "step_2" / "state.json"
    assert json.loads(state.read_text())["choices"]["attention"] == "matmul"
    shutil.rmtree(state.parent.parent / "step_4")
    monkeypatch.setattr(automatic, "race", winner("sdpa"))
    assert main([*line, "run.name=a"]) == 0
    again = json.loads((tmp_path / "a" / "checkpoints" / "step_4" / "state.json").read_text())
    assert again["choices"]["attention"] == "matmul"
    assert main([*line, "run.name=b", f"data.cache_dir={tmp_path}/other"]) == 0
    other = json.loads((tmp_path / "b" / "checkpoints" / "step_4" / "state.json").read_text())
    assert other["choices"]["attention"] == "sdpa"


FAULTS = """
import resource, sys
from llmkit.engine.device import keep_freed_memory
import torch
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(6):  # until the heap is large enough
    torch.ones(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_freed_memory_is_kept() -> None:
    """Blocks of 64 MiB, freed and taken again: their pages are not asked for anew."""

    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("give") > 1000
    assert faults("keep") < 200


def test_no_shape_is_known_of_models_that_are_not_compiled_unless_told() -> None:
    """LSTMs, whose time is in one kernel, and modules of another library, which may name no blocks."""
    for name in ("lstm", "lstm_seq2seq", "transformers"):
        assert attention_shape(build(read_yaml(recipes_dir() / "model" / f"{name}.yaml").tree), 16) is None
    for name in ("gpt2", "bert", "t5"):
        assert attention_shape(build(read_yaml(recipes_dir() / "model" / f"{name}.yaml").tree), 16) is not None
