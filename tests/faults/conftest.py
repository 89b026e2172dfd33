from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a missing sync would lose is simulated (``test_power_loss.py``); a real disk would only cost time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
