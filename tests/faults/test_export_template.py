"""A chat template that is harmless in llmkit's sandbox and hostile in that of ``transformers``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from llmkit.commands import export_check
from llmkit.commands.exported import Exported, Subject
from llmkit.commands.template_check import check_chats
from llmkit.errors import CheckpointError, Stopped
from llmkit.tokenizers.chat_template import ChatTemplate
from tests.unit.commands.exporting import trained

pytest.importorskip("jinja2")
pytest.importorskip("transformers")
HOSTILE = {
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes too long"),
    "number": ("{{ 7 ** (7 ** 9 * messages | length) }}", "takes too long"),
    "memory": ("{{ ('a' * (4 * 10 ** 9 * messages | length)) | length }}", "takes too much memory"),
    "text": ("{% for i in range(9999) %}{{ 'a' * 99 }}{% endfor %}", "writes too much"),
}


def written(folder: Path, elsewhere: str) -> tuple[Exported, ChatTemplate]:
    """Files with a template that does ``elsewhere`` only where it is not in llmkit's sandbox."""
    trained("wordpiece").save(folder)
    source = "{% if 'lambda' in (strftime_now | string) %}ok{% else %}" + elsewhere + "{% endif %}"
    (folder / "chat_template.jinja").write_text(source)
    template = ChatTemplate({"default": source}, {}, seconds=1.0, max_chars=10_000)
    return Exported(folder, None, "float32", cast(Subject, None), template, []), template


@pytest.mark.skipif("sys.platform != 'linux'", reason="memory is bounded on Linux")
@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_stopped(name: str, tmp_path: Path) -> None:
    elsewhere, what = HOSTILE[name]
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=what):
        check_chats(*written(tmp_path, elsewhere))
    assert time.monotonic() - start < 100


def test_another_text_is_a_mismatch(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gives 'other' there, not 'ok'"):
        check_chats(*written(tmp_path, "other"))


def _stop(*args: object, **options: object) -> None:
    raise Stopped("stopped by SIGTERM")


@pytest.mark.parametrize(
    "read",
    [
        lambda exported: export_check._opened(exported, SimpleNamespace(from_pretrained=_stop)),
        export_check._opened_tokenizer,
    ],
)
def test_a_stop_signal_is_no_mismatch(
    read: Callable[[Exported], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = SimpleNamespace(AutoTokenizer=SimpleNamespace(from_pretrained=_stop))
    monkeypatch.setattr(export_check, "import_module", lambda name: library)
    with pytest.raises(Stopped):
        read(Exported(tmp_path, None, "float32", cast(Subject, None), None, []))
