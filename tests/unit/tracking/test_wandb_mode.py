"""The W&B mode follows from config, environment and files alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.tracking.wandb_mode import decide_mode

KEY = {"WANDB_API_KEY": "k" * 40}


def mode(wanted: str, environment: dict[str, str], home: Path) -> str:
    return decide_mode(wanted, environment, home, home).mode


@pytest.mark.parametrize(
    ("wanted", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", KEY, "online"),
        ("auto", {"WANDB_IDENTITY_TOKEN_FILE": "/x"}, "online"),
        ("auto", KEY | {"WANDB_MODE": "offline"}, "offline"),
        ("auto", KEY | {"WANDB_MODE": "dryrun"}, "offline"),
        ("auto", KEY | {"WANDB_MODE": "Disabled"}, "disabled"),
        ("auto", {"WANDB_MODE": "online"}, "offline"),  # no login: asking would block
        ("auto", KEY | {"WANDB_MODE": "nonsense"}, "online"),
        ("online", {}, "offline"),
        ("online", KEY | {"WANDB_MODE": "disabled"}, "online"),  # only auto asks the environment
        ("offline", KEY, "offline"),
        ("disabled", KEY, "disabled"),
    ],
)
def test_mode(wanted: str, environment: dict[str, str], expected: str, tmp_path: Path) -> None:
    assert mode(wanted, environment, tmp_path) == expected


@pytest.mark.parametrize(
    ("machine", "base_url", "expected"),
    [
        ("api.wandb.ai", "", "online"),
        ("api.forge.coreweave.com", "", "online"),
        ("wandb.mine.org", "", "offline"),
        ("wandb.mine.org", "https://wandb.mine.org", "online"),
        ("wandb.mine.org:8080", "http://wandb.mine.org:8080/", "online"),
        ("api.wandb.ai", "https://wandb.mine.org", "offline"),
    ],
)
def test_a_netrc_entry_counts_for_its_own_host(machine: str, base_url: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(f"machine {machine} login user password {'k' * 40}\ndefault login a password b\n")
    (tmp_path / ".netrc").chmod(0o600)
    environment = {"WANDB_BASE_URL": base_url} if base_url else {}
    assert mode("auto", environment, tmp_path) == expected


@pytest.mark.parametrize("text", ["machine", "machine api.wandb.ai login user password\n", "\xff\xfe", ""])
def test_a_netrc_that_cannot_be_read_is_no_login(text: str, tmp_path: Path) -> None:
    (tmp_path / "my-netrc").write_bytes(text.encode("latin-1"))
    assert mode("auto", {"NETRC": str(tmp_path / "my-netrc")}, tmp_path) == "offline"


def test_wandbs_settings_files_are_heard_and_the_nearer_one_wins(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "work"
    (home / ".config" / "wandb").mkdir(parents=True)
    (folder / "wandb").mkdir(parents=True)
    (home / ".config" / "wandb" / "settings").write_text("[default]\nmode = disabled\nbase_url = http://mine\n")
    (home / ".netrc").write_text(f"machine mine login user password {'k' * 40}\n")
    assert decide_mode("auto", {}, home, folder).mode == "disabled"
    (folder / "wandb" / "settings").write_text("[default]\nmode = online\n")
    assert decide_mode("auto", {}, home, folder).mode == "online"
    (folder / "wandb" / "settings").write_text("broken")
    assert decide_mode("auto", {}, home, folder).mode == "disabled"


def test_the_note_says_why(tmp_path: Path) -> None:
    assert "no W&B login" in decide_mode("auto", {}, tmp_path, tmp_path).note
    assert "nonsense" in decide_mode("auto", {"WANDB_MODE": "nonsense"}, tmp_path, tmp_path).note
    assert decide_mode("auto", KEY, tmp_path, tmp_path).note == ""
