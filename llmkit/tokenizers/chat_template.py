"""Chat templates: how a conversation is written as the text that a model was trained on. Extra ``hf`` (jinja2).

A template comes with downloaded weights and is a program. It is rendered by ``chat_worker``, a process of its own with
bounded memory, time and output.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from llmkit.errors import ConfigError, DataError, missing_extra
from llmkit.tokenizers.added_tokens import ROLES
from llmkit.tokenizers.bert_files import named
from llmkit.tokenizers.folder import MAP_FILE, read_json
from llmkit.tokenizers.hf_files import CONFIG_FILE, TEMPLATE_FILE, TEMPLATE_FOLDER, template_files

DEFAULT = "default"
_FOR_TOOLS = "tool_use"
_SETTING = "chat_template"  # in tokenizer_config.json
MAX_BYTES = 1 << 30  # address space of the process that renders
_MAX_CHARS = 1 << 24
_SECONDS = 10.0
START_SECONDS = 120.0  # a busy machine may take long to start a process
_SAFE_JINJA = (3, 1, 6)  # older ones have known ways out of the sandbox
_NAME = re.compile(r"\w[\w.-]*")  # of a template; it becomes the name of a file
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ", "LANG", "LC_ALL")  # no secrets

# For a tokenizer without a template: names of roles before the turns, the end token after those of the assistant
PLAIN = """\
{{- bos_token -}}
{%- for turn in messages -%}
{{- turn.role | capitalize }}: {{ turn.content }}{{ eos_token if turn.role == 'assistant' }}
{% endfor -%}
{%- if add_generation_prompt %}Assistant:{% endif -%}"""

Message = Mapping[str, Any]  # role, content, and whatever else the template reads


@dataclass(frozen=True)
class ChatTemplate:
    """The chat templates of a tokenizer, by name, and its special tokens, which templates write."""

    sources: Mapping[str, str]
    special_names: Mapping[str, str]  # role -> token, such as eos_token -> </s>
    where: str = ""
    seconds: float = field(default=_SECONDS, kw_only=True)  # a rendering may take
    max_chars: int = field(default=_MAX_CHARS, kw_only=True)  # a rendering may have

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """From ``chat_template.jinja`` and ``additional_chat_templates``, else ``tokenizer_config.json``.

        None when the folder has none. Raises ``DataError`` when one is there but is not text.
        """
        settings = {**read_json(folder / MAP_FILE), **read_json(folder / CONFIG_FILE)}
        names = {role: name for role in ROLES if (name := named(settings, role)) is not None}
        return cls._found(settings, template_files(folder), names, str(folder))

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate | None:
        """The template that a loaded tokenizer carries, whatever file it came from; None when it has none."""
        carried = getattr(tokenizer, "chat_template_files", None)
        if carried is None:
            return None
        settings, files = carried
        return cls._found(settings, files, tokenizer.special_names, "the tokenizer")

    @classmethod
    def _found(
        cls, settings: Mapping[str, Any], files: Mapping[str, bytes], names: Mapping[str, str], where: str
    ) -> ChatTemplate | None:
        try:
            sources = {_name_of(file): data.decode() for file, data in files.items()}
        except UnicodeDecodeError as error:
            raise DataError(f"the chat template is no UTF-8 text: {error}", where=where) from error
        sources = sources or _sources(settings.get(_SETTING), where)
        return cls(sources, names, where) if sources else None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The text of a conversation, ending with the beginning of an answer if ``add_generation_prompt``.

        ``template`` is the name of one of several; null: ``tool_use`` where there are tools and it exists, else
        ``default``. ``extra`` are variables of the template; values must be plain data. Raises ``ConfigError`` for an
        unknown name, and ``DataError`` for messages the template refuses and for a template that fails, takes too long
        or writes too much.
        """
        if template is None:
            template = _FOR_TOOLS if tools is not None and _FOR_TOOLS in self.sources else DEFAULT
        if template not in self.sources:
            known = ", ".join(sorted(self.sources))
            raise ConfigError(f"there is no chat template {template!r}", where=self.where, fix=f"there are: {known}")
        if not messages:
            raise DataError("a conversation needs a message", where=self.where)
        known_values = [{name: value for name, value in message.items() if value is not None} for message in messages]
        variables = {**self.special_names, "tools": tools, "documents": None, **extra}
        variables |= {"messages": known_values, "add_generation_prompt": add_generation_prompt}
        try:
            limits = {"max_chars": self.max_chars, "seconds": self.seconds}
            line = json.dumps({"template": self.sources[template], "variables": variables, **limits})
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"messages must be plain data: {error}", where=self.where) from error
        reply = _answer(line, self.seconds)
        if "text" not in reply:
            raise DataError(f"the chat template failed: {reply.get('error')}", where=self.where)
        return str(reply["text"])

    def save(self, folder: Path) -> None:
        """As today's folders have it: ``chat_template.jinja``, the others in ``additional_chat_templates``."""
        for name, source in self.sources.items():
            if not _NAME.fullmatch(name):
                raise DataError(f"{name!r} cannot be the name of a chat template", where=self.where)
            file = folder / TEMPLATE_FILE if name == DEFAULT else folder / TEMPLATE_FOLDER / f"{name}.jinja"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source, encoding="utf-8", newline="")


