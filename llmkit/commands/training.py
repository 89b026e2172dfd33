"""What every training command builds, in reading order: text, model, engine, trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from llmkit.config.build import build
from llmkit.config.schema import PretrainConfig
from llmkit.data.datasets import counts_of, dataset_for, needs_sentences
from llmkit.data.loader import TrainBatches, check_enough, check_vocabulary, eval_batches
from llmkit.data.prepare import PreparedData, prepare
from llmkit.data.sampler import SampleOrder
from llmkit.engine.checkpoint import Checkpoint, CheckpointStore
from llmkit.engine.device import device_name, make_accelerator
from llmkit.engine.evaluate import EvalSet, TrainModule
from llmkit.engine.init import resolve_init
from llmkit.engine.limits import global_batch_size, grad_accum_steps_for, steps_to_run
from llmkit.engine.manifest import config_hash
from llmkit.engine.meter import Meter
from llmkit.engine.optim import decay_groups, spare_compiler_import
from llmkit.engine.recorder import Recorder
from llmkit.engine.throughput import peak_flops
from llmkit.engine.trainer import Trainer
from llmkit.errors import CheckpointError, ConfigError, DataError
from llmkit.interfaces import Batch, ModelConfig, Objective, Row, RunInfo, SequenceDataset, TokenIds, Tokenizer
from llmkit.models.hf import load_model, save_model
from llmkit.models.resize import resize_embeddings
from llmkit.models.transformers_config import TransformersConfig
from llmkit.objectives.pairing import flops_per_token, misfit
from llmkit.settings import EngineConfig
from llmkit.tokenizers.grow import add_tokens
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.report import tokenizer_report
from llmkit.tracking.logs import log_to

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
    val = None if prepared.val is None else dataset_for(objective, prepared.val, seq_len)
    train = tuple(dataset_for(objective, shards, seq_len) for shards in prepared.train)
    for dataset in train:
        if counts := counts_of(dataset):
            log.info("training pairs: %s", counts)
    old = () if old_text is None else tuple(dataset_for(objective, shards, seq_len) for shards in old_text.train)
    return Datasets(train, val, old)


def start_recorder(cfg: PretrainConfig, folder: Path, is_main: bool) -> Recorder:
    """``train.log``, ``metrics.jsonl`` and the trackers on rank 0; a silent recorder elsewhere."""
    if not is_main:
        return Recorder(None)
    log_to(folder / "train.log")
    return Recorder(folder / "metrics.jsonl", [build(node) for node in cfg.tracking.values()])


def load_text(cfg: PretrainConfig, *, progress: bool) -> Text:
    """Tokenizer and token shards, from the cache where their inputs are unchanged."""
    init = None if cfg.init is None else resolve_init(cfg.init)
    objective: Objective = build(cfg.objective)
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
    return prepare(
        replace(cfg.data, path=cfg.data.old_val_path, weights=None, val_path=None, val_fraction=0.0),
        None,
        tokenizer=tokenizer,
        load=load_tokenizer,
        report=tokenizer_report,
        sentences=needs_sentences(objective),
        progress=progress,
    )


def starting_model(cfg: PretrainConfig, text: Text, checkpoint: Checkpoint | None) -> Any:
    """The model of the checkpoint, of ``init``, or a fresh one from ``model`` and the seed."""
    if checkpoint is not None:
        model = load_model(checkpoint.model)
    elif text.init is not None:
        model = opened_model(cfg, text.init)
        make_room(model, load_tokenizer(text.init).vocab_size, text.tokenizer.vocab_size)
    else:
        model = fresh_model(cfg, text.tokenizer)
    if cfg.data.window(model.config.max_seq_len) > model.config.max_seq_len:
        raise ConfigError(
            f"windows of {cfg.data.seq_len} tokens, but the model takes at most {model.config.max_seq_len}",
            where="data.seq_len",
            fix=f"set data.seq_len to {model.config.max_seq_len} or less",
        )
    check_vocabulary(text.tokenizer.vocab_size, model.config.vocab_rows)
    if hasattr(model, "freeze_unused"):  # a module of another library
        model.freeze_unused()
    if cfg.engine.activation_checkpointing:
        model.set_activation_checkpointing(True)
    if cfg.engine.compile:
        model.compile_blocks()
    return model


def opened_model(cfg: PretrainConfig, init: Path) -> Any:
    """The model of ``init``: by llmkit's tables, or wrapped as it is where the `model` section says so."""
    wrapper = build(cfg.model)
    if isinstance(wrapper, TransformersConfig):
        log.info("weights, sizes and tokenizer come from %s, opened by transformers for %s", init, wrapper.task)
        return wrapper.load(init, seed=cfg.run.seed)
    log.info("weights, sizes and tokenizer come from %s; the `model` section is not used", init)
    return load_model(init, seed=cfg.run.seed)


