"""The text log is safe to look at, keeps secrets, and never stops a run."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmkit.tracking import logs
from llmkit.tracking.terminal import can_redraw

logger = logging.getLogger("llmkit.test")


@pytest.fixture(autouse=True)
def _clean_logger() -> Iterator[None]:
    root = logging.getLogger("llmkit")
    before = (root.level, root.propagate, list(root.handlers))
    yield
    for handler in root.handlers:
        handler.close()
    root.level, root.propagate, root.handlers = before


def test_lines_go_to_stderr_and_to_the_file_with_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup_logging(0)
    logs.log_to(tmp_path / "train.log")
    logger.info("hello %s", "[bold]you[/bold]")
    logger.debug("not shown")
    logger.warning("careful")
    assert capsys.readouterr().err == "hello [bold]you[/bold]\nwarning: careful\n"
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line[20:] for line in lines] == ["hello [bold]you[/bold]", "warning: careful"]
    assert lines[0][:4].isdigit()


def test_other_ranks_are_quiet_but_for_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup_logging(3)
    logger.info("not shown")
    logger.warning("odd")
    assert capsys.readouterr().err == "[rank 3] warning: odd\n"


def test_setting_up_twice_does_not_double_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        logs.setup_logging(0, debug=True)
        logs.log_to(tmp_path / "train.log")
        logs.log_to(tmp_path / "train.log")
    logger.debug("once")
    assert capsys.readouterr().err == "once\n"
    assert (tmp_path / "train.log").read_text().count("once") == 1


def test_data_in_a_log_line_cannot_steer_a_terminal_or_forge_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup_logging(0)
    logger.info("a\x1b[2Jb\x9bc\x07\rd\u202ee\u2028f\nwarning: forged ok \u00e9\u4f60\U0001f600")
    assert capsys.readouterr().err == (
        "a\\x1b[2Jb\\x9bc\\x07\\rd\\u202ee\\u2028f\n  warning: forged ok \u00e9\u4f60\U0001f600\n"
    )


def test_secrets_are_masked_also_in_tracebacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOME_API_KEY", "very-secret-value")
    logs.setup_logging(0)
    logs.log_to(tmp_path / "train.log")
    try:
        raise ValueError("very-secret-value")
    except ValueError:
        logger.exception("failed with %s", "very-secret-value")
    text = (tmp_path / "train.log").read_text()
    assert "very-secret-value" not in text
    assert "ValueError: ***" in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_costs_only_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup_logging(0)
    logs.log_to(Path("/dev/full"))
    logger.info("one")
    logger.info("two")
    assert capsys.readouterr().err == "one\ntwo\n"


def test_a_log_file_that_cannot_be_opened_is_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup_logging(0)
    logs.log_to(tmp_path / "nowhere" / "train.log")
    assert capsys.readouterr().err.startswith("warning: no log file")


CLOSED = (
    "import logging, sys\n"
    "from llmkit.tracking.logs import setup_logging\n"
    "setup_logging(0)\n"
    "for i in range(2000): logging.getLogger('llmkit.x').info('a long enough line to fill the pipe %d', i)\n"
    "open(sys.argv[1], 'w').write('went on')\n"
)


@pytest.mark.parametrize("redirect", ["2>&-", ">&- 2>&-", "2>/dev/full", "2> >(exec 0<&-)"])
def test_a_stream_that_is_closed_full_or_without_a_reader_does_not_stop_the_program(
    tmp_path: Path, redirect: str
) -> None:
    command = f'exec "$0" -c "$1" "$2" {redirect}'
    arguments = ["bash", "-c", command, sys.executable, CLOSED, str(tmp_path / "done")]
    done = subprocess.run(arguments, timeout=30, env=os.environ)
    assert done.returncode == 0
    assert (tmp_path / "done").read_text() == "went on"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"CI": "true"}, False), ({"TERM": "dumb"}, False), ({"TERM": ""}, False)],
)
def test_a_live_view_needs_a_terminal_that_redraws(
    variables: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", _Terminal())
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert can_redraw() == expected


def test_no_live_view_into_a_file_or_a_closed_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert not can_redraw()
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    assert not can_redraw()
