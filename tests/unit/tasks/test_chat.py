"""Chat: what is read, which tokens are trained, what is cut, and templates with a mind of their own."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import BadExample, ConfigError
from llmkit.interfaces import Row
from llmkit.metrics.diversity import distinct_n
from llmkit.task_interface import Prediction, Question
from llmkit.tasks.messages import read_messages
from llmkit.tokenizers.chat_template import PLAIN
from llmkit.tokenizers.hf_json import HFTokenizer
from tests.unit.tasks.support import ask, task
from tests.unit.tokenizers.chat_styles import CHATML, GEMMA, LLAMA_2, LLAMA_3, ZEPHYR
from tests.unit.tokenizers.strings import trained, trained_byte_level

pytest.importorskip("jinja2")
pytest.importorskip("tokenizers")

WIDE = 1 << 20
SYMBOLS = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>"),
)
# Without "Today is", which another second may change
STYLES = {
    "chatml": CHATML,
    "llama 2": LLAMA_2,
    "llama 3": LLAMA_3.replace("strftime_now('%d %b %Y')", "'now'"),
    "zephyr": ZEPHYR,
    "gemma": GEMMA,
    "plain": PLAIN,
}
ENDS = {"chatml": "<|im_end|>", "llama 3": "<|eot_id|>", "gemma": "<end_of_turn>"}
TOKENIZERS = ("bpe", "byte level")


@cache
def as_llama_splits() -> HFTokenizer:
    """Byte-level BPE with the rules of Llama 3 for where words end."""
    content = json.loads(trained_byte_level()._content)
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps = [split, {**content["pre_tokenizer"], "use_regex": False}]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    return HFTokenizer(json.dumps(content), {}, {}, "test")


@cache
def chatting(kind: str, style: str) -> Any:
    """A tokenizer that has the symbols of all styles, with the template of one."""
    base: Any = trained("bpe") if kind == "bpe" else as_llama_splits()
    return base.with_symbols(SYMBOLS).with_chat_template(STYLES.get(style, style))


def turns(*said: str, system: str | None = None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return [*first, *({"role": roles[i % 2], "content": text} for i, text in enumerate(said))]


def row_of(messages: Any, tokenizer: Any, max_len: int = WIDE, cut: bool = False, **changes: Any) -> Row:
    chat = task("chat", **changes)
    (row,) = chat.rows(ask(chat, messages=messages), tokenizer, "decoder", max_len, cut=cut)
    return row


def trained_texts(row: Row, tokenizer: Any) -> list[str]:
    """Every run of trained ids as text, the name of its end token included."""
    assert row.answer is not None
    assert row.answer.trained is not None
    texts, run = [], []
    for index, on in zip([*row.ids, 0], [*row.answer.trained, False], strict=True):
        if on:
            run.append(int(index))
        elif run:
            texts.append(tokenizer.decode(run) + symbol_of(tokenizer, run[-1]))
            run = []
    return texts


def symbol_of(tokenizer: Any, index: int) -> str:
    (name,) = [name for name in (*SYMBOLS, "</s>") if tokenizer.encode_spans(name, ())[0] == [index]]
    return name


# -- reading --------------------------------------------------------------------------------------------------------


def test_spellings() -> None:
    chat = task("chat")
    expected = {"messages": turns("Hi", "Hello.", "Bye", system="Be kind.")}
    spelt = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}]
    spelt += [{"from": "gpt", "value": " Hello.\n"}, {"from": "human", "value": "Bye"}]
    parts = [
        {"role": turn["role"].upper(), "content": [{"type": "text", "text": turn["content"]}]}
        for turn in expected["messages"]
    ]
    for given_ones in (expected["messages"], spelt, parts, json.dumps(spelt)):
        assert chat.read({"messages": given_ones}, answered=True) == [expected]
    assert chat.read({"messages": "Hi [there]"}, answered=False) == [{"messages": turns("Hi [there]")}]
    assert "conversations" in chat.roles["messages"]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "missing messages"),
        ([], "no messages"),
        (7, "no messages"),
        ("not json", "messages are not a list"),
        ([1], "message without role or content"),
        ([{"role": "user"}], "message without role or content"),
        ([{"role": 3, "content": "a"}], "message without role or content"),
        ([{"role": "wizard", "content": "a"}], "unknown role"),
        ([{"role": "user", "content": 7}], "content is not text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "content is not text"),
        (turns("a", " \n"), "empty target"),
        (turns("", "a"), "empty turn"),
        (turns("a", "b") + turns("c", system="late")[:1], "a system turn that is not the first"),
        (turns("a", "b")[1:], "the first turn is not the user's"),
        (turns("a", system="b")[:1], "the first turn is not the user's"),
        ([*turns("a"), *turns("b", "c")], "two turns of one role in a row"),
        (turns("a"), "no assistant turn"),
    ],
)
def test_bad_records(messages: Any, reason: str) -> None:
    with pytest.raises(BadExample, match=f"^{reason}$"):
        task("chat").read({"messages": messages}, answered=True)


# -- what is trained ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("style", STYLES)
def test_the_assistants_turns_and_their_end_tokens(style: str, kind: str) -> None:
    tokenizer = chatting(kind, style)
    messages = turns("Hi  ", "Hello.", "1 < 2?\n", "Yes, “it” is\n\n 漢字 😀", system=" Be kind. ")
    row = row_of(messages, tokenizer)
    end = ENDS.get(style, "</s>")
    found = [text.strip() for text in trained_texts(row, tokenizer)]
    assert found == [f"Hello.{gap_of(style)}{end}", f"Yes, “it” is\n\n 漢字 😀{gap_of(style)}{end}"]
    assert tokenizer.encode_symbols(tokenizer.render_chat(messages, add_generation_prompt=False)) == row.ids.tolist()
    assert trained_texts(row_of(messages, tokenizer, train_on="last"), tokenizer) == trained_texts(row, tokenizer)[1:]
    end_id = next(int(row.ids[i]) for i in reversed(range(len(row.ids))) if row.answer.trained[i])  # type: ignore
    assert task("chat").end_ids(tokenizer) == tuple(dict.fromkeys((tokenizer.eos_id, end_id)))


def gap_of(style: str) -> str:
    return " " if style == "llama 2" else ""


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("style", STYLES)
def test_before_an_answer_stands_what_generation_starts_from(style: str, kind: str) -> None:
    tokenizer, chat = chatting(kind, style), task("chat")
    messages = turns("Hi", "Hello.", "Bye", "Good bye.", "Still here?", system="Be kind.")
    row = row_of(messages, tokenizer)
    assert row.answer is not None
    assert row.answer.trained is not None
    starts = [i for i in range(1, len(row.ids)) if row.answer.trained[i] and not row.answer.trained[i - 1]]
    for start, upto in zip(starts, (2, 4), strict=True):
        for said in (messages[:upto], messages[: upto + 1]):  # an answer that is known is not given away
            prompt = chat.prompt(ask(chat, answered=False, messages=said), tokenizer, "decoder", WIDE)
            assert list(prompt) == row.ids[:start].tolist()
    whole = chat.prompt(ask(chat, messages=messages), tokenizer, "decoder", WIDE)
    assert list(whole[: len(row.ids) - 2]) == row.ids[:-2].tolist()
    assert len(whole) > len(row.ids)


ODD = [
    *SYMBOLS[:2],
    "</s>",
    "<s>",
    "Assistant:",
    "assistant",
    "\n",
    " ",
    "a",
    "é",
    "漢",
    "😀",
    "[/INST]",
    "zqx0xqz",
    "User: b",
]
SAID = st.lists(st.sampled_from(ODD), min_size=1, max_size=5).map("".join).filter(str.strip)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("style", STYLES)
@settings(derandomize=True, max_examples=12, deadline=None)
@given(said=st.lists(SAID, min_size=1, max_size=4).filter(lambda texts: len(texts) % 2 == 0), system=st.none() | SAID)
def test_whatever_is_said(style: str, kind: str, said: list[str], system: str | None) -> None:
    """Trained is what the assistant said and its end; what looks like a special token in it is text."""
    tokenizer = chatting(kind, style)
    messages = turns(*said, system=system)
    row = row_of(messages, tokenizer)
    end = ENDS.get(style, "</s>")
    wanted = [text.strip() for text in said[1::2]]
    assert [text.removesuffix(end).strip() for text in trained_texts(row, tokenizer)] == wanted
    special = tokenizer.token_ids().special
    written = [turn for turn in turns(*["x"] * len(said), system=None if system is None else "x")]
    like_it = row_of(written, tokenizer)
    assert [i for i in row.ids if special[i]] == [i for i in like_it.ids if special[i]]


def test_the_end_of_the_turn_must_be_a_token() -> None:
    spelt = trained_byte_level().with_chat_template(CHATML)  # which has no <|im_end|>
    with pytest.raises(ConfigError, match="no special token") as caught:
        row_of(turns("a", "b"), spelt)
    assert caught.value.fix
    assert task("chat").end_ids(spelt) == (spelt.eos_id,)
    only_last = (
        "{% for turn in messages %}{{ turn.role }}\n{{ turn.content }}\n{{ eos_token if loop.last }}{% endfor %}"
    )
    tokenizer = chatting("bpe", only_last)
    with pytest.raises(ConfigError, match="no special token"):
        row_of(turns("a", "b", "c", "d"), tokenizer)
    row = row_of(turns("a", "b", "c", "d"), tokenizer, train_on="last")
    assert trained_texts(row, tokenizer) == ["d\n</s>"]


def test_no_template() -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        row_of(turns("a", "b"), trained("bpe"))


def test_a_merged_seam_is_refused() -> None:
    glued = "{% for turn in messages %} th{{ turn.content }}{{ eos_token }}{% endfor %}"
    glued += "{{ ' th' if add_generation_prompt }}"
    for kind in TOKENIZERS:
        with pytest.raises(BadExample, match="prompt and answer merge"):
            row_of(turns("a", "e end"), chatting(kind, glued))


def test_a_prompt_with_other_ids_when_it_stands_alone_is_refused() -> None:
    """GPT-2 takes two line ends apart where a word follows them; Llama's own rules do not."""
    tokenizer = trained_byte_level().with_symbols(SYMBOLS).with_chat_template(STYLES["llama 3"])
    with pytest.raises(BadExample, match="prompt and answer merge"):
        row_of(turns("a", "b"), tokenizer)


