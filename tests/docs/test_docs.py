"""Every command shown in README and docs is run, shrunk to a few steps; every link and file named there exists.

A fenced ``sh`` block is a session: its lines run in order, in a folder that has the sample files the pages speak of.
A block after ``<!-- not run: reason -->`` is left out, and the number of such blocks is fixed here.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmkit.cli import main

REPO = Path(__file__).resolve().parents[2]
PAGES = sorted([REPO / "README.md", *(REPO / "docs").glob("*.md")])
BLOCK = re.compile(r"(?P<skip><!-- not run: [^\n]+ -->\n)?```sh\n(?P<body>.*?)```", re.DOTALL)
N_NOT_RUN = 4

SHRINK = [
    "engine.max_steps=3",
    "engine.max_tokens=null",
    "engine.max_epochs=null",
    "engine.eval_every=3",
    "engine.save_every=3",
    "engine.micro_batch_size=2",
    "engine.eval_batch_size=64",
    "engine.grad_accum_steps=1",
    "engine.n_threads=1",
    "schedule.warmup_steps=1",
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.n_kv_heads=2",
    "model.d_ff=64",
    "data.seq_len=32",
    "data.n_workers=1",
    "callbacks=none",
    "tracking.wandb.mode=disabled",
]
TEXT = "The with statement wraps the execution of a block.\n\nA for loop goes over the items of a sequence, in order.\n"


@dataclass(frozen=True)
class Session:
    page: str
    commands: tuple[str, ...]


def sessions() -> list[Session]:
    found = []
    for page in PAGES:
        for match in BLOCK.finditer(page.read_text("utf8")):
            if match["skip"]:
                continue
            joined = match["body"].replace("\\\n", " ")
            commands = tuple(line.split("  #")[0].strip() for line in joined.splitlines())
            commands = tuple(c for c in commands if c.startswith(("llmkit ", "make ")))
            if commands:
                found.append(Session(page.name, commands))
    return found


def sample_files(folder: Path) -> None:
    """The files that the pages use as examples."""
    (folder / "notes").mkdir()
    for number in range(40):
        (folder / "notes" / f"{number}.txt").write_text(f"Note {number}. {TEXT * 6}")
    (folder / "heldout.txt").write_text(TEXT * 30)
    lines = [f'{{"text": "Document {n}. {TEXT * 4!r}"}}'.replace("'", "").replace("\\", "\\\\") for n in range(40)]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")


def shrunk(argv: list[str]) -> list[str]:
    """The same command, small: what is shown stays, what makes it long is overridden."""
    if argv[0] not in ("pretrain", "prepare") or {"--help", "--cfg", "--dry-run", "-m"} & set(argv):
        return argv
    has_init = any(a.startswith("init=") for a in argv)
    n_ids = 300 if any("data.path=" in a for a in argv) else 512  # as many as the small text allows
    more = [] if has_init or any(a.startswith("tokenizer") for a in argv) else [f"tokenizer.vocab_size={n_ids}"]
    if argv[0] == "pretrain":
        other_model = has_init or "model=transformers" in argv  # its sizes are not ours to name
        more += [o for o in SHRINK if not (other_model and o.startswith("model."))]
        if any(a.startswith("recipe=") and "bert" in a for a in argv):
            more.remove("model.n_kv_heads=2")  # a decoder's
    return [*argv, *more]


@pytest.mark.parametrize("session", sessions(), ids=lambda s: f"{s.page}: {s.commands[0]}")
def test_session_runs(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in session.commands:
        words = shlex.split(command)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (REPO / "Makefile").read_text(), re.MULTILINE), command
            continue
        assert main(shrunk(words[1:])) == 0, command


def test_pages_show_commands() -> None:
    """Guards the collection itself: without it an empty list would pass."""
    assert sum(len(session.commands) for session in sessions()) >= 20
    text = "".join(page.read_text("utf8") for page in PAGES)
    assert len([m for m in BLOCK.finditer(text) if m["skip"]]) == N_NOT_RUN


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text("utf8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert re.findall(r"@[A-Z]+@", text) == [], "a figure is still to be filled in"
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []
