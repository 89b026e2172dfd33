"""``llmkit evaluate``: loss, perplexity and bits per byte of a model on text."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import yaml

from llmkit.config.build import build
from llmkit.config.schema import EvaluateConfig
from llmkit.data.loader import eval_batches
from llmkit.data.prepare import prepare
from llmkit.data.token_shards import WindowDataset
from llmkit.engine.device import autocast, pick_device, set_threads
from llmkit.engine.evaluate import TrainModule, evaluate_loss
from llmkit.engine.init import resolve_init
from llmkit.errors import ConfigError
from llmkit.models.hf import load_model
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.report import tokenizer_report


def run(cfg: EvaluateConfig, args: argparse.Namespace) -> int:
    """Evaluate ``cfg.init`` on every document of ``cfg.data.path``, each token once; print the metrics as JSON."""
    folder = resolve_init(cfg.init)
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    prepared = prepare(
        cfg.data,
        None,
        tokenizer=tokenizer,
        load=load_tokenizer,
        report=tokenizer_report,
        progress=sys.stderr.isatty(),
    )
    objective = build(cfg.objective)
    seq_len = cfg.data.seq_len or trained_seq_len(cfg.init) or model.config.max_seq_len
    if seq_len > model.config.max_seq_len:
        what = f"windows of {seq_len} tokens, but the model takes at most {model.config.max_seq_len}"
        raise ConfigError(what, where="data.seq_len", fix=f"set it to {model.config.max_seq_len} or less")
    collate = partial(objective.collate, seq_len=seq_len, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    windows = [WindowDataset(shards, seq_len) for shards in prepared.train]
    device = pick_device(cfg.engine.device)
    set_threads(cfg.engine.n_threads)
    with autocast(device, cfg.engine.precision), torch.inference_mode():
        metrics = evaluate_loss(
            TrainModule(model, objective).to(device),
            chain.from_iterable(eval_batches(w, collate, cfg.engine.micro_batch_size, 0, 1) for w in windows),
            n_bytes=sum(w.n_bytes for w in windows),
            device=device,
        )
    print(json.dumps({"init": cfg.init, "seq_len": seq_len, **(metrics or {})}, indent=2))
    return 0


def trained_seq_len(init: str) -> int | None:
    """The window of the run behind ``init``, so that the figures are those of its validation; None for a bare model."""
    folder = Path(init).expanduser()
    for place in (folder, *folder.parents[:2]):  # a run, or a checkpoint inside one
        if (place / "config.yaml").is_file():
            seq_len: int | None = yaml.safe_load((place / "config.yaml").read_text())["data"]["seq_len"]
            return seq_len
    return None
