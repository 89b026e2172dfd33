"""The two halves of the mirror's memory: which rows are new in the file, and which W&B has already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.interfaces import RunInfo
from llmkit.tracking.jsonl import MetricsFile
from llmkit.tracking.wandb import RUN_FILE, write_run_file
from llmkit.tracking.wandb_mirror import Sent, Tail


def steps(tail: Tail) -> list[int]:
    return [row["step"] for row in tail.rows()]


def test_tail_gives_each_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert steps(tail) == []
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    assert steps(tail) == [1, 2]
    assert steps(tail) == []
    with path.open("ab") as file:
        file.write(b'ep": 3}\nnot a row\n{"step": 4}\n')
    assert steps(tail) == [3, 4]


@pytest.mark.parametrize("new", [[1], [1, 22], [1, 22, 33, 44], []])
def test_tail_reads_a_file_that_was_cut_back_from_its_start(tmp_path: Path, new: list[int]) -> None:
    """Shorter, as long, longer: the size alone would not tell."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        file.append({"step": step})
    tail = Tail(file.path)
    assert steps(tail) == [1, 2, 3]
    file.truncate(len(b'{"step": 1}\n') if new else 0)
    for step in new[1:]:
        file.append({"step": step})
    assert steps(tail) == new


def send(sent: Sent, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What would be logged for ``rows``."""
    logged = []
    for row in rows:
        news = sent.news(row)
        if news:
            sent.add(news)
            logged.append(news)
    return logged


def rows_of(first: int, last: int) -> list[dict[str, Any]]:
    train = [{"step": s, "loss": float(s)} for s in range(first, last + 1)]
    return [
        entry
        for row in train
        for entry in (row, *([{"step": row["step"], "val": 1.0}] if row["step"] % 5 == 0 else []))
    ]


@pytest.mark.parametrize("cut", range(1, 13))
@pytest.mark.parametrize("killed_after", range(1, 13))
def test_over_a_resume_each_row_is_sent_once(tmp_path: Path, cut: int, killed_after: int) -> None:
    """Killed after so many rows were sent, resumed from a checkpoint at step ``cut`` or earlier."""
    everything = rows_of(1, 20)
    first = Sent(tmp_path / "sent.json")
    before = send(first, everything[:killed_after])
    first.save()
    again = Sent(tmp_path / "sent.json")
    file_after_resume = rows_of(1, min(cut, before[-1]["step"])) + rows_of(min(cut, before[-1]["step"]) + 1, 20)
    assert before + send(again, file_after_resume) == everything
    assert again.count == len(everything)


def test_an_evaluation_that_was_not_reached_before_the_kill_is_sent_after_it(tmp_path: Path) -> None:
    sent = Sent(tmp_path / "sent.json")
    send(sent, [{"step": 5, "loss": 1.0}])
    sent.save()
    again = Sent(tmp_path / "sent.json")
    assert send(again, [{"step": 5, "loss": 1.0}, {"step": 5, "val": 2.0}]) == [{"step": 5, "val": 2.0}]


def test_a_server_with_fewer_rows_gets_the_rest(tmp_path: Path) -> None:
    sent = Sent(tmp_path / "sent.json")
    send(sent, rows_of(1, 10))
    sent.believe_server(10, sent.count)
    assert send(sent, rows_of(1, 10)) == []
    sent.believe_server(7, 8)
    assert send(sent, rows_of(1, 10)) == rows_of(8, 10)
    sent.believe_server(None, 0)
    assert send(sent, rows_of(1, 10)) == rows_of(1, 10)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"count": 1}', '{"count": "x", "step": 1, "names": []}'])
def test_a_damaged_memory_starts_over(tmp_path: Path, content: str) -> None:
    (tmp_path / "sent.json").write_text(content)
    sent = Sent(tmp_path / "sent.json")
    assert (sent.count, sent.step, sent.names) == (0, -1, set())


def test_rows_without_a_step_are_not_sent(tmp_path: Path) -> None:
    assert Sent(tmp_path / "sent.json").news({"loss": 1.0}) == {}


def test_the_run_id_is_kept_and_no_secret_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    run = RunInfo("mine", tmp_path, "pretrain", {"api_key": "abc", "lr": 0.1}, 10, {"n_params": 3})
    first = write_run_file(run, {"mode": "offline"})
    assert write_run_file(run, {"mode": "online"}) == first
    content = json.loads((tmp_path / RUN_FILE).read_text())
    assert content["settings"] == {"mode": "online"}
    assert content["config"] == {"api_key": "***", "lr": 0.1, "facts": {"n_params": 3}, "command": "pretrain"}


@pytest.mark.parametrize("damage", ["", "{}", "[1]", "\x00"])
def test_a_damaged_run_file_means_a_new_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "from-outside")
    (tmp_path / RUN_FILE).write_text(damage)
    assert write_run_file(RunInfo("mine", tmp_path, "pretrain", {}, 10, {}), {}) == "from-outside"
