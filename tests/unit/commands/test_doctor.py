"""The report is complete, tells no secret, and its exit code says whether a run could start."""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path

import pytest

from llmkit.commands import doctor

ROOT = Path(__file__).resolve().parents[3]


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = doctor.run(None, argparse.Namespace(overrides=[]))
    return code, capsys.readouterr().out


def test_report_of_this_machine(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    monkeypatch.setenv("LLMKIT_REMOTE", "https://user:hunter22@host/x")
    code, text = report(capsys)
    assert code == 0
    for name in (
        *doctor.REQUIRED,
        *doctor.EXTRAS,
        *doctor.SECTIONS,
        "cpu",
        "threads",
        "run.root",
        "data cache",
        "wandb",
    ):
        assert re.search(rf"^ *{re.escape(name)}\b", text, re.MULTILINE), name
    assert re.search(r"ACCELERATE_MIXED_PRECISION +bf16 +\(read by accelerate; the recipe decides", text)
    assert "WANDB_API_KEY" in text
    assert "0123456789abcdef0123" not in text
    assert "hunter22" not in text
    assert not list(tmp_path.iterdir()), "the write test leaves nothing"


def test_something_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.9.1+cpu", "rich": "13.9.4rc1"}
    monkeypatch.setattr(doctor, "installed", lambda name: versions.get(name, None if name == "wandb" else "99"))
    code, text = report(capsys)
    assert code == 8
    assert "pip install 'torch>=2.10'" in text
    assert "pip install 'wandb>=0.22'" in text
    assert "'rich>=" not in text


def test_a_folder_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    assert doctor.refusal(tmp_path) == ""
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    missing: list[str] = []
    rows = dict(doctor.folders(missing))
    assert "not writable: Permission denied" in rows["run.root"]
    assert len(missing) == 2


def test_floors_and_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = dict(re.fullmatch(r"([\w-]+)>=([\d.]+),.*", entry).groups() for entry in project["dependencies"])  # type: ignore[union-attr]
    assert floors == doctor.REQUIRED
    extras = {name: entries for name, entries in project["optional-dependencies"].items() if name != "dev"}
    assert {name: tuple(re.split("[><=]", e)[0] for e in entries) for name, entries in extras.items()} == doctor.EXTRAS
    low, high = doctor.PYTHON
    assert project["requires-python"] == f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"


def test_extras_that_are_absent_name_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    assert dict(doctor.extras([]))["parquet"] == "pip install 'llmkit[parquet]'"


def test_nearest_folder(tmp_path: Path) -> None:
    assert doctor.nearest_folder(tmp_path / "a" / "b") == tmp_path
    assert doctor.as_numbers("2.13.0+cpu") == (2, 13, 0)
    assert doctor.as_numbers("1.4.0rc3") == (1, 4, 0)
