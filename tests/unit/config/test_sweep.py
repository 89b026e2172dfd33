"""``-m``: Hydra makes the combinations, every job is a child process, failures are counted at the end."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from pathlib import Path

import pytest

from llmkit.cli import main, parse_flags, passed_on
from llmkit.config import sweep as sweeping
from llmkit.config.sweep import sweep
from llmkit.errors import ConfigError, LLMKitError, Stopped


class Children:
    """Stands for the child processes: remembers their command lines, writes the result of a run."""

    def __init__(self, root: Path) -> None:
        self.root, self.lines, self.codes = root, [], {}
        self.__name__ = "children"

    def __call__(self, words: list[str]) -> int:
        self.lines.append(words)
        name = words[-1].removeprefix("run.name=")
        (self.root / name).mkdir(exist_ok=True)
        result = {"metrics": {"val/loss": 3.0 - len(self.lines)}}
        (self.root / name / "result.json").write_text(json.dumps(result))
        return self.codes.get(len(self.lines), 0)

    def overrides(self) -> list[set[str]]:
        return [set(words[4:]) for words in self.lines]


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Children:
    monkeypatch.chdir(tmp_path)
    children = Children(tmp_path)
    monkeypatch.setattr(sweeping, "_run_child", children)
    monkeypatch.setattr(sweeping, "_stopped", threading.Event())
    return children


def test_every_combination_runs_under_its_own_name(children: Children, capsys: pytest.CaptureFixture[str]) -> None:
    root = f"run.root={children.root}"
    code = sweep("pretrain", ["optim.lr=1e-3,1e-4", "model=gpt2,llama", "run.name=a", root], None, ["--dry-run"])
    assert code == 0
    assert [words[:5] for words in children.lines] == [[sys.executable, "-m", "llmkit", "pretrain", "--dry-run"]] * 4
    assert [words[-1] for words in children.lines] == [f"run.name=a-{i}" for i in range(4)]
    rates = [next(word for word in words if word.startswith("optim.lr")) for words in children.lines]
    assert rates == ["optim.lr=0.001", "optim.lr=0.001", "optim.lr=0.0001", "optim.lr=0.0001"]
    assert all(root in words for words in children.lines)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("job 3: val/loss -1.0")
    left = {path.name for path in children.root.iterdir()}
    assert left == {"a-0", "a-1", "a-2", "a-3", "a-sweep"}, "Hydra leaves nothing in the working folder"
    assert {path.name for path in (children.root / "a-sweep").iterdir()} == {
        "multirun.yaml", *(f"job-{i}.json" for i in range(4)),
    }  # fmt: skip


def test_awkward_values_and_a_recipe_of_the_users_own_reach_the_jobs(children: Children, tmp_path: Path) -> None:
    recipe = tmp_path / "my recipe.yaml"
    recipe.write_text("defaults:\n  - gpt_tiny\nrun:\n  name: mine\n")
    line = [f"recipe={recipe}", f"run.root={tmp_path}", "data.path=/ü b/it's.txt", "optim.lr=1e-3,1e-4"]
    assert sweep("pretrain", line, None, []) == 0
    for words in children.lines:
        cfg = parse_flags("pretrain", words[4:])
        assert f"recipe={recipe}" in cfg.overrides
        assert r"data.path='/ü b/it\'s.txt'" in cfg.overrides


def test_all_mistakes_of_all_values_are_found_before_the_first_job(children: Children) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep("pretrain", ["optim.lr=1e-3,fast,0", "model=gpt2,gpt3", "run.nam=x"], None, [])
    assert {problem.path for problem in caught.value.problems} == {"optim.lr", "model", "run.nam"}
    assert len(caught.value.problems) == 4
    assert not children.lines
    with pytest.raises(ConfigError, match="1 mistake"):
        sweep("pretrain", ["optim.lr=1,2", "gpt_tiny"], None, [])


def test_a_failed_job_stops_no_other_and_fails_the_sweep(
    children: Children, capsys: pytest.CaptureFixture[str]
) -> None:
    children.codes = {1: 5, 2: -9}
    with pytest.raises(LLMKitError, match="2 of 3 jobs failed: 0, 1") as caught:
        sweep("pretrain", ["run.seed=1,2,3", "run.name=a", f"run.root={children.root}"], None, [])
    assert caught.value.exit_code == 5
    assert len(children.lines) == 3
    assert "job 1: exit code -9" in capsys.readouterr().out


def test_stopped_jobs_stop_the_sweep(children: Children) -> None:
    children.codes = {1: 75, 2: 75}
    with pytest.raises(Stopped):
        sweep("pretrain", ["run.seed=1,2", "run.name=a", f"run.root={children.root}"], None, [])


def test_a_sweep_under_a_launcher_is_refused(children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="its own processes"):
        sweep("pretrain", ["run.seed=1,2"], None, [])


def test_what_hydra_refuses_is_an_error(children: Children, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="Hydra could not"):
        sweep("pretrain", ["run.seed=1,2", "hydra/launcher=nothing", f"run.root={children.root}"], None, [])


def test_flags_are_passed_on() -> None:
    line = ["--prompt", "a b", "--prompt=c", "init=x,y", "-m", "--config-dir", "d", "--allow", "p"]
    args = parse_flags("generate", line)
    assert passed_on("generate", args) == ["--prompt=a b", "--prompt=c", "--config-dir=d", "--allow=p"]
    assert args.overrides == ["init=x,y"]
    assert args.multirun


def test_python_314_checks_no_help_text_of_hydras(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_help(self: argparse.ArgumentParser, action: argparse.Action) -> None:
        raise ValueError("badly formed help string")

    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", check_help, raising=False)
    with sweeping._old_argparse():
        quiet = argparse.ArgumentParser._check_help is not check_help  # type: ignore[attr-defined]
    assert quiet == bool(sweeping.version_base())
    assert argparse.ArgumentParser._check_help is check_help  # type: ignore[attr-defined]


def test_a_stop_signal_is_passed_on_to_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child says it is ready by a file, and ends with 75 on SIGTERM."""
    monkeypatch.setattr(sweeping, "_stopped", threading.Event())
    ready = tmp_path / "ready"
    child = (
        "import signal, sys, pathlib, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "for _ in range(3000): time.sleep(0.01)"
    )

    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def stop() -> None:
        while not ready.exists():
            threading.Event().wait(0.01)
        signal.pthread_kill(main_thread, signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert sweeping._run_child([sys.executable, "-c", child]) == 75
    assert sweeping._stopped.is_set()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_a_real_sweep(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = ["model.d_model=32", "model.n_layers=1", "engine.max_steps=2", "schedule.warmup_steps=0", "data.seq_len=32"]
    line += ["tokenizer.vocab_size=512", "callbacks=none", f"run.root={tmp_path}", "run.name=a", "run.seed=1,2"]
    assert main(["pretrain", "-m", *line]) == 0
    assert "job 1: val/loss" in capfd.readouterr().out
    assert (tmp_path / "a-1" / "result.json").exists()