# -- templates with a mind of their own -----------------------------------------------------------------------------

SYSTEM_LAST = """\
{%- set system = messages[0].content + '\\n' if messages[0].role == 'system' else '' -%}
{%- for turn in messages if turn.role != 'system' -%}
{%- if turn.role == 'user' -%}[INST] {{ system if loop.index0 >= loop.length - 2 }}{{ turn.content }} [/INST]
{%- else %} {{ turn.content }}{{ eos_token }}{%- endif -%}{%- endfor -%}"""

FORGETFUL = """\
{%- for turn in messages[-2:] -%}<|im_start|>{{ turn.role }}
{{ turn.content | trim }}<|im_end|>
{% endfor -%}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""

THOUGHTFUL = """\
{%- for turn in messages -%}<|im_start|>{{ turn.role }}
{% if turn.role == 'assistant' -%}
{%- if loop.last %}<think>

</think>

{% endif %}{{ turn.content.split('</think>')[-1].strip() -}}
{%- else -%}{{ turn.content }}{%- endif -%}<|im_end|>
{% endfor -%}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""


def test_a_system_turn_inside_another() -> None:
    tokenizer = chatting("byte level", SYSTEM_LAST)
    row = row_of(turns("a", "b", "c", "d", system="S</s>"), tokenizer)
    assert trained_texts(row, tokenizer) == [" b</s>", " d</s>"]
    assert row.ids.tolist().count(tokenizer.eos_id) == 2


