"""W&B may be absent, slow, dead or hostile: the run's own file stays complete, and the run ends in time.

Contract tests with a loopback server that keeps what it gets, and with ones that misbehave.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmkit.tracking.jsonl import read_metrics
from tests.faults.wandb_server import BadServer, WandbServer

pytest.importorskip("wandb")

REPO = Path(__file__).resolve().parents[2]
KEY = "a" * 40  # well formed, and nobody's


def environment(home: Path, **more: str) -> dict[str, str]:
    """A bare environment: no login, no mode, no settings of whoever runs the tests."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("WANDB", "NETRC"))}
    return kept | {"HOME": str(home), "WANDB_CONFIG_DIR": str(home), "PYTHONPATH": str(REPO)} | more


def tracked_run(
    folder: Path, first: int, last: int, *options: str, **more: str
) -> tuple[dict[str, float], subprocess.CompletedProcess[str]]:
    """Times in seconds as the process measured them (empty when it was killed), and the process."""
    command = [sys.executable, "-m", "tests.faults.tracked_run", str(folder), str(first), str(last), *options]
    done = subprocess.run(
        command,
        cwd=REPO,
        env=environment(folder.parent, **more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
    )
    return (json.loads(done.stdout) if done.stdout.startswith("{") else {}), done


def expected_rows(last: int) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, last + 1):
        rows.append({"step": step, "train/loss": 1 / step, "optim/lr": 1e-3})
        rows += [{"step": step, "val/loss": 2 / step}] if step % 5 == 0 else []
    return rows


def run_id(folder: Path) -> str:
    return str(json.loads((folder / "wandb_run.json").read_text())["id"])


def mirrors_of(folder: Path) -> list[int]:
    """Process ids of the mirrors of this run that are alive."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
            alive = "\nState:\tZ" not in entry.with_name("status").read_text()
        except OSError:
            continue
        if alive and b"llmkit.tracking.wandb_mirror" in words and str(folder).encode() in words:
            found.append(int(entry.parent.name))
    return found


def wait_until_gone(folder: Path, seconds: float) -> float:
    """Seconds until no mirror of the run is left; fails when one still is."""
    started = time.monotonic()
    while mirrors_of(folder):
        assert time.monotonic() - started < seconds, "the mirror outlived the trainer"
        time.sleep(0.05)
    return time.monotonic() - started


def sync(folder: Path, server: WandbServer) -> None:
    """``wandb sync``: W&B's own reader of offline runs, sending to ``server``."""
    parts = [str(path) for path in sorted((folder / "wandb").glob("offline-run-*"))]
    command = [sys.executable, "-m", "wandb", "sync", *parts]
    settings = environment(folder.parent, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60, cwd=folder.parent)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as running:
        yield running


def test_offline_run_is_complete_for_wandbs_own_reader_over_a_killed_and_a_resumed_start(
    tmp_path: Path, server: WandbServer
) -> None:
    folder = tmp_path / "mine"
    config = json.dumps({"optim": {"lr": 0.001}, "run": {"name": "mine"}})
    _, killed = tracked_run(folder, 1, 20, "--kill", "--wait-rows", "10", "--config", config)
    assert killed.returncode == -signal.SIGKILL
    assert wait_until_gone(folder, 9) < 9
    first_id = run_id(folder)
    times, done = tracked_run(folder, 13, 30, "--config", config)
    assert done.returncode == 0
    assert "Send it later with: wandb sync" in done.stderr
    assert times["start"] < 1
    assert times["log"] < 0.5
    assert times["finish"] < 8
    assert not times["imported_wandb"]
    assert "warning:" not in done.stderr
    assert run_id(folder) == first_id
    assert read_metrics(folder / "metrics.jsonl") == expected_rows(30)

    sync(folder, server)
    assert server.rows(first_id) == expected_rows(30)
    sent_config = json.loads(server.config[first_id])
    assert sent_config["optim"] == {"value": {"lr": 0.001}}
    assert sent_config["facts"] == {"value": {"n_params": 7}}


def test_online_resume_keeps_the_id_and_sends_every_row_once(tmp_path: Path, server: WandbServer) -> None:
    folder = tmp_path / "mine"
    online = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    _, killed = tracked_run(folder, 1, 20, "--kill", "--wait-rows", "10", **online)
    assert killed.returncode == -signal.SIGKILL
    wait_until_gone(folder, 9)
    first_id = run_id(folder)
    assert server.rows(first_id) == expected_rows(20)
    _, done = tracked_run(folder, 8, 30, **online)
    assert done.returncode == 0
    assert run_id(folder) == first_id
    assert f"/runs/{first_id}" in done.stderr
    assert server.rows(first_id) == expected_rows(30)


