"""What ``llmkit pretrain`` trains, in reading order: text, model, rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from llmkit.commands.assemble import Work, assemble, find_start
from llmkit.commands.open_model import open_config, open_model
from llmkit.commands.row_counts import say_counts
from llmkit.config.build import build
from llmkit.config.choices import recipes_dir
from llmkit.config.schema import PretrainConfig
from llmkit.config.yaml_file import read_yaml
from llmkit.data.datasets import dataset_for, needs_sentences
from llmkit.data.loader import check_vocabulary
from llmkit.data.prepare import PreparedData, prepare
from llmkit.data.readers.base import find_sources
from llmkit.data.token_shards import TokenShards
from llmkit.engine.checkpoint import Checkpoint
from llmkit.engine.init import resolve_init
from llmkit.engine.recorder import Recorder
from llmkit.engine.trainer import Trainer
from llmkit.errors import ConfigError, DataError
from llmkit.interfaces import Batch, ModelConfig, Objective, Row, SequenceDataset, TokenIds, Tokenizer
from llmkit.models.heads import detach_head, head_of
from llmkit.models.hf import load_model, save_model
from llmkit.models.resize import make_room
from llmkit.models.transformers_config import TransformersConfig
from llmkit.objectives.pairing import misfit
from llmkit.tokenizers.grow import add_tokens
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.report import tokenizer_report
from llmkit.tokenizers.save import save_tokenizer

log = logging.getLogger("llmkit.training")

Collate = Callable[[Sequence[Row]], Batch]


@dataclass(frozen=True)
class Text:
    """Prepared data and the tokenizer that made it."""

    prepared: PreparedData
    tokenizer: Tokenizer
    init: Path | None  # the model folder to start from
    old: PreparedData | None  # what that model knows already, to see what it forgets


@dataclass(frozen=True)
class Datasets:
    """The rows of both splits, and of the old text; ``train`` and ``old`` have one item a source."""

    train: tuple[SequenceDataset, ...]
    val: SequenceDataset | None
    old: tuple[SequenceDataset, ...]


def open_datasets(
    prepared: PreparedData, objective: Objective, seq_len: int, old_text: PreparedData | None = None
) -> Datasets:
    """Prepared text as the objective reads it."""

    def rows(parts: Sequence[TokenShards], split: str) -> tuple[SequenceDataset, ...]:
        found = tuple(dataset_for(objective, shards, seq_len, split) for shards in parts)
        for dataset in found:
            say_counts(objective, dataset, split)
        return found

    train = rows(prepared.train, "training")
    val = None if prepared.val is None else rows([prepared.val], "validation")[0]
    return Datasets(train, val, () if old_text is None else rows(old_text.train, "old"))


def load_text(cfg: PretrainConfig, *, progress: bool) -> Text:
    """Tokenizer and token shards, from the cache where their inputs are unchanged."""
    init = None if cfg.init is None else resolve_init(cfg.init)
    objective: Objective = build(cfg.objective)
    if init is not None:
        check_init(cfg, init, objective)
    if cfg.data.old_val_path is not None:  # before the main text, which takes long
        with naming_old_text():
            find_sources(cfg.data.old_val_path)
    prepared = prepare(
        cfg.data,
        None if init else build(cfg.tokenizer),
        tokenizer=None if init is None else add_tokens(load_tokenizer(init), cfg.add_tokens),
        load=load_tokenizer,
        report=tokenizer_report,
        sentences=needs_sentences(objective),
        progress=progress,
    )
    tokenizer = load_tokenizer(prepared.tokenizer_folder)
    return Text(prepared, tokenizer, init, old_text(cfg, tokenizer, objective, progress=progress))


def old_text(cfg: PretrainConfig, tokenizer: Tokenizer, objective: Objective, *, progress: bool) -> PreparedData | None:
    """``data.old_val_path`` in the tokens of the run: all of it, nothing held out."""
    if cfg.data.old_val_path is None:
        return None
    with naming_old_text():
        return prepare(
            replace(cfg.data, path=cfg.data.old_val_path, weights=None, val_path=None, val_fraction=0.0),
            None,
            tokenizer=tokenizer,
            load=load_tokenizer,
            report=tokenizer_report,
            sentences=needs_sentences(objective),
            progress=progress,
        )


@contextmanager
def naming_old_text() -> Iterator[None]:
    """Errors of reading ``data.path`` become those of ``data.old_val_path``, which is read in the same way."""
    try:
        yield
    except DataError as error:
        error.where = error.where.replace("data.path", "data.old_val_path")
        raise


def starting_model(cfg: PretrainConfig, text: Text, checkpoint: Checkpoint | None) -> Any:
    """The model of the checkpoint, of ``init``, or a fresh one from ``model`` and the seed."""
    if checkpoint is not None:
        model = load_model(checkpoint.model)
    elif text.init is not None:
        model = opened_model(cfg, text.init)
        detach_head(model)
        make_room(model, load_tokenizer(text.init).vocab_size, text.tokenizer.vocab_size)
    else:
        model = fresh_model(cfg, text.tokenizer)
    check_window(cfg, model.config)
    check_vocabulary(text.tokenizer.vocab_size, model.config.vocab_rows)
    if hasattr(model, "freeze_unused"):  # a module of another library
        model.freeze_unused()
    return model


def opened_model(cfg: PretrainConfig, init: Path) -> Any:
    """The model of ``init``: by llmkit's tables, or wrapped as it is where the `model` section says so."""
    wrapper = build(cfg.model)
    if isinstance(wrapper, TransformersConfig):
        log.info("weights, sizes and tokenizer come from %s, opened by transformers for %s", init, wrapper.task)
        return wrapper.load(init, seed=cfg.run.seed)
    log.info("weights, sizes and tokenizer come from %s; the `model` section is not used", init)
    return open_model(init, seed=cfg.run.seed)


