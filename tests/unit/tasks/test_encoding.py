"""Templates, the seam between prompt and answer, and what is cut to fit."""

from __future__ import annotations

import pytest

from llmkit.errors import BadExample
from llmkit.tasks.encoding import Prompt, fill, fit, fit_answered, template_problems, text_of, texts_of
from tests.unit.tasks.support import PatternTokenizer


def test_fill_replaces_roles_and_knows_where_the_long_one_stands() -> None:
    prompt = fill("Q: {question} {{x}}\nC: {context}!\n", {"question": "why?", "context": "a b"}, "context")
    assert prompt.text == "Q: why? {x}\nC: a b!\n"
    assert prompt.text[prompt.start : prompt.stop] == "a b"


def test_braces_in_a_text_are_text() -> None:
    assert fill("{a}", {"a": "{b} {0}"}, "a").text == "{b} {0}"


def test_a_line_without_content_is_left_out() -> None:
    values = {"a": "x", "b": "", "c": ""}
    assert fill("{a}\n{b}\n\n{b} {c}\nend\n{c}-{a}\n", values, "a").text == "x\n\nend\n-x\n"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{a} {nope}", ["there is no {nope}; there are {a}, {b}"]),
        ("{b}", ["must hold {a} once"]),
        ("{a}{a}", ["must hold {a} once"]),
        ("{a}: ", ["must not end in a space: the space before the answer belongs to the answer"]),
        ("{a", ["braces do not match (expected '}' before end of string); write {{ for a brace"]),
        ("{a}\n", []),
        ("{a} {b} {b}:", []),
    ],
)
def test_templates_that_cannot_be_filled(template: str, said: list[str]) -> None:
    found = template_problems("prompt", template, ("a", "b"), ("a",))
    assert found == [("prompt", message) for message in said]


def test_prompt_and_answer_are_one_text() -> None:
    tokenizer = PatternTokenizer()
    fitted, first = fit_answered(Prompt("Say:", 0, 3), "hello you", tokenizer, 99, cut=False)
    assert fitted.ids == tokenizer.encode("Say: hello you")
    assert [tokenizer.decode([i]) for i in fitted.ids[first:]] == [" hello", " you"]


def test_after_a_line_end_the_answer_follows_at_once() -> None:
    tokenizer = PatternTokenizer()
    fitted, first = fit_answered(Prompt("Say:\n", 0, 3), "hello", tokenizer, 99, cut=False)
    assert tokenizer.decode(fitted.ids[:first]) == "Say:\n"
    assert tokenizer.decode(fitted.ids[first:]) == "hello"


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r":\s\w+|\w+", "an id for characters of both"),
        (r"a(?=: x)|: x|a:|\w", "the same characters in other ids without the answer"),
        (r"\w+: |\w+", "the space is in the prompt's last id"),
    ],
)
def test_a_merged_seam_is_refused(pattern: str, why: str) -> None:
    with pytest.raises(BadExample, match="prompt and answer merge"):
        fit_answered(Prompt("a:", 0, 1), "x", PatternTokenizer(pattern), 99, cut=False)


def test_other_ids_before_the_seam_than_alone_are_refused() -> None:
    """No id crosses the seam, yet what is before it depends on what is after it."""
    tokenizer = PatternTokenizer(r"a:(?! x)|a|:| x")
    assert len(tokenizer.encode("a:")) == 1
    with pytest.raises(BadExample, match="prompt and answer merge"):
        fit_answered(Prompt("a:", 0, 1), "x", tokenizer, 99, cut=False)


def test_an_answer_that_the_vocabulary_does_not_have_is_empty() -> None:
    with pytest.raises(BadExample, match="empty target"):
        fit_answered(Prompt("a:", 0, 1), "!", PatternTokenizer(r"\w+|:"), 99, cut=False)


def test_a_cut_takes_the_end_of_the_long_part() -> None:
    tokenizer = PatternTokenizer()
    prompt = fill("Read {text} now", {"text": "one two three four"}, "text")
    whole = fit(prompt, " x", tokenizer, 99, cut=False)
    assert (len(whole.ids), whole.n_cut) == (7, 0)
    fitted = fit(prompt, " x", tokenizer, 5, cut=True)
    assert fitted.prompt.text == "Read one two now"
    assert (len(fitted.ids), fitted.n_cut) == (5, 2)


def test_a_cut_never_takes_all_of_it() -> None:
    prompt = fill("Read {text} now", {"text": "one two"}, "text")
    assert fit(prompt, " x", PatternTokenizer(), 4, cut=True).prompt.text == "Read one now"
    for room in (3, 2, 0, -1):
        with pytest.raises(BadExample, match="too long"):
            fit(prompt, " x", PatternTokenizer(), room, cut=True)


def test_a_cut_goes_on_until_it_fits() -> None:
    """Where the shorter text has more ids than counted, because its pieces are others."""
    tokenizer = PatternTokenizer(r"abcd\b|\w|\s")
    fitted = fit(Prompt("x abcd abcd", 0, 11), " z", tokenizer, 6, cut=True)
    assert (fitted.prompt.text, len(fitted.ids)) == ("x abcd", 5)


@pytest.mark.parametrize(
    ("value", "reason"), [(None, "missing a"), (3, "a is not text"), (" \n", "empty a"), (["x"], "a is not text")]
)
def test_what_is_no_text(value: object, reason: str) -> None:
    with pytest.raises(BadExample, match=f"^{reason}$"):
        text_of({"a": value}, "a")


def test_texts_are_stripped_and_empty_ones_left_out() -> None:
    assert texts_of({"a": [" x ", "", "y"]}, "a") == ["x", "y"]
    assert texts_of({"a": " x"}, "a") == ["x"]
    for value, reason in (([], "empty target"), ([" "], "empty target"), ([1], "a is not text"), (None, "missing a")):
        with pytest.raises(BadExample, match=f"^{reason}$"):
            texts_of({"a": value}, "a")
