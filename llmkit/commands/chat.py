"""``llmkit chat``: a conversation with a model."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from typing import cast

import yaml

from llmkit.commands.evaluate import trained_config
from llmkit.commands.task_model import TaskModel, open_task_model
from llmkit.config.choices import recipes_dir
from llmkit.config.schema import ChatConfig, Node
from llmkit.engine.prediction import WHOLE
from llmkit.errors import BadExample, DataError
from llmkit.generation import stream_from_ids
from llmkit.task_interface import Question, WrittenTask
from llmkit.tracking.logs import visible

log = logging.getLogger("llmkit.chat")

END_WORDS = ("/quit", "/exit")
FORGET = "/new"


def run(cfg: ChatConfig, args: argparse.Namespace) -> int:
    """Answer line by line until the input ends; ``/new`` forgets what was said, ``/quit`` ends."""
    model = open_task_model(cfg.init, task_of(cfg.init), (), WHOLE, cfg.generation, cfg.engine)
    asking = sys.stdin.isatty()
    if asking:
        print(f"{FORGET} starts over, {END_WORDS[0]} ends", file=sys.stderr)
    said = opening(cfg.system)
    for line in lines(asking):
        if line in END_WORDS:
            break
        if line == FORGET:
            said = opening(cfg.system)
            continue
        said.append({"role": "user", "content": line})
        reply = ""
        try:
            for piece in answer(model, said, cfg):
                print(visible(piece) if sys.stdout.isatty() else piece, end="", flush=True)
                reply += piece
        except BadExample as bad:
            log.warning("this cannot be answered (%s) and is forgotten", bad)
            said.pop()
            continue
        print(flush=True)
        said.append({"role": "assistant", "content": reply.strip()})
    return 0


def task_of(init: str) -> Node:
    """The chat task of the run, with its template settings; else the usual one."""
    node: Node = (trained_config(init) or {}).get("task") or {}
    if "chat" in str(node.get("_target_", "")):
        return node
    usual: Node = yaml.safe_load((recipes_dir() / "task" / "chat.yaml").read_text(encoding="utf-8"))
    return usual


def opening(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


def lines(asking: bool) -> Iterator[str]:
    """What is typed, without empty lines."""
    while True:
        try:
            line = input("> ") if asking else sys.stdin.readline()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise DataError(f"what was typed is no UTF-8 text: {error.reason}", where="standard input") from error
        if not asking and not line:
            return
        if line.strip():
            yield line.strip()


def answer(model: TaskModel, said: list[dict[str, str]], cfg: ChatConfig) -> Iterator[str]:
    """The reply to the last turn, piece by piece; the oldest turns go when the window is full."""
    ids, n_cut = model.answerer.ask(Question({"messages": said}, "chat", 0))
    if n_cut:
        log.warning("the conversation has become too long: %d tokens of it, the oldest first, are not read", n_cut)
    ends = cast(WrittenTask, model.task).end_ids(model.tokenizer)
    return stream_from_ids(model.model, model.tokenizer, ids, cfg.generation, device=model.device, end_ids=ends)
