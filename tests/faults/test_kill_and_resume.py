"""The whole program, killed and started again; ``kill_and_resume.py`` has the method."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.pairs import PAIRS

REPO = Path(__file__).parents[2]


def _run(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.faults.kill_and_resume", *arguments]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong: 0" in done.stdout
    return done.stdout


def test_a_few_kills() -> None:
    assert _run("--kills", "5", "engine.max_steps=30").startswith("5 signals")


@pytest.mark.slow
def test_a_hundred_kills() -> None:
    _run("--kills", "100")


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_twenty_kills_of_every_objective(pair: str) -> None:
    _run("--kills", "20", "--pair", pair)


@pytest.mark.slow
def test_sixty_stop_signals() -> None:
    _run("--kills", "60", "--signals")


@pytest.mark.slow
def test_kills_of_fresh_interpreters() -> None:
    _run("--kills", "10", "--fresh")
