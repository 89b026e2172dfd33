"""``llmkit export``: a model for other tools, with a card, checked by the library that is going to read it."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from llmkit.commands.export_check import check_export, probe_logits
from llmkit.commands.exported import NO_ARCHITECTURE, Exported, Finding, Subject, answers_of
from llmkit.commands.model_card import write_card
from llmkit.commands.open_model import open_config, open_model, open_tokenizer
from llmkit.commands.training import write_model
from llmkit.config.schema import ExportConfig
from llmkit.data.loader import check_vocabulary
from llmkit.engine import files
from llmkit.engine.init import resolve_init
from llmkit.engine.stop import leave_on_signal
from llmkit.errors import CheckpointError, ConfigError, NumericsError
from llmkit.interfaces import ModelConfig, Tokenizer
from llmkit.models.hf.families import fitting_family
from llmkit.tokenizers.chat_template import ChatTemplate

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GGUF_FILE = "model.gguf"
GGUF_KINDS: dict[str, Kind] = {"float32": "f32", "float16": "f16", "q8_0": "q8_0"}

Kind = Literal["f32", "f16", "q8_0"]

log = logging.getLogger("llmkit.export")


def run(cfg: ExportConfig, args: argparse.Namespace) -> int:
    """Write ``cfg.out`` beside its place, check it, and publish it by one rename; print what the check found."""
    out, source = free_place(cfg.out), resolve_init(cfg.init)
    refuse_unfit(cfg, open_config(source))
    tokenizer = open_tokenizer(source)
    with leave_on_signal(), published(out) as folder:
        subject, findings = write(cfg, source, tokenizer, folder)
        write_card(cfg, source, subject, findings, folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{cfg.out}: {cfg.format}, {cfg.dtype}, {files.size_text(size)}")
    for name, result in findings:
        print(f"  {name:<27} {result}")
    return 0


def write(cfg: ExportConfig, source: Path, tokenizer: Tokenizer, folder: Path) -> tuple[Subject, list[Finding]]:
    """Weights and tokenizer in ``folder``, and what their check found. Numbers are cast one tensor at a time."""
    model = open_model(source)
    check_vocabulary(tokenizer.vocab_size, model.config.vocab_rows)
    subject = Subject.of(model, tokenizer)
    refuse_head(cfg, subject)
    logits = probe_logits(model, subject)
    check_range(model, cfg.dtype)
    if cfg.format == "gguf":
        from llmkit.models.gguf import save_gguf
        from llmkit.tokenizers.gguf import gguf_fields

        fields = {**gguf_fields(tokenizer), "general.name": free_place(cfg.out).name}
        save_gguf(model, folder / GGUF_FILE, kind=GGUF_KINDS[cfg.dtype], tokenizer_fields=fields)
    else:
        write_model(model.to(TYPES[cfg.dtype]), tokenizer, folder)
    del model  # before another one is opened
    file = GGUF_FILE if cfg.format == "gguf" else None
    return subject, check_export(Exported(folder, file, cfg.dtype, subject, ChatTemplate.of(tokenizer), logits))


def free_place(out: str) -> Path:
    """The folder that ``out`` names. Raises ``ConfigError`` when something is there already."""
    path = Path(out).expanduser()
    if not out or path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise ConfigError(f"{out!r:.200} is not a new or an empty folder", where="out", fix="name another one")
    return path.resolve()


def refuse_unfit(cfg: ExportConfig, config: ModelConfig) -> None:
    """What the format has no words for. A model of llmkit's own is written in its own format, with a warning."""
    if cfg.format == "gguf":
        from llmkit.models.gguf.architectures import ARCHITECTURES

        known = [architecture.model_type for architecture in ARCHITECTURES]
        family = fitting_family(config)
        if family is None or family.model_types[0] not in known:
            what = f"a {config.hf_architecture() or 'model of its own kind'} is not written as GGUF"
            raise ConfigError(what, where="format", fix=f"GGUF takes {', '.join(known)}; format=hf takes all")
    elif config.hf_architecture() is None:
        log.warning("%s: the export opens in llmkit only", NO_ARCHITECTURE)


def refuse_head(cfg: ExportConfig, subject: Subject) -> None:
    """GGUF has no words for a task head; one that transformers has no class for is in llmkit's own format."""
    if subject.head is None:
        return
    if cfg.format == "gguf":
        what = f"the model answers by a task head ({answers_of(subject.head)}), and GGUF has no place for one"
        raise ConfigError(what, where="format", fix="format=hf")
    if subject.architecture is None and subject.config.hf_architecture() is not None:
        log.warning("%s: the export opens in llmkit only", subject.why_own)


def check_range(model: Any, dtype: str) -> None:
    """Raise ``NumericsError`` naming a weight too large for float16. The other types reach as far as fp32, nearly."""
    limit = torch.finfo(torch.float16).max
    for name, parameter in model.named_parameters() if dtype == "float16" else ():
        if not (largest := float(parameter.detach().abs().max())) <= limit:
            what = f"{name} holds {largest:.3g}, float16 ends at {limit:.0f}"
            raise NumericsError(what, where="dtype", fix="export it as bfloat16 or float32")


@contextmanager
def published(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` that becomes ``out`` when the block ends well, and goes when it does not."""
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    try:
        files.make_folder(temporary)
        yield temporary
        for path in (*sorted(temporary.rglob("*")), temporary):
            files.sync(path)
        files.rename(temporary, out)
        files.sync(out.parent)
    except BaseException as error:
        files.remove_tree(temporary)
        if isinstance(error, OSError):
            raise CheckpointError(f"the export could not be written: {error.strerror}", where=str(out)) from error
        raise
