"""What several tests of commands use."""

from __future__ import annotations

import pytest

from tests.integration.task_place import Place


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Tiny models and rows for fine-tuning."""
    return Place(tmp_path_factory.mktemp("tasks"))