def test_turns_left_out() -> None:
    tokenizer = chatting("byte level", FORGETFUL)
    row = row_of(turns("assistant", "b", "user", "d", system="S"), tokenizer)
    assert trained_texts(row, tokenizer) == ["d<|im_end|>"]
    silent = chatting("byte level", "{{ messages[0].content }}{{ eos_token }}")
    with pytest.raises(BadExample, match="leaves the last turn out"):
        row_of(turns("a", "b"), silent)


def test_thoughts_left_out_of_earlier_turns() -> None:
    tokenizer = chatting("byte level", THOUGHTFUL)
    messages = turns("user", "<think>assistant</think>\n\nassistant", "and?", "<think>hm</think> done")
    row = row_of(messages, tokenizer)
    assert trained_texts(row, tokenizer) == ["assistant<|im_end|>", "<think>\n\n</think>\n\ndone<|im_end|>"]


def test_a_template_that_changes_what_is_said_or_refuses() -> None:
    shout = "{% for turn in messages %}{{ turn.role }}: {{ turn.content | upper }}{{ eos_token }}{% endfor %}"
    with pytest.raises(BadExample, match="changes what the assistant says"):
        row_of(turns("a", "b"), chatting("bpe", shout))
    refusing = "{{ raise_exception('no system here') if messages[0].role == 'system' }}" + PLAIN
    tokenizer = chatting("bpe", refusing)
    assert trained_texts(row_of(turns("a", "b"), tokenizer), tokenizer) == [" b</s>"]
    with pytest.raises(BadExample, match="no system here"):
        row_of(turns("a", "b", system="S"), tokenizer)


