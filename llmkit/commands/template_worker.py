"""Renders an export's chat template as ``transformers`` does, in a process of its own that can be killed.

It is run as a script: one JSON request on standard input, one JSON reply on standard output. The library runs a
template without bounds, and a template can tell its sandbox from llmkit's.
"""

import json
import os
import sys
from typing import Any

OVER = 77  # exit status: more memory, time or text than allowed


def main() -> None:
    request = json.load(sys.stdin)
    reply_to, sys.stdout = sys.stdout, sys.stderr  # the library may print
    from transformers import AutoTokenizer

    gguf = {} if request["file"] is None else {"gguf_file": request["file"]}
    tokenizer = AutoTokenizer.from_pretrained(request["folder"], local_files_only=True, **gguf)
    _bound_memory(request["max_bytes"])
    replies = []
    for chat, prompted in request["chats"]:
        _end_after(request["seconds"])
        replies.append(_render(tokenizer, chat, prompted, request["max_chars"]))
        _end_after(0)
    json.dump(replies, reply_to)


def _render(tokenizer: Any, chat: list[dict[str, str]], prompted: bool, max_chars: int) -> str:
    """The text, or the first line of what the template raises."""
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompted))
    except MemoryError:
        os._exit(OVER)
    except Exception as error:  # a template raises what it likes
        said = str(error).strip()
        return f"{type(error).__name__}: {said.splitlines()[0] if said else ''}"[:300]
    if len(text) > max_chars:
        os._exit(OVER)
    return text


def _bound_memory(more_bytes: int) -> None:
    """At most this much more than the library and the tokenizer take already, where the system can bound it."""
    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm") as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + more_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_after(seconds: float) -> None:
    """End this process then; 0 takes it back."""
    if sys.platform != "win32":
        import signal

        signal.setitimer(signal.ITIMER_REAL, seconds)


if __name__ == "__main__":
    main()