def make_room(model: Any, n_known: int, n_ids: int) -> None:
    """Embeddings for the ids of a vocabulary that grew; the model was trained with ``n_known`` of them."""
    rows = model.config.vocab_rows
    if n_ids > min(n_known, rows):
        resize_embeddings(model, max(rows, n_ids), known=min(n_known, rows))


def fresh_model(cfg: PretrainConfig, tokenizer: Tokenizer) -> Any:
    """Random weights drawn from the run's seed."""
    config = build(cfg.model).with_vocab(tokenizer.vocab_size)
    if isinstance(config, TransformersConfig):
        config = config.with_special_ids(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    model = config.build()
    model.init_weights(cfg.run.seed)
    return model


def newest_checkpoint(store: CheckpointStore, cfg: PretrainConfig, data_key: str) -> Checkpoint | None:
    """What ``run.resume`` says to continue from."""
    checkpoint = store.newest()
    if checkpoint is None and cfg.run.resume == "must":
        raise CheckpointError("there is no checkpoint to resume", where=str(store.folder), fix="run.resume=auto")
    if checkpoint is not None and cfg.run.resume == "never":
        raise CheckpointError(
            f"the run already has a checkpoint of step {checkpoint.step}",
            where=str(store.folder),
            fix="choose another run.name, or run.resume=auto to go on with it",
        )
    if checkpoint is not None and checkpoint.state["data_key"] != data_key:
        raise DataError(
            f"the text changed since step {checkpoint.step} was saved: the tokens are not the ones it was trained on",
            where="data.path",
            fix="bring the old files back, or train under another run.name with init=<this run>",
        )
    return checkpoint


def engine_for(engine: EngineConfig, world_size: int, checkpoint: Checkpoint | None) -> EngineConfig:
    """The engine section with the micro-batches that keep a checkpoint's global batch."""
    configured = global_batch_size(engine, world_size)
    saved = configured if checkpoint is None else checkpoint.state["global_batch_size"]
    if saved == configured:
        return engine
    accum = grad_accum_steps_for(saved, engine, world_size)
    if checkpoint is not None and checkpoint.state["world_size"] == world_size:
        raise ConfigError(
            f"the checkpoint was written with {saved} sequences a step, this command asks for {configured}",
            where="engine.grad_accum_steps",
            fix=f"engine.grad_accum_steps={accum}",
        )
    log.info("engine.grad_accum_steps=%d keeps the checkpoint's %d sequences a step", accum, saved)
    return replace(engine, grad_accum_steps=accum)


def check_trainable(objective: Objective, config: ModelConfig) -> None:
    """Raise ConfigError when the objective is not one for this model."""
    if problem := misfit(objective, config):
        what, fix = problem
        raise ConfigError(what, where="objective", fix=fix or "choose another objective, or another model or init")


def check_symbols(objective: Objective, ids: TokenIds, seq_len: int) -> None:
    """Raise ConfigError when the vocabulary lacks a symbol that the objective writes."""
    if problem := objective.lacks(ids, seq_len):
        what, fix = problem
        raise ConfigError(what, where="tokenizer", fix=fix)


def train_batches(
    cfg: PretrainConfig, datasets: Datasets, engine: EngineConfig, collate: Collate, rank: int, world_size: int
) -> TrainBatches:
    """This rank's share of the training rows, in an order that no number of ranks changes."""
    weights = None if cfg.data.weights is None else tuple(cfg.data.weights)
    order = SampleOrder(tuple(data.n_sequences for data in datasets.train), weights, cfg.run.seed)
    check_enough(order.n_samples, global_batch_size(engine, world_size))
    sizes = engine.micro_batch_size, engine.grad_accum_steps
    return TrainBatches(datasets.train, order, collate, *sizes, rank, world_size)


def eval_sets(
    cfg: PretrainConfig, datasets: Datasets, collate: Collate, rank: int, world_size: int
) -> dict[str, EvalSet]:
    """What is evaluated during training: the held-out text as ``val``, what the model knew before as ``val_old``."""
    size = cfg.engine.eval_batch_size or cfg.engine.micro_batch_size

    def pass_over(rows: Sequence[SequenceDataset]) -> Iterator[Batch]:
        return chain.from_iterable(eval_batches(part, collate, size, rank, world_size) for part in rows)

    named = {"val": () if datasets.val is None else (datasets.val,), "val_old": datasets.old}
    return {
        name: EvalSet(partial(pass_over, rows), sum(part.n_bytes for part in rows))
        for name, rows in named.items()
        if rows
    }


def describe_run(
    cfg: PretrainConfig, text: Text, folder: Path, model: Any, batch_size: int, n_sequences: int
) -> RunInfo:
    """What the trackers, the callbacks and the checkpoints say of this run."""
    seq_len = cfg.data.window(model.config.max_seq_len)
    return RunInfo(
        name=cfg.run.name,
        folder=folder,
        command="pretrain",
        config=asdict(cfg),
        max_steps=steps_to_run(cfg.engine, batch_size=batch_size, seq_len=seq_len, n_sequences=n_sequences),
        facts={
            "n_params": model.config.n_params(),
            "tokens_per_step": batch_size * seq_len,
            "n_sequences": n_sequences,
            "data_key": text.prepared.folder.name,
            "tokenizer": text.tokenizer.fingerprint,
        },
    )


def checkpoint_writer(
    store: CheckpointStore, recorder: Recorder, text: Text, model: Any
) -> Callable[[Trainer, bool], None]:
    """The trainer's ``save``: weights as a Hugging Face folder, optimizer, progress; published by one rename."""

    def save(trainer: Trainer, best: bool) -> None:
        if not trainer.accelerator.is_main_process:
            return
        state = trainer.state() | {
            "metrics_offset": recorder.secured_offset(),
            "metrics": recorder.latest,
            "data_key": text.prepared.folder.name,
        }

        def write_model(folder: Path) -> None:
            ids = text.tokenizer
            save_model(model, folder, bos_id=ids.bos_id, eos_id=ids.eos_id, pad_id=ids.pad_id)
            ids.save(folder)

        store.save(
            trainer.progress.step,
            state=state,
            tensors=trainer.optimizer_tensors(),
            write_model=write_model,
            best=best,
        )

    return save


def build_optimizer(node: Mapping[str, Any], model: Any) -> Optimizer:
    """The ``optim`` node: an llmkit optimizer, or any of ``torch.optim`` with the same two parameter groups."""
    spare_compiler_import()
    if node["_target_"].startswith("torch.optim."):
        groups = decay_groups(model.parameters(), node.get("weight_decay", 0.0))
        optimizer: Optimizer = build(node, params=groups)
        return optimizer
    return build(node).build(model)  # type: ignore[no-any-return]


def make_trainer(
    cfg: PretrainConfig, text: Text, folder: Path, recorder: Recorder, stop_requested: Callable[[], bool]
) -> Trainer:
    """Everything from the newest checkpoint to a trainer whose ``fit`` can be called."""
    data_key = text.prepared.folder.name
    store = CheckpointStore(
        folder / "checkpoints",
        keep_last=cfg.engine.keep_last,
        keep_best=cfg.engine.keep_best,
        facts={"run": cfg.run.name, "config_hash": config_hash(asdict(cfg))},
    )
    checkpoint = newest_checkpoint(store, cfg, data_key)
    model = starting_model(cfg, text, checkpoint)
    n_kept = cfg.engine.keep_last + cfg.engine.keep_best + 1  # one more while the newest is being written
    store.check_space(n_kept * 3 * 4 * model.config.n_params())  # fp32 weights and two moments
    accelerator = make_accelerator(cfg.engine)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    engine = engine_for(cfg.engine, world_size, checkpoint)
    objective: Objective = build(cfg.objective)
    check_trainable(objective, model.config)
    seq_len, ids = cfg.data.window(model.config.max_seq_len), text.tokenizer.token_ids()
    check_symbols(objective, ids, seq_len)
    datasets = open_datasets(text.prepared, objective, seq_len, text.old)
    collate = partial(objective.collate, seq_len=seq_len, ids=ids)
    batches = train_batches(cfg, datasets, engine, collate, rank, world_size)
    batch_size = global_batch_size(engine, world_size)
    run = describe_run(cfg, text, folder, model, batch_size, batches.order.n_samples)
    trainer = Trainer(
        accelerator=accelerator,
        module=TrainModule(model, objective).to(accelerator.device),
        optimizer=build_optimizer(cfg.optim, model),
        schedule=build(cfg.schedule),
        engine=engine,
        seed=cfg.run.seed,
        global_batch_size=batch_size,
        load_step=batches.step,
        eval_sets=eval_sets(cfg, datasets, collate, rank, world_size),
        evaluate_first=text.init is not None,
        record=recorder,
        save=checkpoint_writer(store, recorder, text, model),
        stop_requested=stop_requested,
        callbacks=[build(node, tokenizer=text.tokenizer) for node in cfg.callbacks.values()],
        run=run,
        meter=Meter(
            objective.metrics,
            flops_per_token(objective, model.config, seq_len),
            peak_flops(device_name(accelerator.device), engine.precision),
            world_size,
            accelerator.device.type,
        ),
    )
    if checkpoint is None:
        recorder.rewind({}, offset=0)
    else:
        trainer.restore(checkpoint.state, checkpoint.tensors())
        recorder.rewind(checkpoint.state["metrics"], offset=checkpoint.state["metrics_offset"])
        done = "is complete: nothing to do" if checkpoint.step >= run.max_steps else "goes on"
        log.info("%s %s after step %d", cfg.run.name, done, checkpoint.step)
    recorder.start(run)
    return trainer