# -- lengths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["chatml", "plain"])
def test_the_oldest_exchanges_are_cut_whole(style: str) -> None:
    tokenizer = chatting("bpe", style)
    said = [f"{word} {number}" for number in range(6) for word in ("question", "answer")]
    messages = turns(*said, system="Be kind.")
    whole = row_of(messages, tokenizer)
    assert whole.answer is not None
    assert whole.answer.n_cut == 0
    smaller = {n: row_of(turns(*said[2 * n :], system="Be kind."), tokenizer) for n in range(1, 6)}
    for n, wanted in smaller.items():
        assert wanted.answer is not None
        for room in (len(wanted.ids), len(wanted.ids) + 1):
            row = row_of(messages, tokenizer, room, cut=True)
            assert row.answer is not None
            assert row.ids.tolist() == wanted.ids.tolist()
            assert row.answer.trained.tolist() == wanted.answer.trained.tolist()  # type: ignore[union-attr]
            assert row.answer.n_cut == len(whole.ids) - len(wanted.ids), n
        with pytest.raises(BadExample, match=r"^too long$"):
            row_of(messages, tokenizer, len(wanted.ids))
    last = row_of(messages, tokenizer, len(smaller[5].ids) - 1, cut=True)
    assert last.answer is not None
    assert last.answer.n_cut > len(whole.ids) - len(smaller[5].ids), "of one exchange, the end of the question"
    with pytest.raises(BadExample, match=r"^too long$"):
        row_of(messages, tokenizer, 8, cut=True)
    chat = task("chat")
    question = ask(chat, answered=False, messages=messages)
    short = chat.prompt(question, tokenizer, "decoder", len(smaller[4].ids))
    assert list(short) == chat.prompt(
        ask(chat, messages=turns(*said[8:], system="Be kind.")), tokenizer, "decoder", WIDE
    )


