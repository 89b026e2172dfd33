"""Hostile chat templates: a typed error, nothing executed, no file made, and the next template renders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmkit.errors import DataError
from llmkit.tokenizers import chat_template
from llmkit.tokenizers.chat_template import ChatTemplate

pytest.importorskip("jinja2")
CHAT = [{"role": "user", "content": "Hello"}]
FORBIDDEN = {  # ways from a value to the interpreter; MARK is a file that must not be made
    "class": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "string": "{{ ''.__class__.__base__.__subclasses__()[0] }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch MARK').read() }}",
    "joiner": "{{ joiner.__init__.__globals__.os.system('touch MARK') }}",
    "helper": "{{ raise_exception.__globals__['sys'].modules['os'].system('touch MARK') }}",
    "strftime": "{{ strftime_now.__globals__.__builtins__.open('MARK', 'w') }}",
    "dict": "{{ dict.__init__.__globals__ }}",
    "namespace": "{{ namespace(__class__=1) }}",
    "namespace later": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "attr filter": "{{ (messages | attr('__class__')).__mro__ }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "format map": "{{ '{a.__class__.__mro__}'.format_map({'a': messages}) }}",
    "map attribute": "{{ [messages] | map(attribute='__class__') | list | first | attr('mro') }}{{ [].append(1) }}",
    "self": "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context.environment.from_string }}",
    "import": "{% import 'os' as os %}{{ os.system('touch MARK') }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "changes a message": "{{ messages.append(1) }}",
    "changes a mapping": "{{ messages[0].update({'role': 'x'}) }}",
    "generator": "{% set g = messages | map('upper') %}{{ g.gi_frame.f_globals }}{{ g.gi_code.co_consts }}",
}
FLOODS = {
    "one loop": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "multiplied text": "{{ 'a' * 10 ** 10 }}",
    "multiplied list": "{{ [0] * 10 ** 10 }}",
    "padded": "{{ 'a' | center(10 ** 10) }}",
    "formatted": "{{ '%10000000000d' | format(1) }}",
    "doubled": "{% set n = namespace(s='a' * 1000) %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "joined": "{{ range(99999) | join('a' * 10 ** 6) }}",
    "much text": "{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
    "macro": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "nested": "{% for i in " + "(" * 5000 + ")" * 5000 + " %}{% endfor %}",
}
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "number": "{{ 7 ** 7 ** 99999999 }}",
}


def _fails(source: str, seconds: float = 10, expected: str = "") -> None:
    begin = time.monotonic()
    with pytest.raises(DataError, match=f"the chat template failed: .*{expected}") as caught:
        ChatTemplate({"default": source}, {}, "folder", seconds=seconds, max_chars=1 << 20).render(CHAT)
    assert caught.value.where == "folder"
    assert len(str(caught.value)) < 1000
    assert time.monotonic() - begin < 60
    assert ChatTemplate({"default": "{{ messages[0].content }}"}, {}).render(CHAT) == "Hello"


@pytest.mark.parametrize("name", FORBIDDEN)
def test_ways_out_are_closed(name: str, tmp_path: Path) -> None:
    _fails(FORBIDDEN[name].replace("MARK", str(tmp_path / "made")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FLOODS)
def test_floods_are_stopped(name: str) -> None:
    much = name == "much text"
    _fails(FLOODS[name], seconds=20 if much else 3, expected="characters come out" if much else "")


@pytest.mark.skipif(sys.platform == "win32", reason="no alarm signal there")
def test_a_worker_ends_though_nobody_is_left_to_end_it() -> None:
    """The program that asked was killed while an endless template was rendered."""
    ask = {"template": ENDLESS["loops"], "variables": {}, "max_chars": 9, "seconds": 0.2}
    script = Path(chat_template.__file__).with_name("chat_worker.py")
    worker = subprocess.Popen([sys.executable, "-P", script, str(1 << 30)], stdin=subprocess.PIPE, text=True)
    worker.communicate(json.dumps(ask) + "\n", timeout=60)
    assert worker.returncode == -signal.SIGALRM


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_work_is_stopped(name: str) -> None:
    _fails(ENDLESS[name], seconds=0.3, expected="took more than 0.3 s")


def test_what_a_message_says_is_never_run() -> None:
    chat = [{"role": "user", "content": "{{ 7 * 7 }}{% for i in range(9) %}"}]
    assert ChatTemplate({"default": "{{ messages[0].content }}"}, {}).render(chat) == chat[0]["content"]


def test_the_process_has_no_secrets_and_is_replaced_when_it_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate({"default": "{{ messages[0].content }}"}, {})
    chat_template._stop()
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert template.render(CHAT) == "Hello"
    (worker,) = (chat_template._workers[os.getpid()],)
    if Path("/proc").is_dir():
        assert b"secret" not in Path(f"/proc/{worker.pid}/environ").read_bytes()
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert template.render(CHAT) == "Hello"
    chat_template._stop()
    assert not chat_template._workers
