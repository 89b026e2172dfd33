"""Which settings of a task a fine-tuned model is asked with, and which labels it answers with."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from llmkit.commands import finetuning
from llmkit.commands.task_model import check_head, refuse_unused, task_node, with_head_labels
from llmkit.errors import ConfigError
from llmkit.models.head_config import HeadConfig
from tests.unit.tasks.support import task

USUAL = {"_target_": "a.Task", "prompt": "usual", "k": 1}
TRAINED = {"_target_": "a.Task", "prompt": "the run's", "k": 2, "gone": 0}


@pytest.mark.parametrize(
    ("trained", "node", "words", "found"),
    [
        (TRAINED, None, [], TRAINED),
        (None, USUAL, [], USUAL),
        (TRAINED, USUAL, ["task=a"], {"_target_": "a.Task", "prompt": "the run's", "k": 2}),
        (TRAINED, USUAL | {"k": 3}, ["task=a", "task.k=3"], {"_target_": "a.Task", "prompt": "the run's", "k": 3}),
        (TRAINED | {"_target_": "b.Task"}, USUAL, ["task=a"], USUAL),
    ],
)
def test_what_nobody_gave_is_as_it_was_in_the_run(trained: Any, node: Any, words: list[str], found: Any) -> None:
    assert task_node(trained, node, words) == found


def test_what_is_taken_from_the_run_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "llmkit"):
        task_node(TRAINED, USUAL, ["task.k=1"])
    assert "task.prompt is the run's: the run's" in caplog.text
    assert "task.k" not in caplog.text


def test_no_task_anywhere() -> None:
    with pytest.raises(ConfigError, match="nothing says which task"):
        task_node(None, None, [])


def model_with(*labels: str, kind: Any = "class") -> Any:
    """A model with nothing but a head."""
    head = SimpleNamespace(config=HeadConfig(kind, labels))
    head.take = lambda config: setattr(head, "config", config)
    return SimpleNamespace(task_head=head)


@pytest.mark.parametrize(
    ("of_model", "given", "found"),
    [
        (["no", "yes"], None, ["no", "yes"]),
        (["no", "yes"], ["yes", "no"], ["yes", "no"]),  # the order of numbers in the data
        (["LABEL_0", "LABEL_1"], ["no", "yes"], ["no", "yes"]),
    ],
)
def test_labels_of_the_head(of_model: list[str], given: list[str] | None, found: list[str]) -> None:
    """The head keeps the order of its own names; numbered ones take those that were given."""
    model = model_with(*of_model)
    asked: Any = with_head_labels(task("sentiment", labels=given), model)
    assert asked.labels == found
    assert list(model.task_head.config.labels) == (of_model if of_model[0] == "no" else given)


@pytest.mark.parametrize("given", [["a", "b"], ["no", "yes", "maybe"]])
def test_labels_that_the_head_does_not_know(given: list[str]) -> None:
    with pytest.raises(ConfigError, match="the model answers with no, yes"):
        with_head_labels(task("sentiment", labels=given), model_with("no", "yes"))


@pytest.mark.parametrize(
    ("model", "answers", "what"),
    [
        (SimpleNamespace(), "class", "answers by writing, and sentiment is answered with a label"),
        (model_with("a", "b"), "text", "answers with a label, and sentiment is answered by writing"),
        (model_with("a", "b"), "span", "answers with a label"),
        (model_with(kind="span"), "class", "answers with a span"),
    ],
)
def test_a_model_that_answers_in_another_way(model: Any, answers: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        check_head(task("sentiment"), model, answers, "runs/x")
    assert caught.value.fix.startswith("llmkit finetune task=sentiment init=runs/x")


def test_a_model_that_answers_as_the_task_does() -> None:
    check_head(task("sentiment"), SimpleNamespace(), "text", "x")
    check_head(task("sentiment"), model_with("a", "b"), "class", "x")


def test_what_has_no_effect_is_refused() -> None:
    refuse_unused(["data.path=x"], ("data.val_path",), "so")
    with pytest.raises(ConfigError, match="has no effect: so") as caught:
        refuse_unused(["task=a", "data.val_path=x"], ("data.val_path",), "so")
    assert caught.value.where == "data.val_path"


def test_a_plain_template_is_announced_in_words_true_of_every_command(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only finetune saves it."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(finetuning, "with_template", lambda tokenizer: (tokenizer, True))
    task, tokenizer = SimpleNamespace(name="chat"), SimpleNamespace()
    assert finetuning.for_task(task, tokenizer) is tokenizer
    assert caplog.messages == ["the tokenizer has no chat template: a plain one is used"]