def render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """A conversation by the template of a loaded tokenizer. Raises ``ConfigError`` where it has none."""
    template = ChatTemplate.of(tokenizer)
    if template is None:
        fix = f"put a {TEMPLATE_FILE} beside its files"
        raise ConfigError("the tokenizer has no chat template", where="tokenizer", fix=fix)
    return template.render(messages, add_generation_prompt=add_generation_prompt)


def with_template(tokenizer: Any) -> tuple[Any, bool]:
    """(the tokenizer, False), or (the tokenizer with ``PLAIN``, True) where it has no chat template."""
    if ChatTemplate.of(tokenizer) is not None:
        return tokenizer, False
    return tokenizer.with_chat_template(PLAIN), True


def _name_of(file: str) -> str:
    return DEFAULT if file == TEMPLATE_FILE else PurePosixPath(file).stem


def _sources(setting: Any, where: str) -> dict[str, str]:
    """From ``tokenizer_config.json``: one template, or a list of them with names."""
    if setting is None:
        return {}
    listed = [{"name": DEFAULT, "template": setting}] if isinstance(setting, str) else setting
    try:
        sources = {item["name"]: item["template"] for item in listed}
    except (TypeError, KeyError):
        sources = {"": None}
    if not all(isinstance(text, str) for pair in sources.items() for text in pair):
        raise DataError(f"{_SETTING} must be a text, or a list of names and texts", where=where)
    return sources


# -- the process that renders ---------------------------------------------------------------------------------------

_lock = threading.Lock()
_workers: dict[int, subprocess.Popen[str]] = {}  # by the process that started it: a fork must not share its pipes


def _answer(line: str, seconds: float) -> dict[str, Any]:
    """What the worker says to a request. One that is late, or dies, is replaced with the next request."""
    with _lock:
        worker = _worker()
        stopped = threading.Event()
        late = threading.Timer(seconds, _kill, (worker, stopped))
        late.start()
        try:
            said = _ask(worker, line)
        finally:
            late.cancel()
        if said.endswith("\n"):
            reply: dict[str, Any] = json.loads(said)
            return reply
        _stop()
        return {"error": f"it took more than {seconds:g} s" if stopped.is_set() else "its process died"}


def _kill(worker: subprocess.Popen[str], stopped: threading.Event) -> None:
    stopped.set()
    worker.kill()


def _ask(worker: subprocess.Popen[str], line: str) -> str:
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(line + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return ""
    return worker.stdout.readline()


def _worker() -> subprocess.Popen[str]:
    """The running one, or a new one that has shown that it runs."""
    worker = _workers.get(os.getpid())
    if worker is not None and worker.poll() is None:
        return worker
    _stop()
    _check_jinja()
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    worker = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("chat_worker.py")), str(MAX_BYTES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**passed_on, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONDONTWRITEBYTECODE": "1"},
        encoding="utf-8",
        start_new_session=True,  # a Ctrl-C is for the program, which closes the pipe when it ends
    )
    _workers[os.getpid()] = worker
    hello = json.dumps({"template": "ready", "variables": {}, "max_chars": 9, "seconds": START_SECONDS})
    if "ready" not in _ask(worker, hello):
        _stop()
        raise DataError("the process that renders chat templates does not start", where="chat template")
    return worker


def _check_jinja() -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("jinja2")
    except PackageNotFoundError:
        raise missing_extra("jinja2", "hf") from None
    if tuple(int(part) if part.isdigit() else 0 for part in found.split(".")[:3]) < _SAFE_JINJA:
        raise missing_extra(f"a jinja2 without known ways out of its sandbox (3.1.6; this is {found})", "hf")


@atexit.register
def _stop() -> None:
    """End this process's worker."""
    worker = _workers.pop(os.getpid(), None)
    if worker is None:
        return
    worker.kill()
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    worker.wait()