@pytest.mark.slow
def test_a_server_that_was_away_gets_the_rows_of_the_offline_part_too(tmp_path: Path, server: WandbServer) -> None:
    folder = tmp_path / "mine"
    with BadServer("refused") as away:
        options = ["--kill", "--wait-rows", "10", "--init-timeout", "2"]
        tracked_run(folder, 1, 20, *options, WANDB_BASE_URL=away.url, WANDB_API_KEY=KEY)
    wait_until_gone(folder, 9)
    tracked_run(folder, 15, 30, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    assert server.rows(run_id(folder)) == expected_rows(30)
    sync(folder, server)
    assert server.rows(run_id(folder)) == expected_rows(30)


SLOW_KINDS = ["refused", "401", "403", "429", "500", "garbage", "empty", "close"]


@pytest.mark.parametrize("kind", ["silent", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW_KINDS)])
def test_a_bad_server_costs_neither_rows_nor_time(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    with BadServer(kind) as bad:
        times, done = tracked_run(folder, 1, 30, WANDB_BASE_URL=bad.url, WANDB_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    assert times["start"] < 1
    assert times["log"] < 0.5
    assert times["finish"] < 8.5
    assert read_metrics(folder / "metrics.jsonl") == expected_rows(30)
    assert done.stderr.count("warning:") == 1
    assert "wandb sync" in done.stderr or "--send" in done.stderr
    assert "Traceback" not in done.stderr
    assert not mirrors_of(folder)
    assert list((folder / "wandb").glob("*run-*/*.wandb"))
    if kind == "silent":
        assert list((folder / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
def test_what_a_bad_server_missed_can_be_synced_later(tmp_path: Path, server: WandbServer) -> None:
    folder = tmp_path / "mine"
    with BadServer("silent") as bad:
        tracked_run(folder, 1, 30, WANDB_BASE_URL=bad.url, WANDB_API_KEY=KEY)
    sync(folder, server)
    assert server.rows(run_id(folder)) == expected_rows(30)


def test_a_terminal_without_a_login_is_never_asked(tmp_path: Path) -> None:
    """Standard streams are a terminal, as at a person's desk, where wandb itself shows a menu and waits."""
    folder = tmp_path / "mine"
    command = [sys.executable, "-m", "tests.faults.tracked_run", str(folder), "1", "5", "--mode", "online"]
    leader, follower = pty.openpty()
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=REPO,
        env=environment(tmp_path, TERM="xterm"),
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    shown = read_terminal(leader, process, limit=40)
    assert process.wait(timeout=1) == 0
    assert time.monotonic() - started < 40
    assert "no W&B login found" in shown
    assert not re.search(r"choice|API key and hit enter|\(1\)|create a w&b account", shown, re.IGNORECASE)


def read_terminal(leader: int, process: subprocess.Popen[bytes], limit: float) -> str:
    """What appears on the terminal until the process ends. Nothing is typed."""
    shown, deadline = b"", time.monotonic() + limit
    while time.monotonic() < deadline:
        ready, _, _ = select.select([leader], [], [], 0.1)
        try:
            data = os.read(leader, 65536) if ready else b""
        except OSError:  # the other side is closed
            break
        shown += data
        if not data and process.poll() is not None:
            break
    os.close(leader)
    if process.poll() is None:
        time.sleep(0.5)
    return shown.decode(errors="replace")


@contextmanager
def waiting_run(folder: Path, **more: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A run that has logged 20 steps and goes on once ``folder/go`` exists, and its mirror's process id."""
    command = [sys.executable, "-m", "tests.faults.tracked_run", str(folder), "1", "20", "--wait-for", "go"]
    variables = environment(folder.parent, **more)
    process = subprocess.Popen(
        command, cwd=REPO, env=variables, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        deadline = time.monotonic() + 30
        while not (folder / "wandb" / "sent.json").exists():
            assert time.monotonic() < deadline, "the mirror sent nothing"
            time.sleep(0.05)
        (mirror,) = mirrors_of(folder)
        yield process, mirror
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_server_that_dies_during_the_run_costs_one_warning_and_gets_the_rest_later(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    with WandbServer() as dying:
        online = {"WANDB_BASE_URL": dying.url, "WANDB_API_KEY": KEY}
        with waiting_run(folder, **online) as (process, _):
            dying.stop()
            started = time.monotonic()
            (folder / "go").touch()
            _, errors = process.communicate(timeout=30)
            assert time.monotonic() - started < 12
    assert process.returncode == 0
    assert errors.count("warning:") == 1
    assert read_metrics(folder / "metrics.jsonl") == expected_rows(20)
    name = run_id(folder)
    with WandbServer() as server:
        server.config = {name: "{}"}
        server.history = {name: [row | {"_step": i} for i, row in enumerate(expected_rows(7))]}
        server.summary = {name: '{"step": 7}'}  # what had arrived
        send(folder, server)
        assert server.rows(name) == expected_rows(20)
        send(folder, server)
        assert server.rows(name) == expected_rows(20)


def send(folder: Path, server: WandbServer) -> None:
    """What the warning at the end of an interrupted upload proposes."""
    command = [sys.executable, "-m", "llmkit.tracking.wandb_mirror", str(folder), "--send"]
    settings = environment(folder.parent, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    subprocess.run(command, env=settings, cwd=folder.parent, check=True, capture_output=True, timeout=60)


def test_a_killed_mirror_costs_one_warning(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    with waiting_run(folder) as (process, mirror):
        os.kill(mirror, signal.SIGKILL)
        (folder / "go").touch()
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert errors.count("warning:") == 1
    assert read_metrics(folder / "metrics.jsonl") == expected_rows(20)


@pytest.mark.slow
def test_a_killed_wandb_service_is_started_again(tmp_path: Path, server: WandbServer) -> None:
    folder = tmp_path / "mine"
    with waiting_run(folder) as (process, mirror):
        time.sleep(1.5)  # longer than wandb keeps rows in memory
        (service,) = children_of(mirror)
        os.kill(service, signal.SIGKILL)
        with (folder / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 21, "train/loss": 0.5}\n')
        (folder / "go").touch()
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "warning" not in errors
    sync(folder, server)
    assert server.rows(run_id(folder)) == [*expected_rows(20), {"step": 21, "train/loss": 0.5}]


def test_the_stop_button_reaches_the_trainer(tmp_path: Path) -> None:
    """W&B answers it with an interrupt of the process that called ``init``: here, the mirror."""
    with waiting_run(tmp_path / "mine") as (process, mirror):
        os.kill(mirror, signal.SIGINT)
        assert process.wait(timeout=10) == -signal.SIGTERM


def children_of(parent: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def test_a_tracker_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "wandb").write_text("in the way")
    times, done = tracked_run(folder, 1, 10)
    assert done.returncode == 0
    assert done.stderr.count("warning:") == 1
    assert times["finish"] < 0.5
    assert read_metrics(folder / "metrics.jsonl") == expected_rows(10)


def test_no_planted_secret_is_in_any_file_or_request(tmp_path: Path, server: WandbServer) -> None:
    folder = tmp_path / "mine"
    variables = {
        "WANDB_API_KEY": "wandbkey" + "0" * 32,
        "HF_TOKEN": "hf_" + "Q" * 30,
        "OPENAI_API_KEY": "sk-proj-" + "R" * 24,
        "AWS_SECRET_ACCESS_KEY": "aws/secret+value/" + "S" * 20,
        "DB_PASSWORD": "correct-horse-battery",
        "MY_SECRET": "plain-secret-words",
        "GITHUB_TOKEN": "ghp_" + "T" * 30,
        "SERVICE_CREDENTIALS": "user-and-pass-together",
        "WANDB_BASE_URL": server.url,
    }
    config = {
        "api_key": "config-key-1",
        "nested": {"password": "config-pass-2", "hub_token": "config-token-3", "list": [{"client_secret": "conf-4"}]},
        "data": {"path": ["https://bob:url-pass-5@host/x.txt", "https://url-token-6@host/y", "s3://b/z?token=query-7"]},
        "note": f"uses {variables['HF_TOKEN']} and {variables['DB_PASSWORD']}",
        "shapes": ["hf_" + "a1" * 12, "sk-" + "b2" * 12, "ghp_" + "c3" * 12, "AKIA" + "D4" * 8, "glpat-" + "e5" * 10],
        "header": "Authorization: Bearer " + "f6" * 12,
    }
    planted = [text for name, text in variables.items() if name != "WANDB_BASE_URL"]
    planted += ["config-key-1", "config-pass-2", "config-token-3", "conf-4", "url-pass-5", "url-token-6", "query-7"]
    planted += [*config["shapes"], "f6" * 12]  # type: ignore[misc]
    assert len(planted) >= 20
    _, done = tracked_run(folder, 1, 5, "--config", json.dumps(config), **variables)
    assert done.returncode == 0
    assert server.rows(run_id(folder)) == expected_rows(5)
    written = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    written |= {f"request {i}": body.encode() for i, body in enumerate(server.bodies)}
    written |= {"standard error": done.stderr.encode()}
    hits = [(secret, place) for place, text in written.items() for secret in planted if secret.encode() in text]
    assert hits == []
    assert json.loads(server.config[run_id(folder)])["nested"]["value"]["password"] == "***"
