"""Answers to questions: their order, their independence of the batch, and what cannot be asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from llmkit.config.build import build
from llmkit.config.compose import compose
from llmkit.engine.prediction import Answerer
from llmkit.errors import BadExample
from llmkit.interfaces import TokenIds
from llmkit.models.head_config import HeadConfig
from llmkit.models.heads import attach_head
from llmkit.objectives.for_task import objective_for
from llmkit.settings import LossConfig
from llmkit.task_interface import Question
from llmkit.tasks.translation import Translation
from tests.unit.data.helpers import ByteTokenizer
from tests.unit.generation_settings import GREEDY as BASE
from tests.unit.tasks.support import task as task_of

MAX_LEN, N_NEW = 40, 6
LOSS = LossConfig(label_smoothing=0.0, r_drop=0.0, chunk_size=None)
GREEDY = replace(BASE, max_new_tokens=N_NEW)
SIZES = ["model.d_model=32", "model.n_layers=2", "model.n_heads=2", "model.max_seq_len=48"]
NAMES = {"decoder": "gpt2", "encoder": "bert", "encoder_decoder": "t5"}


@dataclass(frozen=True)
class Bytes(ByteTokenizer):
    """An id a byte; ASCII only, so that every id is a character."""

    def encode_spans(self, text: str, plain: Any = None) -> tuple[list[int], list[tuple[int, int]]]:
        return self.encode(text), [(i, i + 1) for i in range(len(text))]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - 2 for i in ids if 1 < i < 258).decode(errors="replace")

    def token_ids(self) -> TokenIds:
        special = np.arange(self.vocab_size) < 2
        return TokenIds(self.vocab_size, self.bos_id, self.eos_id, self.pad_id, None, (), None, special, special)


TOKENIZER: Any = Bytes()


def answerer(task: Any, kind: str, batch_size: int = 4, seed: int = 0, **changes: Any) -> Answerer:
    """A random model that answers, with weights so large that answers differ."""
    plain = compose("pretrain", [f"model={NAMES[kind]}", *SIZES]).plain["model"]
    model: Any = build(plain).with_vocab(TOKENIZER.vocab_size).build()
    model.init_weights(seed)
    answers = task.answers(kind)
    if answers != "text":
        attach_head(model, HeadConfig(answers, tuple(task.labels) if answers == "class" else ()), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    objective = objective_for(answers, kind, LOSS)
    settings = replace(GREEDY, **changes)
    return Answerer(task, objective, model, TOKENIZER, MAX_LEN, settings, torch.device("cpu"), batch_size)


LABELS = ["bad", "fair", "good"]
TASKS: Mapping[str, Any] = {
    "class": task_of("sentiment", labels=LABELS),
    "span": task_of("qa", stride=4),
    "text": task_of("translation", decoder_prompt="{text}:"),
}
WAYS = [("class", "decoder"), ("class", "encoder"), ("class", "encoder_decoder"), ("span", "encoder")]
WAYS += [("text", "decoder"), ("text", "encoder_decoder")]


def asked(way: str, texts: Sequence[str]) -> list[Question]:
    make = {
        "class": lambda text: {"text": text, "label": "bad"},
        "span": lambda text: {"question": "who?", "context": text, "answers": []},
        "text": lambda text: {"source": text, "target": ""},
    }[way]
    return [Question(make(text), f"file:{place}", place) for place, text in enumerate(texts)]


TEXTS = ["one two", "a", "three four five six", "zz top", "ten", "a", "one two", "nine hundred and five", "x y"]


@pytest.mark.parametrize(("way", "kind"), WAYS)
def test_answers_come_in_the_order_of_the_questions_whatever_the_batch(way: str, kind: str) -> None:
    """Questions are sorted by length inside; equal ones have equal answers, and each alone has the same."""
    questions = asked(way, TEXTS)
    found = [answerer(TASKS[way], kind, size)(questions) for size in (1, 3, 16)]
    first, *others = found
    assert first is not None
    assert len({prediction.text for prediction in first}) > 1
    for other in others:
        assert other is not None
        assert [each.text for each in other] == [each.text for each in first]
        for ours, theirs in zip(other, first, strict=True):
            assert ours.scores == pytest.approx(theirs.scores, abs=1e-5)
    assert first[1].text == first[5].text
    assert first[0].text == first[6].text
    alone = answerer(TASKS[way], kind)([questions[4]])
    assert alone is not None
    assert alone[0].text == first[4].text


def test_probabilities_of_labels_add_up() -> None:
    found = answerer(TASKS["class"], "encoder")(asked("class", TEXTS))
    assert found is not None
    for prediction in found:
        assert list(prediction.scores) == LABELS
        assert sum(prediction.scores.values()) == pytest.approx(1.0)
        assert prediction.text == max(prediction.scores, key=lambda label: prediction.scores[label])


def test_a_span_is_a_part_of_its_context() -> None:
    """Also of a context of several windows, which are scored together with those of other questions."""
    texts = [*TEXTS, "a long text of many words that " * 5]
    found = answerer(TASKS["span"], "encoder", batch_size=3)(asked("span", texts))
    assert found is not None
    assert all(prediction.text in text for prediction, text in zip(found, texts, strict=True))
    assert all(set(prediction.scores) == {"span", "no_answer"} for prediction in found)


@pytest.mark.parametrize(("way", "kind"), WAYS)
def test_no_question_has_no_answer(way: str, kind: str) -> None:
    assert answerer(TASKS[way], kind)([]) == []


class Picky:
    """A task that refuses some texts."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def prompt(self, question: Question, *args: Any) -> Any:
        if "two" in str(question.fields.values()):
            raise BadExample("it says two")
        return self.inner.prompt(question, *args)


