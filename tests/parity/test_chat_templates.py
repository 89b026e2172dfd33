"""Rendered chats against ``apply_chat_template``, from every place in which a folder may keep a template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.tokenizers.chat_template import ChatTemplate
from llmkit.tokenizers.hf_json import HFTokenizer
from llmkit.tokenizers.load import load_tokenizer
from tests.unit.tokenizers.chat_styles import CHATML, CHATS, STYLES, ZEPHYR
from tests.unit.tokenizers.strings import trained, trained_byte_level

pytest.importorskip("transformers")
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"a": "<b>"}}}]


def _folder(folder: Path, **config: Any) -> Path:
    trained_byte_level().save(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config), encoding="utf-8")
    return folder


def _theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("style", STYLES)
def test_styles(style: str, tmp_path: Path) -> None:
    (_folder(tmp_path) / "chat_template.jinja").write_text(STYLES[style], encoding="utf-8", newline="")
    theirs = _theirs(tmp_path)
    ours = ChatTemplate.load(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert ours is not None
    assert isinstance(tokenizer, HFTokenizer)
    for chat in CHATS:
        for extra in ({}, {"tools": TOOLS}, {"add_generation_prompt": True, "enable": True}):
            text = theirs.apply_chat_template(chat, tokenize=False, **extra)
            assert ours.render(chat, **extra) == text
            ids = theirs.apply_chat_template(chat, return_dict=False, **extra)
            assert tokenizer.encode_symbols(text) == ids


@pytest.mark.parametrize("listed", [CHATML, [{"name": "default", "template": CHATML}]])
def test_a_template_in_the_configuration_and_its_copies(listed: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_folder(tmp_path / "source", chat_template=listed))
    text = _theirs(tmp_path / "source").apply_chat_template(CHATS[1], tokenize=False)
    tokenizer.save(tmp_path / "copy")
    found = ChatTemplate.load(tmp_path / "source")
    assert found is not None
    _folder(tmp_path / "other")
    found.save(tmp_path / "other")
    for folder in ("source", "copy", "other"):
        assert _theirs(tmp_path / folder).apply_chat_template(CHATS[1], tokenize=False) == text
        ours = ChatTemplate.load(tmp_path / folder), ChatTemplate.of(load_tokenizer(tmp_path / folder))
        assert [template and template.render(CHATS[1]) for template in ours] == [text, text]


def test_several_templates(tmp_path: Path) -> None:
    listed = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "{{ tools | tojson }}"}]
    source = _folder(tmp_path / "source", chat_template=[*listed, {"name": "short", "template": ZEPHYR}])
    _theirs(source).save_pretrained(tmp_path / "today")
    load_tokenizer(tmp_path / "today").save(tmp_path / "copy")
    for folder in (source, tmp_path / "today", tmp_path / "copy"):
        theirs, ours = _theirs(folder), ChatTemplate.load(folder)
        assert ours is not None
        assert sorted(ours.sources) == ["default", "short", "tool_use"]
        assert ours.render(CHATS[0]) == theirs.apply_chat_template(CHATS[0], tokenize=False)
        with_tools = theirs.apply_chat_template(CHATS[0], tools=TOOLS, tokenize=False)
        assert ours.render(CHATS[0], tools=TOOLS) == with_tools
        short = theirs.apply_chat_template(CHATS[0], chat_template="short", tokenize=False)
        assert ours.render(CHATS[0], template="short") == short


def test_a_trained_sentencepiece_tokenizer_keeps_the_template_beside_it(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    trained("bpe").save(source)
    (source / "chat_template.jinja").write_text(ZEPHYR, encoding="utf-8")
    load_tokenizer(source).save(copy)
    ours, carried = ChatTemplate.load(copy), ChatTemplate.of(load_tokenizer(copy))
    assert ours is not None
    assert carried is not None
    text = _theirs(copy).apply_chat_template(CHATS[1], tokenize=False)
    assert ours.render(CHATS[1]) == carried.render(CHATS[1]) == text
    ids = _theirs(copy).apply_chat_template(CHATS[1], return_dict=False)
    assert trained("bpe").encode_symbols(text) == ids
