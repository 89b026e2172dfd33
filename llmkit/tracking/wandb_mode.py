"""Whether a run is mirrored to W&B, decided from the config, the environment and W&B's own files alone.

No network, no prompt, no import of wandb: its ``login`` asks on a terminal and waits for a server.
"""

from __future__ import annotations

import configparser
import netrc
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

Mode = Literal["online", "offline", "disabled"]

# What WANDB_MODE may say; "run" and "dryrun" are its old words.
_WORDS: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
_DEFAULT_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")  # of wandb 0.31, and before


class Decision(NamedTuple):
    """``note`` is the line for the user, empty when there is nothing to say."""

    mode: Mode
    note: str = ""


def decide_mode(wanted: str, environment: Mapping[str, str], home: Path, folder: Path) -> Decision:
    """``wanted`` is the config's ``auto|online|offline|disabled``. ``folder`` is the working directory."""
    settings = _settings_files(environment, home, folder)
    mode, note = wanted, ""
    if wanted == "auto":
        said = environment.get("WANDB_MODE") or settings.get("mode", "")
        mode = _WORDS.get(said.lower(), "auto")
        if said and mode == "auto":
            note = f"WANDB_MODE={said} is not a mode of W&B; "
    if mode in ("offline", "disabled"):
        return Decision(_WORDS[mode], note)
    host = environment.get("WANDB_BASE_URL") or settings.get("base_url", "")
    if has_credential(host, environment, settings, home):
        return Decision("online", note)
    return Decision("offline", note + "no W&B login found (WANDB_API_KEY or `wandb login`)")


def has_credential(host_url: str, environment: Mapping[str, str], settings: Mapping[str, str], home: Path) -> bool:
    """Is there an API key or token for the server at ``host_url``; empty means W&B's own."""
    if any(environment.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    if settings.get("api_key") or settings.get("identity_token_file"):
        return True
    hosts = (urlsplit(host_url).netloc,) if host_url else _DEFAULT_HOSTS
    named = environment.get("NETRC")
    files = (Path(named).expanduser(),) if named else (home / ".netrc", home / "_netrc")
    return any(_netrc_has(path, host) for path in files for host in hosts)


def _netrc_has(path: Path, host: str) -> bool:
    try:
        entry = netrc.netrc(str(path)).hosts.get(host)  # ``authenticators`` would take the "default" entry
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False
    return entry is not None and bool(entry[2])


def _settings_files(environment: Mapping[str, str], home: Path, folder: Path) -> dict[str, str]:
    """What ``wandb login --host``, ``wandb offline`` and the like left behind; the working directory's file wins."""
    config = Path(environment.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb")
    parser = configparser.ConfigParser(interpolation=None)
    for path in (config / "settings", folder / "wandb" / "settings", folder / ".wandb" / "settings"):
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, OSError, UnicodeDecodeError):
            continue
    return dict(parser["default"]) if parser.has_section("default") else {}
