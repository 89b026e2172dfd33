from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import yaml

from llmkit.engine import run_folder
from llmkit.engine.run_folder import RunFolder
from llmkit.errors import CheckpointError, ConfigError

SECRET = "hf_abcdefghijklmnopqrstuvwx"


@pytest.mark.parametrize("name", ["mine", "a.b-C_9", "..a", "x" * 128])
def test_names_that_are_folders(tmp_path: Path, name: str) -> None:
    assert RunFolder(tmp_path, name).path == tmp_path / name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "...", "a/b", "../a", "/etc", "a\0b", "a\nb", "ü", "a b", "\x1b[31m", "x" * 129]
)
def test_names_that_are_not(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunFolder(tmp_path, name)
    assert caught.value.where == "run.name"
    assert "\x1b" not in str(caught.value)
    assert "\0" not in str(caught.value)


def test_a_link_out_of_the_root_is_refused_and_a_linked_root_is_fine(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs" / "mine").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="is a link to"):
        RunFolder(tmp_path / "runs", "mine")
    with RunFolder(tmp_path / "runs", "other").lock():
        assert (tmp_path / "elsewhere" / "other").is_dir()


def test_create_writes_what_the_run_was(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "mine")
    config = {"run": {"name": "mine", "seed": 3}, "data": {"path": ["a b.txt", "ü"]}, "init": None, "lr": 3e-4}
    folder.create(config, ["llmkit", "pretrain", "data.path=a b.txt"])
    assert yaml.safe_load((folder.path / "config.yaml").read_text()) == config
    assert list(yaml.safe_load((folder.path / "config.yaml").read_text())) == list(config)
    assert (folder.path / "command.txt").read_text() == "llmkit pretrain 'data.path=a b.txt'\n"
    facts = json.loads((folder.path / "environment.json").read_text())
    assert facts["versions"]["llmkit"]
    assert facts["n_cpus"] >= 1
    assert facts["memory_bytes"] > 1e8
    folder.create({"run": {}}, ["llmkit"])  # a later start
    assert yaml.safe_load((folder.path / "config.yaml").read_text()) == {"run": {}}


def test_no_secret_reaches_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("NCCL_API_KEY", "topsecretvalue")
    monkeypatch.setenv("PYTORCH_NOTE", f"https://me:{SECRET}@host/x")
    folder = RunFolder(tmp_path, "mine")
    config = {"api_key": "topsecretvalue", "url": f"https://me:{SECRET}@host/x"}
    folder.create(config, ["llmkit", f"token={SECRET}", "--api-key=topsecretvalue", f"{SECRET}"])
    written = "".join(path.read_text() for path in folder.path.iterdir())
    assert SECRET not in written
    assert "topsecretvalue" not in written
    assert "host/x" in written


def test_result(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "mine")
    folder.create({}, [])
    folder.write_result("finished", 0, 7, {"val/loss": 1.5, "val/ppl": math.inf})
    text = (folder.path / "result.json").read_text()
    assert json.loads(text) == {
        "status": "finished", "exit_code": 0, "step": 7, "metrics": {"val/loss": 1.5, "val/ppl": None}
    }  # fmt: skip
    folder.write_result("stopped", 75, 8, {})
    assert json.loads((folder.path / "result.json").read_text())["exit_code"] == 75
    folder.write_result("failed", 3, 0, {}, "no document in notes.txt")
    assert json.loads((folder.path / "result.json").read_text())["error"] == "no document in notes.txt"


def test_a_root_that_cannot_be_made_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    folder = RunFolder(tmp_path / "file" / "runs", "mine")
    with pytest.raises(CheckpointError, match="cannot be written"), folder.lock():
        pass
    with pytest.raises(CheckpointError):
        folder.create({}, [])


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(error: int) -> None:
        def flock(descriptor: int, how: int) -> None:
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(run_folder.fcntl, "flock", flock)

    refuse(37)  # ENOLCK
    with caplog.at_level("WARNING"), RunFolder(tmp_path, "mine").lock():
        assert "has no locks" in caplog.text
    refuse(5)  # EIO
    with pytest.raises(CheckpointError, match="Input/output error"), RunFolder(tmp_path, "mine").lock():
        pass


def test_a_holder_that_never_says_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "WAIT_FOR_HOLDER_S", 0.0)
    folder = RunFolder(tmp_path, "mine")
    with folder.lock():
        os.truncate(folder.path / ".lock", 0)
        with pytest.raises(ConfigError, match="in use by another process"), folder.lock():
            pass


def test_checkpoints_live_inside(tmp_path: Path) -> None:
    assert RunFolder(tmp_path, "mine").checkpoints == tmp_path / "mine" / "checkpoints"