def fresh_model(cfg: PretrainConfig, tokenizer: Tokenizer) -> Any:
    """Random weights drawn from the run's seed."""
    config = build(cfg.model).with_vocab(tokenizer.vocab_size)
    if isinstance(config, TransformersConfig):
        config = config.with_special_ids(tokenizer.bos_token_id, tokenizer.eos_id, tokenizer.pad_id)
    model = config.build()
    model.init_weights(cfg.run.seed)
    return model


def check_init(cfg: PretrainConfig, init: Path, objective: Objective) -> None:
    """Raise ConfigError when the model of ``init`` cannot be trained so, before text is prepared, which takes long."""
    wrapper = build(cfg.model)
    config = wrapper.opened(init) if isinstance(wrapper, TransformersConfig) else open_config(init)
    check_trainable(objective, config)
    check_window(cfg, config)


def check_window(cfg: PretrainConfig, config: ModelConfig) -> None:
    """Raise ConfigError when ``data.seq_len`` is more than the model takes."""
    if cfg.data.window(config.max_seq_len) > config.max_seq_len:
        what = f"windows of {cfg.data.seq_len} tokens, but the model takes at most {config.max_seq_len}"
        raise ConfigError(what, where="data.seq_len", fix=f"set data.seq_len to {config.max_seq_len} or less")


def check_trainable(objective: Objective, config: ModelConfig) -> None:
    """Raise ConfigError when the objective is not one for this model, which is there already."""
    if problem := misfit(objective, config):
        fitting = "|".join(fitting_objectives(config))
        fixes = [f"objective={fitting} fits the model"] if fitting else []
        fixes += ["recipe=bert_tiny pretrains a model with a head for pairs"] if objective.reads != "windows" else []
        raise ConfigError(problem[0], where="objective", fix="; ".join(fixes) or "open another model")


def fitting_objectives(config: ModelConfig) -> Iterator[str]:
    """The objectives in ``recipes/`` that can train a model, by the names of their files."""
    for path in sorted((recipes_dir() / "objective").glob("*.yaml")):
        objective: Objective = build(read_yaml(path).tree)
        if objective.reads != "rows" and misfit(objective, config) is None:
            yield path.stem


def check_symbols(objective: Objective, ids: TokenIds, seq_len: int) -> None:
    """Raise ConfigError when the vocabulary lacks a symbol that the objective writes."""
    if problem := objective.lacks(ids, seq_len):
        what, fix = problem
        raise ConfigError(what, where="tokenizer", fix=fix)


def make_trainer(
    cfg: PretrainConfig,
    folder: Path,
    recorder: Recorder,
    is_main: bool,
    stop_requested: Callable[[], bool],
) -> Trainer:
    """Everything from raw text to a trainer whose ``fit`` can be called."""
    text = load_text(cfg, progress=is_main)
    start = find_start(cfg, folder, text.prepared.folder.name)
    model = starting_model(cfg, text, start.checkpoint)
    objective: Objective = build(cfg.objective)
    check_trainable(objective, model.config)
    seq_len = cfg.data.window(model.config.max_seq_len)
    check_symbols(objective, text.tokenizer.token_ids(), seq_len)
    datasets = open_datasets(text.prepared, objective, seq_len, text.old)
    named = {"val": () if datasets.val is None else (datasets.val,), "val_old": datasets.old}
    work = Work(
        command="pretrain",
        model=model,
        objective=objective,
        tokenizer=text.tokenizer,
        seq_len=seq_len,
        tokens_per_row=seq_len,
        train=datasets.train,
        weights=None if cfg.data.weights is None else tuple(cfg.data.weights),
        lengths=None,
        eval_rows={name: rows for name, rows in named.items() if rows},
        scorer=None,
        usual_metric="loss",
        evaluate_first=text.init is not None,
        facts={},
        save_model=partial(write_model, model, text.tokenizer),
    )
    return assemble(cfg, work, start, folder, recorder, stop_requested)


def write_model(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """The model as a Hugging Face folder, and its tokenizer."""
    save_model(model, folder, bos_id=tokenizer.bos_token_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    write_tokenizer(model, tokenizer, folder)


def write_tokenizer(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """The tokenizer, so that others make of a text what ``model`` reads."""
    save_tokenizer(tokenizer, folder, row_kind(model), segments=n_segments(model) > 1)


def row_kind(model: Any) -> str:
    """The kind of model whose rows a tokenizer has to give; a head reads whole rows, their end included."""
    return "encoder" if head_of(model) is not None else str(model.config.kind)


def n_segments(model: Any) -> int:
    """How many segments a model tells apart; of a wrapped one as its own config says."""
    if isinstance(model.config, TransformersConfig):
        return getattr(model.hf.config, "type_vocab_size", 0) or 0
    return getattr(model.config, "n_segments", 0)
