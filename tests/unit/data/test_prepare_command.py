"""``llmkit prepare``: the report on the screen, and typed errors with their exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.cli import main
from tests.unit.data.helpers import write_jsonl


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "200")
    return ["prepare", f"data.cache_dir={tmp_path}/cache", "tokenizer.vocab_size=300", "data.n_workers=1"]


def test_the_report_says_what_was_found(tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"the quick brown fox number {n} jumps over the lazy dog [of {n * n}]" for n in range(300)]
    path = write_jsonl(tmp_path / "corpus [1].jsonl", [*texts, texts[0], 7])
    argv = [*command, f"data.path={path}", "data.max_bad_fraction=0.1", "data.val_fraction=0.1"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    for words in (str(path), "301", "1 wrong type", f"{path}:302: wrong type", "1 documents, 0 of them dropped"):
        assert words in out, words
    assert "300 ids; on validation text:" in out
    assert "built: these files were not prepared before" in out
    assert f"next: llmkit pretrain data.cache_dir={tmp_path}/cache" in out
    assert main(argv) == 0
    assert "reused: inputs unchanged" in capsys.readouterr().out


def test_errors_have_the_exit_code_of_data(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert main([*command, f"data.path={tmp_path}/empty.txt"]) == 3
    err = capsys.readouterr().err
    assert "no document in" in err
    assert "empty.txt" in err
    assert "Traceback" not in err
