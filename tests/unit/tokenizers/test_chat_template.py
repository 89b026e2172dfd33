"""What a template may use, what it is given, and which messages are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from llmkit.errors import ConfigError, DataError, SetupError
from llmkit.tokenizers import chat_template
from llmkit.tokenizers.chat_template import ChatTemplate
from tests.unit.tokenizers.chat_styles import CHATML

pytest.importorskip("jinja2")
HELLO = [{"role": "user", "content": "Hello"}]


def _render(source: str, messages: Any = HELLO, **extra: Any) -> str:
    return ChatTemplate({"default": source}, {"eos_token": "</s>"}).render(messages, **extra)


def test_chatml_by_hand() -> None:
    before = "<|im_start|>system\nYou answer questions.<|im_end|>\n"
    assert _render(CHATML) == f"{before}<|im_start|>user\nHello<|im_end|>\n"
    assert _render(CHATML, add_generation_prompt=True).endswith("Hello<|im_end|>\n<|im_start|>assistant\n")


def test_helpers() -> None:
    assert _render("{{ strftime_now('%%') }}{{ {'a': '<é>'} | tojson }}{{ eos_token }}") == '%{"a": "<é>"}</s>'
    assert _render("{% generation %}{{ x }}{% endgeneration %}!", x=[1, None]) == "[1, None]!"
    assert _render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert _render("{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}{{ n.a }}{{ dict(b=2).b }}") == "22"
    assert _render("{{ tools is none and documents is none }}{{ missing }}") == "True"
    assert _render("{{ messages[0].name is defined }}", [{**HELLO[0], "name": None}]) == "False"


def test_a_template_speaks_its_mind() -> None:
    with pytest.raises(DataError, match="two users in a row"):
        _render("{{ raise_exception('two users in a row') }}")
    with pytest.raises(DataError, match="TemplateSyntaxError"):
        _render("{% if %}")
    assert _render("still here") == "still here"


def test_what_cannot_be_rendered() -> None:
    template = ChatTemplate({"default": "a", "b": "c"}, {}, "here")
    assert template.render(HELLO, template="b") == "c"
    with pytest.raises(ConfigError, match="no chat template 'x'") as caught:
        template.render(HELLO, template="x")
    assert (caught.value.where, caught.value.fix) == ("here", "there are: b, default")
    with pytest.raises(DataError, match="needs a message"):
        template.render([])
    with pytest.raises(DataError, match="plain data"):
        template.render([{"role": "user", "content": object()}])


def test_none_and_damaged(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    assert ChatTemplate.of(object()) is None
    for wrong in (7, [7], [{"name": "a"}], {"default": 1}, [{"name": 1, "template": "a"}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": wrong}))
        with pytest.raises(DataError, match="chat_template must be") as caught:
            ChatTemplate.load(tmp_path)
        assert caught.value.where == str(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="no UTF-8"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize("name", ["../out", "a/b", "a\\b", "", "..", "C:x/.."])
def test_a_name_cannot_leave_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be the name"):
        ChatTemplate({name: "text"}, {}).save(tmp_path / "in" / "here")
    assert not list(tmp_path.rglob("*.jinja"))


def test_jinja_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    chat_template._stop()
    monkeypatch.setattr(metadata, "version", lambda name: "3.1.5")
    with pytest.raises(SetupError, match="3\\.1\\.6"):
        _render("a")

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(SetupError, match="jinja2") as caught:
        _render("a")
    assert caught.value.fix == "pip install 'llmkit[hf]'"


def test_importing_it_is_light() -> None:
    import subprocess

    program = "import sys, llmkit.tokenizers.chat_template; print('jinja2' in sys.modules, 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False False\n"
