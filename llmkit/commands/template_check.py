"""Whether ``transformers`` makes the same prompts of an exported chat template, in a process with limits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from llmkit.commands.exported import Exported, Finding, mismatch
from llmkit.commands.template_worker import OVER
from llmkit.errors import ConfigError, DataError
from llmkit.tokenizers.chat_template import MAX_BYTES, PASSED_ON, START_SECONDS, ChatTemplate

_USER = {"role": "user", "content": "What is 2 + 2?"}
_ANSWER = {"role": "assistant", "content": "It is 4."}
CHATS = (
    [_USER],
    [_USER, _ANSWER, {"role": "user", "content": "  And 3 + 3?\n"}],
    [{"role": "system", "content": "You are brief."}, _USER, _ANSWER],
)
Chat = tuple[list[dict[str, str]], bool]  # messages, and whether an answer is asked for


def check_chats(exported: Exported, template: ChatTemplate) -> Finding:
    """What the template makes of a few conversations. One that it refuses in our sandbox is not tried in another."""
    chats: list[Chat] = []
    expected = []
    for chat in CHATS:
        for prompted in (False, True):
            try:
                expected.append(template.render(chat, add_generation_prompt=prompted))
            except (ConfigError, DataError):  # templates may refuse an order of roles, a system message ...
                continue
            chats.append((chat, prompted))
    for got, ours in zip(_rendered_there(exported, template, chats) if chats else [], expected, strict=True):
        if got != ours:
            raise mismatch(exported, f"the chat template gives {got!r:.200} there, not {ours!r:.200}")
    return Finding("chat template", f"{len(chats)} prompts equal, {2 * len(CHATS) - len(chats)} refused by it")


def _rendered_there(exported: Exported, template: ChatTemplate, chats: Sequence[Chat]) -> list[str]:
    """By the library. Raises ``CheckpointError`` when it takes too long or too much."""
    limits = {"seconds": template.seconds, "max_chars": template.max_chars, "max_bytes": MAX_BYTES}
    request = {"folder": str(exported.folder.resolve()), "file": exported.file, "chats": chats, **limits}
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    path = os.pathsep.join(filter(None, sys.path))
    own = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(  # which kills the process on a stop signal too
            [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py"))],
            input=json.dumps(request),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**passed_on, **own},
            encoding="utf-8",
            timeout=START_SECONDS + template.seconds * len(chats),
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise mismatch(exported, "the chat template takes too long in transformers") from None
    if sys.platform != "win32" and done.returncode == -signal.SIGALRM:
        raise mismatch(exported, "the chat template takes too long in transformers")
    if done.returncode == OVER:
        raise mismatch(exported, "the chat template takes too much memory or writes too much in transformers")
    if done.returncode:
        raise mismatch(exported, f"the process that renders it in transformers died (status {done.returncode})")
    replies: list[str] = json.loads(done.stdout)
    return replies
