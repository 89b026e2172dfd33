"""Chat: replies in conversations of several turns, written as the model's chat template writes them.

The template makes one text of a conversation, and that text is tokenised once, as ``apply_chat_template`` does; nothing
is put before or behind it. In what people wrote, the names of special tokens are text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np

from llmkit.errors import BadExample, ConfigError
from llmkit.interfaces import Answer, Row, Tokenizer
from llmkit.metrics.diversity import distinct_n
from llmkit.task_interface import Prediction, Question
from llmkit.tasks.chat_layout import Layout, Turn, layout, skeleton
from llmkit.tasks.encoding import EMPTY_TARGET, MERGED, TOO_LONG, Spans, encode_target, to_array
from llmkit.tasks.messages import Message, later_beginnings, question_place, read_messages, with_question_cut

_N_SHOWN = 5  # conversations among the details


@dataclass(frozen=True)
class Chat:
    """The assistant's turns of a conversation, and the token that ends each of them.

    A decoder is trained on whole conversations, all of it read and the assistant's turns predicted. An encoder-decoder
    reads what was said before a turn and writes the turn: a row each.
    """

    train_on: Literal["all", "last"]

    name: ClassVar[str] = "chat"
    usual_kind: ClassVar[str] = "decoder"  # of the small model that is trained where none is given
    best_metric: ClassVar[str] = "loss"
    n_samples: ClassVar[int] = 1
    optional: ClassVar[tuple[str, ...]] = ()

    @property
    def roles(self) -> Mapping[str, tuple[str, ...]]:
        return {"messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "turns", "chat")}

    def read(self, fields: Mapping[str, Any], *, answered: bool) -> Sequence[Mapping[str, Any]]:
        """``messages``: a list of ``role`` and ``content``."""
        if fields.get("messages") is None:
            raise BadExample("missing messages")
        return [{"messages": read_messages(fields["messages"], answered=answered)}]

    def with_labels(self, labels: Sequence[str]) -> Self:
        """Itself: there are no labels."""
        return self

    def answers(self, kind: str) -> str:
        """``text``. Raises ``ConfigError`` for an encoder, which writes none."""
        if kind == "encoder":
            what = "chat is a task of writing, and an encoder writes no text"
            raise ConfigError(what, where="task", fix="start from a decoder or an encoder-decoder")
        return "text"

    def rows(self, question: Question, tokenizer: Tokenizer, kind: str, max_len: int, *, cut: bool) -> Sequence[Row]:
        """See ``interfaces.Task``. Whole exchanges are cut, the oldest first; nothing after the last answer is read."""
        messages = question.fields["messages"]
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        places = places[-1:] if self.train_on == "last" else places
        if not places:
            raise BadExample("no assistant turn")
        if kind == "encoder_decoder":
            return [_source_row(messages[: place + 1], tokenizer, max_len, cut) for place in places]
        said = messages[: places[-1] + 1]
        row = shortened(said, lambda part: self._marked(part, tokenizer), max_len, cut)
        return [row]

    def prompt(self, question: Question, tokenizer: Tokenizer, kind: str, max_len: int) -> Sequence[int]:
        """The conversation up to the last thing the user said, as at most ``max_len`` ids; oldest exchanges are cut."""
        messages = question.fields["messages"]
        said = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return [int(i) for i in _source(said, tokenizer, kind, max_len, cut=True).ids]

    def end_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids that end an answer: the end token, and what the chat template writes behind the assistant's turns."""
        after = skeleton(tokenizer, ("user", "assistant"), False).after
        ids, spans = tokenizer.encode_spans(after, ())
        end = _end_of(after, ids, spans, 0, 0, tokenizer)
        return (tokenizer.eos_id,) if end is None else tuple(dict.fromkeys((tokenizer.eos_id, ids[end])))

    def metrics(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> dict[str, float]:
        """Distinct n-grams over all, 0 .. 1, and the mean words of a reply. Loss and accuracy are the objective's."""
        replies = [prediction.text for prediction in predictions]
        words = sum(len(reply.split()) for reply in replies) / len(replies) if replies else 0.0
        return {"distinct_1": distinct_n(replies, 1), "distinct_2": distinct_n(replies, 2), "reply_words": words}

    def answer_score(self, question: Question, prediction: Prediction) -> float:
        """Distinct words of the reply, 0 .. 1: no reply is the right one, but some go round in circles."""
        return distinct_n([prediction.text], 1)

    def details(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> dict[str, Any]:
        """Some conversations with the replies to them."""
        pairs = zip(questions[:_N_SHOWN], predictions, strict=False)
        return {"conversations": [[*q.fields["messages"], {"role": "reply", "content": p.text}] for q, p in pairs]}

    def _marked(self, messages: Sequence[Message], tokenizer: Tokenizer) -> Row:
        """A decoder's row, however long."""
        found = layout(tokenizer, messages, add_generation_prompt=False)
        ids, spans = tokenizer.encode_spans(found.text, found.plain)
        turns = [turn for turn in found.turns if messages[turn.message]["role"] == "assistant"]
        last = [turn for turn in turns if turn.message == len(messages) - 1]
        trained = np.zeros(len(ids), np.bool_)
        for turn in last if self.train_on == "last" else turns:
            first, end = answer_place(found, turn, ids, spans, tokenizer)
            trained[first : end + 1] = True
        if not last:
            raise BadExample("the chat template leaves the last turn out")
        return Row(to_array(ids), (), answer=Answer(trained=trained))


def answer_place(found: Layout, turn: Turn, ids: Sequence[int], spans: Spans, tokenizer: Tokenizer) -> tuple[int, int]:
    """(place of the answer's first id, place of the end token behind it).

    Raises ``BadExample`` where the answer merges with its prompt: an id stands for characters of both, or the prompt
    alone, which is what the model is given when it has to answer, has other ids; ``ConfigError`` where the template
    ends the turn with no token of its own, so that nothing would tell the model to stop.
    """
    begins = (i for i, (start, stop) in enumerate(spans) if stop > turn.seam or start == turn.seam)
    first = next(begins, len(ids))
    if first == len(ids) or spans[first][0] < turn.seam or not _same_alone(found, turn, ids, spans, first, tokenizer):
        raise BadExample(MERGED)
    end = _end_of(found.text, ids, spans, first, turn.stop, tokenizer)
    if end is None:
        what = "the chat template ends the assistant's turn with no special token of the tokenizer"
        fix = "add the tokens that the template writes (add_tokens), use another template, or set task.train_on=last"
        raise ConfigError(what, where="tokenizer", fix=fix)
    if not any(stop > turn.start and start < turn.stop for start, stop in spans[first:end]):
        raise BadExample(EMPTY_TARGET)  # no character of it is in the vocabulary
    return first, end


def _same_alone(found: Layout, turn: Turn, ids: Sequence[int], spans: Spans, first: int, tokenizer: Tokenizer) -> bool:
    """Whether the prompt alone has these ids. Text is encoded apart on both sides of a special token, so that what
    stands behind the last one tells in most cases."""
    special = tokenizer.token_ids().special
    last = next((i for i in range(first - 1, 0, -1) if special[ids[i]]), 0)
    for place in dict.fromkeys((last, 0)):
        start = spans[place][0] if place else 0
        plain = [(max(a, start) - start, b - start) for a, b in found.plain if start < b <= turn.seam]
        if tokenizer.encode_spans(found.text[start : turn.seam], plain)[0] == list(ids[place:first]):
            return True
    return False


def _end_of(text: str, ids: Sequence[int], spans: Spans, first: int, stop: int, tokenizer: Tokenizer) -> int | None:
    """The place of the first id behind ``stop`` that is no white space, if it is a special token."""
    behind = (i for i in range(first, len(ids)) if spans[i][0] >= stop and text[slice(*spans[i])].strip())
    end = next(behind, None)
    return end if end is not None and tokenizer.token_ids().special[ids[end]] else None


def _source_row(messages: Sequence[Message], tokenizer: Tokenizer, max_len: int, cut: bool) -> Row:
    """An encoder-decoder's row for the last of the messages."""
    written = encode_target(messages[-1]["content"], tokenizer)
    if not written:
        raise BadExample(EMPTY_TARGET)  # no character of it is in the vocabulary
    if len(written) >= max_len:
        raise BadExample(TOO_LONG)
    source = _source(messages[:-1], tokenizer, "encoder_decoder", max_len, cut=cut)
    target = to_array([*written, tokenizer.eos_id])
    return source._replace(answer=Answer(target=target, n_cut=0 if source.answer is None else source.answer.n_cut))


def _source(messages: Sequence[Message], tokenizer: Tokenizer, kind: str, max_len: int, *, cut: bool) -> Row:
    """What a reply is written to."""
    ends = [tokenizer.eos_id] if kind == "encoder_decoder" else []

    def encoded(part: Sequence[Message]) -> Row:
        found = layout(tokenizer, part, add_generation_prompt=True)
        return Row(to_array([*tokenizer.encode_spans(found.text, found.plain)[0], *ends]), (), answer=Answer())

    return shortened(messages, encoded, max_len, cut)


def shortened(messages: Sequence[Message], make: Callable[[Sequence[Message]], Row], max_len: int, cut: bool) -> Row:
    """The row of the conversation, without as few of its oldest exchanges as make it fit, where ``cut`` allows that.

    Where one exchange alone is too long, the end of what the user says in it is cut.
    """
    row = make(messages)
    n_whole = len(row.ids)
    if n_whole <= max_len:
        return row
    if not cut:
        raise BadExample(TOO_LONG)

    def fits(part: Sequence[Message]) -> bool:
        return len(make(part).ids) <= max_len

    exchanges = later_beginnings(messages)
    first = bisect_left(exchanges, True, key=fits)
    if first < len(exchanges):
        row = make(exchanges[first])
    else:
        alone = exchanges[-1] if exchanges else messages
        n_characters = len(alone[question_place(alone)]["content"])
        n_cut = bisect_left(range(n_characters), True, key=lambda n: fits(with_question_cut(alone, n)))
        if n_cut == n_characters:
            raise BadExample(TOO_LONG)
        row = make(with_question_cut(alone, n_cut))
    assert row.answer is not None
    return row._replace(answer=row.answer._replace(n_cut=n_whole - len(row.ids)))