@pytest.mark.parametrize("style", ["chatml", "plain"])
def test_a_question_that_is_too_long_alone_loses_its_end(style: str) -> None:
    """No more of it than has to go, nothing of the answer; what is asked for an answer is cut in the same way."""
    tokenizer, chat = chatting("bpe", style), task("chat")
    question = " ".join(f"word{number}" for number in range(60))
    whole, short = (row_of(turns(text, "The answer."), tokenizer) for text in (question, question[:200]))
    for room in (len(short.ids), len(short.ids) + 1):
        row = row_of(turns(question, "The answer."), tokenizer, room, cut=True)
        assert room - 3 <= len(row.ids) <= room
        assert row.answer is not None
        assert row.answer.n_cut == len(whole.ids) - len(row.ids)
        trained, wanted = (r.ids[r.answer.trained].tolist() for r in (row, whole))  # type: ignore[union-attr,index]
        assert trained == wanted
        with pytest.raises(BadExample, match=r"^too long$"):
            row_of(turns(question, "The answer."), tokenizer, room)
    asked = ask(chat, answered=False, messages=turns(question))
    assert 37 <= len(chat.prompt(asked, tokenizer, "decoder", 40)) <= 40
    with pytest.raises(BadExample, match=r"^too long$"):
        row_of(turns("a", "many words " * 50), tokenizer, 40, cut=True)


def test_an_empty_turn_of_the_system_is_none() -> None:
    asked = turns("Hi", "Hello.")
    assert read_messages([{"role": "system", "content": " "}, *asked], answered=True) == asked


def test_an_encoder_decoder_reads_what_was_said_and_writes_the_turn() -> None:
    tokenizer, chat = chatting("bpe", "plain"), task("chat")
    messages = turns("Hi </s>", "Hello.", "Bye", "Good bye.", "?")
    first, second = chat.rows(ask(chat, messages=messages), tokenizer, "encoder_decoder", WIDE, cut=False)
    for row, upto in ((first, 1), (second, 3)):
        question = ask(chat, answered=False, messages=messages[:upto])
        assert row.ids.tolist() == list(chat.prompt(question, tokenizer, "encoder_decoder", WIDE))
        assert row.ids[-1] == tokenizer.eos_id
        assert row.answer.target.tolist() == [*tokenizer.encode(messages[upto]["content"]), tokenizer.eos_id]
    assert first.ids.tolist().count(tokenizer.eos_id) == 1
    (last,) = task("chat", train_on="last").rows(
        ask(chat, messages=messages), tokenizer, "encoder_decoder", len(second.ids) - 1, cut=True
    )
    assert last.answer.target.tolist() == second.answer.target.tolist()
    assert last.answer.n_cut == len(second.ids) - len(last.ids) > 0
    with pytest.raises(BadExample, match="too long"):
        chat.rows(ask(chat, messages=turns("a", "many words " * 50)), tokenizer, "encoder_decoder", 40, cut=True)
    assert chat.answers("decoder") == chat.answers("encoder_decoder") == "text"
    with pytest.raises(ConfigError, match="encoder"):
        chat.answers("encoder")


# -- metrics --------------------------------------------------------------------------------------------------------


def test_metrics() -> None:
    chat = task("chat")
    questions = [Question({"messages": turns("Hi", "Hello.")}, "file:1", place) for place in range(3)]
    predictions = [Prediction("a b a"), Prediction("a c"), Prediction("")]
    metrics = chat.metrics(questions, predictions)
    assert metrics == {"distinct_1": 3 / 5, "distinct_2": 1.0, "reply_words": 5 / 3}
    assert chat.metrics([], []) == {"distinct_1": 0.0, "distinct_2": 0.0, "reply_words": 0.0}
    assert chat.details(questions, predictions)["conversations"][0][-1] == {"role": "reply", "content": "a b a"}
    assert chat.best_metric == "loss"
    assert chat.with_labels(["x"]) is chat
    assert distinct_n(["a b", "a b"], 2) == 0.5
    assert distinct_n(["a"], 2) == 0.0
