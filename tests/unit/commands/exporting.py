"""Small models of every kind with a tokenizer, from the packaged recipes, for tests of ``llmkit export``."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmkit.commands import export as command
from llmkit.commands.export import run
from llmkit.commands.exported import Exported
from llmkit.commands.training import write_model
from llmkit.config.build import build
from llmkit.config.choices import recipes_dir
from llmkit.config.schema import ExportConfig
from llmkit.errors import CheckpointError
from llmkit.interfaces import Tokenizer
from llmkit.models.head_config import HeadConfig
from llmkit.models.heads import attach_head
from llmkit.models.hf import save_model
from llmkit.settings import CardConfig

WORDS = ["the", "a", "cat", "dog", "house", "river", "sat", "ran", "made", "under", "over", "and", "café", "return"]
TEXTS = [" ".join(WORDS[i * k % len(WORDS)] for k in range(3, 11)) + f", {i * i}." for i in range(1, 80)]
VOCAB_SIZES = {"wordpiece": 100}
SMALL: dict[str, Any] = {"max_seq_len": 48, "d_model": 24, "n_layers": 2, "dropout": 0.0}


def node(group: str, option: str, **changes: Any) -> Any:
    """A packaged option as its object, some fields changed."""
    fields = yaml.safe_load((recipes_dir() / group / f"{option}.yaml").read_text(encoding="utf-8"))
    return build({**fields, **changes})


@functools.cache
def trained(kind: str) -> Tokenizer:
    """A tokenizer of the ``tokenizer`` group."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer: Tokenizer = node("tokenizer", kind, vocab_size=VOCAB_SIZES.get(kind, 320)).train(TEXTS, Path(folder))
    return tokenizer


def small_model(option: str, tokenizer: Tokenizer, **changes: Any) -> Any:
    """A model of the ``model`` group in which no weight is 0 or 1."""
    heads = {} if option.startswith("lstm") else {"n_heads": 4}
    model = node("model", option, **{**SMALL, **heads, **changes}).with_vocab(tokenizer.vocab_size).build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def write_source(folder: Path, option: str, kind: str = "bpe", **changes: Any) -> Path:
    """A model folder as a run leaves it."""
    tokenizer = trained(kind)
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    save_model(small_model(option, tokenizer, **changes), folder, **ids)
    tokenizer.save(folder)
    return folder


def write_tuned(folder: Path, option: str, tokenizer_kind: str, head: HeadConfig, **changes: Any) -> Path:
    """The same with a task head in which no weight is 0 or 1."""
    tokenizer = trained(tokenizer_kind)
    model = small_model(option, tokenizer, **changes)
    attach_head(model, head, seed=0)
    with torch.no_grad():
        for parameter in model.task_head.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    write_model(model, tokenizer, folder)
    return folder


def config(init: Path | str, out: Path, format: str = "hf", dtype: str = "float32", **card: str) -> ExportConfig:
    said = {"license": None, "data_license": None, "language": None, **card}
    return ExportConfig(str(init), format, dtype, str(out), CardConfig(**said))  # type: ignore[arg-type]


def export(*args: Any, **kwargs: Any) -> int:
    """``llmkit export`` with these values."""
    return run(config(*args, **kwargs), None)  # type: ignore[arg-type]


def export_spoilt(
    source: Path, out: Path, spoil: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch, match: str
) -> CheckpointError:
    """The error of an export whose files are spoilt between writing and checking."""
    check = command.check_export

    def spoilt(exported: Exported) -> Any:
        spoil(exported.folder)
        return check(exported)

    monkeypatch.setattr(command, "check_export", spoilt)
    with pytest.raises(CheckpointError, match=match) as caught:
        export(source, out)
    return caught.value