@pytest.mark.parametrize(("way", "kind"), [way for way in WAYS if way[0] != "span"])
@pytest.mark.parametrize("size", [1, 16])
def test_what_cannot_be_asked_is_answered_with_nothing_and_counted(
    way: str, kind: str, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when a whole batch cannot be; the others keep their answers."""
    found = answerer(Picky(TASKS[way]), kind, size)(asked(way, TEXTS))
    plain = answerer(TASKS[way], kind, size)(asked(way, TEXTS))
    assert found is not None
    assert plain is not None
    refused = [place for place, text in enumerate(TEXTS) if "two" in text]
    assert all(found[place].text == each.text for place, each in enumerate(plain) if place not in refused)
    assert all(found[place].text == "" and not found[place].scores for place in refused)
    assert "2 of 9 questions cannot be asked (it says two): answered with nothing" in caplog.text


def test_a_span_question_without_room_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    questions = asked("span", TEXTS)
    long = Question({"question": "who? " * 20, "context": "me", "answers": []}, "file:9", 9)
    found = answerer(TASKS["span"], "encoder")([long, *questions, long])
    assert found is not None
    assert [found[0].text, found[-1].text] == ["", ""]
    assert "2 of 11 questions cannot be asked (too long)" in caplog.text


@pytest.mark.parametrize(("way", "kind"), [way for way in WAYS if way[0] != "span"])
def test_a_long_question_is_cut_and_counted(way: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """To the length of rows; a decoder that writes needs room in its window beside it."""
    room = MAX_LEN  # 40 of 48, and 6 are written
    fits, long = asked(way, ["w" * 36, "w" * 60])
    ask = answerer(TASKS[way], kind)
    assert ask.ask(fits)[1] == 0
    ids, n_cut = ask.ask(long)
    assert len(ids) <= room
    assert n_cut > 0
    assert ask([fits, long]) is not None
    assert f"1 of 2 questions are longer than {room} tokens: a part was left out" in caplog.text


def test_more_new_tokens_leave_less_room_and_the_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    (question,) = asked("text", ["w" * 34])
    ask = answerer(TASKS["text"], "decoder", max_new_tokens=20)
    assert len(ask.ask(question)[0]) == 28
    assert ask([question]) is not None
    assert "longer than 28 tokens" in caplog.text
    assert "a smaller generation.max_new_tokens leaves more room" in caplog.text
    assert answerer(TASKS["text"], "encoder_decoder", max_new_tokens=20).ask(question)[1] == 0


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    """Dropout is off while it answers; a stop leaves no answers."""
    ask = answerer(TASKS["class"], "encoder")
    ask.model.train(training)
    assert ask(asked("class", TEXTS)) == ask(asked("class", TEXTS))
    assert ask.model.training == training
    stops = iter([False, True])
    assert ask(asked("class", TEXTS), lambda: next(stops)) is None
    assert ask.model.training == training


def test_several_samples_of_a_question() -> None:
    task = task_of("code", run_code=True, k=[1, 3], decoder_prompt="{instruction}", source_prompt="{instruction}")
    questions = [
        Question(
            {"instruction": text, "tests": [], "signature": "", "setup": "", "entry_point": "", "calls": []}, "", 0
        )
        for text in "ab"
    ]
    found = answerer(task, "decoder", temperature=1.0)(questions)
    assert found is not None
    assert [len(prediction.samples) for prediction in found] == [2, 2]


def test_marks_that_end_an_answer() -> None:
    @dataclass(frozen=True)
    class Ends(Translation):
        def end_ids(self, tokenizer: Any) -> tuple[int, ...]:
            return tuple(range(tokenizer.vocab_size))

    questions = [Question({"source": text}, "", 0) for text in ("a", "bc")]
    whole = answerer(TASKS["text"], "decoder")(questions)
    assert whole is not None
    assert any(prediction.text for prediction in whole)
    found = answerer(Ends(**vars(TASKS["text"])), "decoder")(questions)
    assert found is not None
    assert [prediction.text for prediction in found] == ["", ""]
