"""What stands around a text in the eyes of a ``tokenizer.json``: its post-processor.

Rows of training are ``[bos] text eos``. Encoders read them whole; a decoder goes on where a text has not ended yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Token = tuple[str, int]  # name, id


def template(before: Sequence[Token], after: Sequence[Token]) -> dict[str, Any] | None:
    """Puts ``before`` and ``after`` around every text, also around both of a pair; None where there is nothing to put.

    The second text of a pair is segment 1.
    """
    if not before and not after:
        return None
    return _processor([*_part("A", 0, before, after)], _part("B", 1, before, after), before, after)


def pair_template(before: Sequence[Token], after: Sequence[Token]) -> dict[str, Any]:
    """As BERT and llmkit's sentence pairs have it: ``before`` stands before the first text only."""
    return _processor(_part("A", 0, before, after), _part("B", 1, (), after), before, after)


def _part(sequence: str, segment: int, before: Sequence[Token], after: Sequence[Token]) -> list[dict[str, Any]]:
    first, last = ([{"SpecialToken": {"id": name, "type_id": segment}} for name, _ in side] for side in (before, after))
    return [*first, {"Sequence": {"id": sequence, "type_id": segment}}, *last]


def _processor(
    first: list[dict[str, Any]], second: list[dict[str, Any]], before: Sequence[Token], after: Sequence[Token]
) -> dict[str, Any]:
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, *second],
        "special_tokens": {name: {"id": name, "ids": [index], "tokens": [name]} for name, index in [*before, *after]},
    }


def ends_of(processor: Mapping[str, Any] | None) -> tuple[int | None, int | None]:
    """Ids of the special tokens that a post-processor puts first and last around a text; None where it puts none."""
    for step in [] if processor is None else processor.get("processors", [processor]):
        if step["type"] in ("BertProcessing", "RobertaProcessing"):
            return step["cls"][1], step["sep"][1]
        if step["type"] == "TemplateProcessing":
            names = [piece.get("SpecialToken", {}).get("id") for piece in (step["single"][0], step["single"][-1])]
            first, last = (step["special_tokens"][name]["ids"] if name is not None else [None] for name in names)
            return first[0], last[-1]
    return None, None


def around(bos: Token | None, eos: Token, kind: str | None) -> dict[str, Any] | None:
    """For the users of a model of ``kind`` (``interfaces.ModelConfig.kind``; None: not known) that llmkit trained."""
    before = [] if bos is None else [bos]
    return template(before, []) if kind in (None, "decoder") else pair_template(before, [eos])
