"""``llmkit evaluate``: how well a model does what it was trained for, on text."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml

from llmkit.commands.open_model import open_model, open_tokenizer
from llmkit.commands.training import check_trainable
from llmkit.config.build import build
from llmkit.config.choices import recipes_dir
from llmkit.config.schema import EvaluateConfig
from llmkit.data.datasets import dataset_for, needs_sentences
from llmkit.data.loader import eval_batches
from llmkit.data.prepare import PreparedData, prepare
from llmkit.data.token_shards import TokenShards
from llmkit.engine.device import autocast, pick_device, set_threads
from llmkit.engine.evaluate import TrainModule, evaluate
from llmkit.engine.init import resolve_init
from llmkit.engine.pseudo_perplexity import pseudo_perplexity
from llmkit.errors import ConfigError
from llmkit.interfaces import Objective, Tokenizer, TokenizerSpec
from llmkit.models.heads import head_of
from llmkit.settings import DataConfig
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.report import tokenizer_report

USUAL_OBJECTIVE = {"decoder": "causal_lm", "encoder": "masked_lm", "encoder_decoder": "span_corruption"}


def run(cfg: EvaluateConfig, args: argparse.Namespace) -> int:
    """Evaluate ``cfg.init`` on every row of the text once; print the metrics as JSON."""
    folder = resolve_init(cfg.init)
    trained = trained_config(cfg.init)
    tokenizer, model = open_tokenizer(folder), open_model(folder)
    refuse_answers(cfg, trained, model)
    objective = objective_of(cfg, trained, model.config.kind)
    if objective.reads != "windows" or model.config.kind not in objective.trains:
        check_trainable(objective, model.config)  # a masked LM may be scored beside a head for pairs
    seq_len = window_of(cfg, trained, model.config.max_seq_len)
    prepared = text_of(cfg, trained, tokenizer, objective)
    shards = shards_of(cfg, prepared)
    split = "" if cfg.data.path else "validation"
    rows = [dataset_for(objective, shard, seq_len, split) for shard in shards]
    device = pick_device(cfg.engine.device)
    set_threads(cfg.engine.n_threads)
    ids = tokenizer.token_ids()
    collate = partial(objective.collate, seq_len=seq_len, ids=ids)
    module = TrainModule(model, objective).to(device)
    with autocast(device, cfg.engine.precision), torch.inference_mode():
        metrics = evaluate(
            module,
            chain.from_iterable(eval_batches(row, collate, cfg.engine.micro_batch_size, 0, 1) for row in rows),
            n_bytes=sum(row.n_bytes for row in rows),
            device=device,
        )
        metrics = metrics or {}
        if model.config.kind == "encoder" and cfg.pseudo_ppl_tokens:
            metrics |= pseudo_perplexity(model, shards, ids, seq_len, cfg.pseudo_ppl_tokens, device)
    if needs_sentences(objective) and not cfg.data.path:
        metrics |= audit(prepared, shards, objective, seq_len)
    print(json.dumps({"init": cfg.init, "seq_len": seq_len, **metrics}, indent=2))
    return 0


def refuse_answers(cfg: EvaluateConfig, trained: dict[str, Any] | None, model: Any) -> None:
    """A model that was fine-tuned for a task is scored on text where it writes, and only on text that is given."""
    fix = f"llmkit evaluate task=... init={cfg.init}"
    if head_of(model) is not None:
        raise ConfigError("the model was fine-tuned to answer, and has no loss on plain text", where="init", fix=fix)
    if trained is not None and "objective" not in trained and not cfg.data.path:
        raise ConfigError("the run was fine-tuned on rows of a task, not on text", where="data.path", fix=fix)


def trained_config(init: str) -> dict[str, Any] | None:
    """The configuration of the run behind ``init``, or None for a bare model."""
    folder = Path(init).expanduser()
    for place in (folder, *folder.parents[:2]):  # a run, or a checkpoint inside one
        if (place / "config.yaml").is_file():
            config: dict[str, Any] = yaml.safe_load((place / "config.yaml").read_text())
            return config
    return None


def objective_of(cfg: EvaluateConfig, trained: dict[str, Any] | None, kind: str) -> Objective:
    """The one asked for, else the run's own, else the usual one of the model's kind."""
    if cfg.objective is not None:
        objective: Objective = build(cfg.objective)
    elif trained is not None and "objective" in trained:
        objective = build(trained["objective"])
    else:
        objective = build(yaml.safe_load((recipes_dir() / "objective" / f"{USUAL_OBJECTIVE[kind]}.yaml").read_text()))
    return objective


def window_of(cfg: EvaluateConfig, trained: dict[str, Any] | None, max_seq_len: int) -> int:
    """The run's window unless told otherwise, so that the figures are those of its validation."""
    seq_len: int = cfg.data.seq_len or (trained and trained["data"]["seq_len"]) or max_seq_len
    if seq_len > max_seq_len:
        what = f"windows of {seq_len} tokens, but the model takes at most {max_seq_len}"
        raise ConfigError(what, where="data.seq_len", fix=f"set it to {max_seq_len} or less")
    return seq_len


def text_of(
    cfg: EvaluateConfig, trained: dict[str, Any] | None, tokenizer: Tokenizer, objective: Objective
) -> PreparedData:
    """``data.path``, or the text the run was trained on."""
    data = cfg.data
    if not data.path:
        if trained is None:
            what = "there is no text: this model is not a run's, so it has no validation text of its own"
            raise ConfigError(what, where="data.path", fix="data.path=heldout.txt")
        data = DataConfig(**trained["data"])
        if trained["init"] is None:  # the run trained or opened its tokenizer: the same node finds its cache entry
            prepared = prepared_text(data, objective, spec=build(trained["tokenizer"]))
            if load_tokenizer(prepared.tokenizer_folder).fingerprint == tokenizer.fingerprint:
                return prepared
    return prepared_text(data, objective, tokenizer=tokenizer)


def prepared_text(
    data: DataConfig, objective: Objective, *, spec: TokenizerSpec | None = None, tokenizer: Tokenizer | None = None
) -> PreparedData:
    return prepare(
        data,
        spec,
        tokenizer=tokenizer,
        load=load_tokenizer,
        report=tokenizer_report,
        sentences=needs_sentences(objective),
        progress=sys.stderr.isatty(),
    )


def shards_of(cfg: EvaluateConfig, prepared: PreparedData) -> Sequence[TokenShards]:
    """All of ``data.path``, or the run's validation text."""
    if cfg.data.path:
        return prepared.train
    if prepared.val is None:
        raise ConfigError("the run held no text out", where="data.path", fix="data.path=heldout.txt")
    return [prepared.val]


def audit(
    prepared: PreparedData, shards: Sequence[TokenShards], objective: Objective, seq_len: int
) -> dict[str, float]:
    """What a bag of words, trained on the run's training pairs, makes of the validation pairs.

    Well above 0.5 it means that they can be told without reading.
    """
    from llmkit.metrics.shortcut_audit import audit_pairs

    train = dataset_for(objective, prepared.train[0], seq_len, "training")
    return audit_pairs(train, dataset_for(objective, shards[0], seq_len, "validation"))
