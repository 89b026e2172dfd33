"""``llmkit pretrain --dry-run``: what a run would do, from the configuration alone, without torch or weights."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

from llmkit.config.build import build
from llmkit.config.schema import PretrainConfig
from llmkit.data.readers.base import find_sources
from llmkit.engine.limits import global_batch_size, steps_to_run
from llmkit.errors import ConfigError
from llmkit.interfaces import ModelConfig
from llmkit.models.transformers_config import TransformersConfig
from llmkit.objectives.pairing import flops_per_token

GIB = 1 << 30
BYTES_PER_VALUE = {"auto": 4, "fp32": 4, "bf16": 2, "fp16": 2}  # auto: the most it can be


def show_plan(cfg: PretrainConfig, args: argparse.Namespace) -> int:
    """Print the plan, a line a fact; 0 when the run could start."""
    for name, value in plan(cfg, int(os.environ.get("WORLD_SIZE", "1"))):
        print(f"{name:<18} {value}")
    print("differs from the recipe:")
    for line in args.differences or ["nothing"]:
        print(f"  {line}")
    return 0


def plan(cfg: PretrainConfig, world_size: int) -> Iterator[tuple[str, str]]:
    """(name, value) pairs in the order they are shown."""
    for path in (cfg.data.path, cfg.data.val_path):
        if path is not None:
            find_sources(path)  # a plan for text that is not there would be none
    model = planned_model(cfg)
    batch_size = global_batch_size(cfg.engine, world_size)
    seq_len = cfg.data.window(model.max_seq_len)
    flops = flops_per_token(build(cfg.objective), model, seq_len)
    tokens_per_step = batch_size * seq_len
    yield "run", f"{cfg.run.root}/{cfg.run.name}, seed {cfg.run.seed}, resume {cfg.run.resume}"
    yield "start from", cfg.init or "random weights"
    yield "text", f"{cfg.data.path}, validation {cfg.data.val_path or f'{cfg.data.val_fraction:.1%} of the documents'}"
    yield "parameters", f"{model.n_params():,} ({model.n_params_without_embeddings():,} without embeddings)"
    yield "opens as", model.hf_architecture() or "llmkit only: no Hugging Face architecture has these options"
    yield "batch", f"{batch_size} sequences of {seq_len} tokens = {tokens_per_step:,} tokens a step"
    yield "length", planned_length(cfg, model, batch_size)
    yield "compute", f"{flops / 1e6:,.1f} MFLOP a token, {cfg.engine.precision}"
    for name, n_bytes in memory_estimate(cfg, model).items():
        yield f"memory: {name}", f"{n_bytes / GIB:.2f} GiB"


def planned_model(cfg: PretrainConfig) -> ModelConfig:
    """The model with as many embedding rows as the tokenizer is going to need."""
    if cfg.init is not None:
        from llmkit.engine.init import resolve_init
        from llmkit.models.hf import load_config

        folder, wrapper = resolve_init(cfg.init), build(cfg.model)
        return wrapper.opened(folder) if isinstance(wrapper, TransformersConfig) else load_config(folder)
    spec = build(cfg.tokenizer)
    model: ModelConfig = build(cfg.model)
    opened = spec.open()
    return model.with_vocab(spec.vocab_size if opened is None else opened.vocab_size)


def planned_length(cfg: PretrainConfig, model: ModelConfig, batch_size: int) -> str:
    """Steps and tokens, as far as they are known before the text is prepared."""
    try:
        steps = steps_to_run(
            cfg.engine, batch_size=batch_size, seq_len=cfg.data.window(model.max_seq_len), n_sequences=None
        )
    except ConfigError:
        return f"{cfg.engine.max_epochs} epochs; the number of steps is known once the text is prepared"
    tokens = steps * batch_size * cfg.data.window(model.max_seq_len)
    return f"{steps:,} steps, {tokens:,} tokens, {tokens / model.n_params():.1f} tokens a parameter"


def memory_estimate(cfg: PretrainConfig, model: ModelConfig) -> dict[str, int]:
    """Bytes on one device: fp32 weights, gradients, optimizer state, and what one micro-batch keeps for backward."""
    weights = 4 * model.n_params()
    hidden = model.matmul_params() - model.vocab_rows * model.d_model
    hidden = min(hidden, model.n_params_without_embeddings())  # layers may share one block
    objective, seq_len = build(cfg.objective), cfg.data.window(model.max_seq_len)
    n_rows = cfg.engine.micro_batch_size * (objective.target_len(seq_len) or seq_len)
    parts = {
        "weights": weights,
        "gradients": weights,
        "optimizer": build(cfg.optim).state_bytes(hidden, model.n_params() - hidden),
        "activations": model.activation_bytes(
            cfg.engine.micro_batch_size,
            seq_len,
            value_bytes=BYTES_PER_VALUE[cfg.engine.precision],
            checkpointing=cfg.engine.memory == "low",
            logit_rows=objective.logit_rows(n_rows, model.vocab_rows),
            target_len=objective.target_len(seq_len),
        ),
    }
    return parts | {"total": sum(parts.values())}
