"""Answers as spans of a long context: overlapping windows, the place of an answer in ids, and the best of many spans.

A window is ``[bos] question [eos] a part of the context [eos]`` (Devlin et al. 2019, section 4.2; windows as in the
published code).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import BadExample
from llmkit.interfaces import Answer, Row, Tokenizer
from llmkit.tasks.encoding import TOO_LONG, Ids, begin, to_array

Floats = NDArray[np.float64]


class Window(NamedTuple):
    """A part of a context, as an encoder reads it after the question."""

    ids: Ids
    second: int  # the place of the context's first id
    spans_S2: Ids  # of the S ids of the context, the characters of the context that each stands for

    def row(self, characters: tuple[int, int] | None) -> Row:
        """The training row for an answer at ``characters``; where it is not wholly in here: no answer, ``(0, 0)``."""
        found = None if characters is None else ids_of(self.spans_S2, *characters)
        place = (0, 0) if found is None else (self.second + found[0], self.second + found[1])
        return Row(self.ids, (), answer=Answer(span=place, second=self.second))

    def characters(self, first: int, last: int) -> tuple[int, int]:
        """The characters of the context under the ids ``first`` to ``last`` of the window."""
        return int(self.spans_S2[first - self.second, 0]), int(self.spans_S2[last - self.second, 1])


def make_windows(question: str, context: str, tokenizer: Tokenizer, max_len: int, stride: int) -> list[Window]:
    """Windows of at most ``max_len`` ids over the whole context; neighbours share ``stride`` ids or more.

    Where the question leaves little room they share less, half of it. Raises ``BadExample`` where it leaves none.
    """
    asked = [*begin(tokenizer), *tokenizer.encode(question), tokenizer.eos_id]
    ids, spans = tokenizer.encode_spans(context)
    room = max_len - len(asked) - 1
    if room < 1:
        raise BadExample(TOO_LONG)
    if not ids:
        raise BadExample("empty context")
    spans_S2 = to_array([place for span in spans for place in span]).reshape(-1, 2)
    return [
        Window(
            to_array([*asked, *ids[start : start + room], tokenizer.eos_id]), len(asked), spans_S2[start : start + room]
        )
        for start in starts(len(ids), room, min(stride, room // 2))
    ]


def starts(length: int, room: int, shared: int) -> list[int]:
    """Where windows of ``room`` begin that cover ``length``; the last one ends where the text does."""
    if length <= room:
        return [0]
    return [*range(0, length - room, room - shared), length - room]


def ids_of(spans_S2: Ids, start: int, stop: int) -> tuple[int, int] | None:
    """The first and last id that share characters with ``start:stop``; None where the ids do not cover all of it."""
    inside = np.flatnonzero((spans_S2[:, 0] < stop) & (spans_S2[:, 1] > start))
    if not inside.size or spans_S2[inside[0], 0] > start or spans_S2[inside[-1], 1] < stop:
        return None
    return int(inside[0]), int(inside[-1])


def find_answer(context: str, text: str, start: int | None) -> int | None:
    """Where ``text`` stands in ``context``: at ``start``, else at the place nearest to it; None if nowhere."""
    if start is not None and context[max(start, 0) :].startswith(text) and start >= 0:
        return start
    places, place = [], context.find(text)
    while place >= 0:
        places.append(place)
        place = context.find(text, place + 1)
    return min(places, key=lambda place: abs(place - (start or 0)), default=None)


class Best(NamedTuple):
    """The best span: the sum of its two logits, its window, its first and last id there; and that of no answer."""

    score: float
    window: int
    first: int
    last: int
    no_answer: float


def best_span(windows: Sequence[Window], logits: Sequence[NDArray[np.floating]], max_ids: int | None) -> Best:
    """The span of the context with the largest sum of start and end logit, over all windows; of equals the first.

    ``logits``: one ``T2`` a window. ``max_ids``: the longest span that counts. "No answer" scores the sum at the
    first id of a window, the least over windows, as in the published code of BERT.
    """
    found: tuple[float, int, int, int] | None = None
    for number, (window, logits_T2) in enumerate(zip(windows, logits, strict=True)):
        stop = window.second + len(window.spans_S2)
        scores_S2 = np.asarray(logits_T2, dtype=np.float64)[window.second : stop]
        score, first, last = _best_pair(scores_S2[:, 0], scores_S2[:, 1], max_ids)
        if found is None or score > found[0]:
            found = (score, number, window.second + first, window.second + last)
    assert found is not None, "a context has at least one window"
    no_answer = min(float(np.asarray(logits_T2[0], dtype=np.float64).sum()) for logits_T2 in logits)
    return Best(*found, no_answer)


def _best_pair(start_S: Floats, end_S: Floats, max_ids: int | None) -> tuple[float, int, int]:
    """The largest ``start[i] + end[j]`` with ``i <= j < i + max_ids``."""
    size = len(start_S)
    best = (-np.inf, 0, 0)
    for further in range(min(size, max_ids or size)):
        sums = start_S[: size - further] + end_S[further:]
        place = int(sums.argmax())
        best = max(best, (float(sums[place]), -place, -place - further))
    return best[0], -best[1], -best[2]
