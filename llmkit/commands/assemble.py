"""From what a command wants trained to a trainer: checkpoints, devices, batches, optimizer."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from llmkit.commands.automatic import CHOICES, Workload, apply, attention_shape, settle
from llmkit.config.build import build
from llmkit.config.schema import FinetuneConfig, PretrainConfig
from llmkit.data.cache import cache_root
from llmkit.data.grouped_order import GroupedOrder
from llmkit.data.loader import TrainBatches, check_enough, eval_batches
from llmkit.data.sampler import SampleOrder
from llmkit.engine.best_metric import BestMetric
from llmkit.engine.checkpoint import Checkpoint, CheckpointStore
from llmkit.engine.device import device_name, make_accelerator, pick_device
from llmkit.engine.evaluate import EvalSet, TrainModule
from llmkit.engine.limits import global_batch_size, grad_accum_steps_for, steps_to_run
from llmkit.engine.manifest import config_hash
from llmkit.engine.meter import Meter
from llmkit.engine.optim import decay_groups, spare_compiler_import
from llmkit.engine.recorder import Recorder
from llmkit.engine.throughput import peak_flops
from llmkit.engine.trainer import Trainer
from llmkit.errors import CheckpointError, ConfigError, DataError
from llmkit.interfaces import Batch, Objective, Row, RunInfo, SequenceDataset, Tokenizer
from llmkit.objectives.pairing import flops_per_token
from llmkit.settings import EngineConfig
from llmkit.tracking.logs import log_to

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator
    from numpy.typing import NDArray

log = logging.getLogger("llmkit.training")

Config = PretrainConfig | FinetuneConfig
Collate = Callable[[Sequence[Row]], Batch]
Score = Callable[[], "dict[str, float] | None"]


@dataclass(frozen=True)
class Work:
    """What a command wants trained; all that differs between the commands that train."""

    command: str
    model: Any
    objective: Objective
    tokenizer: Tokenizer
    seq_len: int  # the most tokens of a row
    tokens_per_row: float  # about how many a row has
    train: tuple[SequenceDataset, ...]  # one item a source
    weights: tuple[float, ...] | None  # share of each source
    lengths: NDArray[np.int64] | None  # rows x sides: batches are of rows of like length; for a single source
    eval_rows: Mapping[str, tuple[SequenceDataset, ...]]  # by the prefix of their metrics; none is empty
    scorer: Callable[[Accelerator, Callable[[], bool]], Score] | None  # metrics of answers to the rows of ``val``
    usual_metric: str  # picks the best checkpoint where the configuration names none
    evaluate_first: bool
    facts: Mapping[str, Any]  # for trackers and reports
    save_model: Callable[[Path], None]


@dataclass(frozen=True)
class Start:
    """Where a run goes on: its checkpoints, and the newest of them when there is one."""

    store: CheckpointStore
    checkpoint: Checkpoint | None
    data_key: str


def start_recorder(cfg: Config, folder: Path, is_main: bool) -> Recorder:
    """``train.log``, ``metrics.jsonl`` and the trackers on rank 0; a silent recorder elsewhere."""
    if not is_main:
        return Recorder(None)
    log_to(folder / "train.log")
    return Recorder(folder / "metrics.jsonl", [build(node) for node in cfg.tracking.values()])


def find_start(cfg: Config, folder: Path, data_key: str) -> Start:
    """The run's checkpoints, and from which of them it goes on."""
    store = CheckpointStore(
        folder / "checkpoints",
        keep_last=cfg.engine.keep_last,
        keep_best=cfg.engine.keep_best,
        facts={"run": cfg.run.name, "config_hash": config_hash(asdict(cfg))},
    )
    return Start(store, newest_checkpoint(store, cfg, data_key), data_key)


def newest_checkpoint(store: CheckpointStore, cfg: Config, data_key: str) -> Checkpoint | None:
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
            f"the data changed since step {checkpoint.step} was saved: the tokens are not the ones it was trained on",
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


def build_optimizer(node: Mapping[str, Any], model: Any) -> Optimizer:
    """The ``optim`` node: an llmkit optimizer, or any of ``torch.optim`` with the same two parameter groups."""
    spare_compiler_import()
    if node["_target_"].startswith("torch.optim."):
        groups = decay_groups(model.parameters(), node.get("weight_decay", 0.0))
        optimizer: Optimizer = build(node, params=groups)
        return optimizer
    return build(node).build(model)  # type: ignore[no-any-return]


def assemble(
    cfg: Config, work: Work, start: Start, folder: Path, recorder: Recorder, stop_requested: Callable[[], bool]
) -> Trainer:
    """A trainer whose ``fit`` can be called, at the place where the run goes on."""
    model, objective, checkpoint = work.model, work.objective, start.checkpoint
    n_kept = cfg.engine.keep_last + cfg.engine.keep_best + 1  # one more while the newest is being written
    start.store.check_space(n_kept * 3 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad))
    order = sample_order(work, cfg.run.seed)
    cfg = replace(cfg, engine=settled_engine(cfg, work, checkpoint, order.n_samples))
    engine = cfg.engine
    accelerator = make_accelerator(engine)
    apply(engine, model)
    collate = partial(objective.collate, seq_len=work.seq_len, ids=work.tokenizer.token_ids())
    batches = train_batches(work, order, engine, collate, accelerator)
    batch_size = global_batch_size(engine, accelerator.num_processes)
    run = describe_run(cfg, work, start, folder, batch_size, order.n_samples)
    check_warmup(cfg.schedule, run.max_steps)
    trainer = Trainer(
        accelerator=accelerator,
        module=TrainModule(model, objective).to(accelerator.device),
        optimizer=build_optimizer(cfg.optim, model),
        schedule=build(cfg.schedule),
        engine=engine,
        seed=cfg.run.seed,
        global_batch_size=batch_size,
        load_step=batches.step,
        eval_sets=eval_sets(cfg, work, collate, accelerator, stop_requested),
        best_metric=BestMetric.of(engine.best_metric, work.usual_metric),
        evaluate_first=work.evaluate_first,
        record=recorder,
        save=checkpoint_writer(start, engine, recorder, work.save_model),
        stop_requested=stop_requested,
        callbacks=[build(node, tokenizer=work.tokenizer) for node in cfg.callbacks.values()],
        run=run,
        meter=Meter(
            objective.metrics,
            flops_per_token(objective, model.config, work.seq_len),
            peak_flops(device_name(accelerator.device), engine.precision),
            accelerator.num_processes,
            accelerator.device.type,
        ),
    )
    go_on(trainer, checkpoint, recorder)
    recorder.start(run)
    return trainer


def check_warmup(schedule: Mapping[str, Any], max_steps: int) -> None:
    """Warn of a learning rate that never gets to its peak: only now is it known how long an epoch is."""
    if (warmup := schedule.get("warmup_steps", 0)) > max_steps:
        what = "the run ends after %d steps, before the %d steps of the warm-up: set schedule.warmup_steps=%d"
        log.warning(what, max_steps, warmup, max_steps // 10)


def go_on(trainer: Trainer, checkpoint: Checkpoint | None, recorder: Recorder) -> None:
    """State and metrics as they were when the checkpoint was written; a fresh log without one."""
    if checkpoint is None:
        recorder.rewind({}, offset=0)
        return
    trainer.restore(checkpoint.state, checkpoint.tensors())
    recorder.rewind(checkpoint.state["metrics"], offset=checkpoint.state["metrics_offset"])
    is_done = checkpoint.step >= trainer.max_steps or trainer.has_stalled
    done = "is complete: nothing to do" if is_done else "goes on"
    log.info("%s %s after step %d", trainer.run.name, done, checkpoint.step)


def settled_engine(cfg: Config, work: Work, checkpoint: Checkpoint | None, n_samples: int) -> EngineConfig:
    """The engine section of this run: the micro-batches of its checkpoint, and nothing left to ``auto``."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    engine = engine_for(cfg.engine, world_size, checkpoint)
    tokens = max(1, round(work.tokens_per_row))
    batch_size = global_batch_size(engine, world_size)
    steps = steps_to_run(engine, batch_size=batch_size, seq_len=tokens, n_sequences=n_samples)
    config = work.model.config
    flops = flops_per_token(work.objective, config, work.seq_len) * tokens * batch_size * steps / world_size
    attention = attention_shape(config, work.seq_len)
    windows = work.command == "pretrain" and attention is not None  # of one shape, through blocks that are known
    workload = Workload(flops, attention, can_compile=windows)
    state = {} if checkpoint is None else checkpoint.state
    cache = cache_root(getattr(cfg.data, "cache_dir", None))
    return settle(engine, pick_device(engine.device), workload, state=state, cache=cache)


def sample_order(work: Work, seed: int) -> SampleOrder:
    """The order of the training rows."""
    sizes = tuple(data.n_sequences for data in work.train)
    if work.lengths is None:
        return SampleOrder(sizes, work.weights, seed)
    return GroupedOrder(sizes, seed, work.lengths)


def train_batches(
    work: Work, order: SampleOrder, engine: EngineConfig, collate: Collate, accelerator: Accelerator
) -> TrainBatches:
    """This rank's share of the training rows, in an order that no number of ranks changes."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    check_enough(order.n_samples, global_batch_size(engine, world_size), of_task=work.command == "finetune")
    if accelerator.device.type == "cuda":
        collate = in_pinned_memory(collate)
    sizes = engine.micro_batch_size, engine.grad_accum_steps
    return TrainBatches(work.train, order, collate, *sizes, rank, world_size)


def in_pinned_memory(collate: Collate) -> Collate:
    """The same batches where a GPU can fetch them by itself; made by the thread that reads ahead."""
    return lambda rows: collate(rows).pinned()


def eval_sets(
    cfg: Config, work: Work, collate: Collate, accelerator: Accelerator, stop_requested: Callable[[], bool]
) -> dict[str, EvalSet]:
    """What is evaluated during training, by the prefix of its metrics."""
    size = cfg.engine.eval_batch_size or cfg.engine.micro_batch_size
    share = accelerator.process_index, accelerator.num_processes

    def pass_over(rows: Sequence[SequenceDataset]) -> Iterator[Batch]:
        return chain.from_iterable(eval_batches(part, collate, size, *share) for part in rows)

    score = None if work.scorer is None else work.scorer(accelerator, stop_requested)
    return {
        name: EvalSet(partial(pass_over, rows), sum(part.n_bytes for part in rows), score if name == "val" else None)
        for name, rows in work.eval_rows.items()
    }


def describe_run(cfg: Config, work: Work, start: Start, folder: Path, batch_size: int, n_sequences: int) -> RunInfo:
    """What the trackers, the callbacks and the checkpoints say of this run."""
    tokens = max(1, round(work.tokens_per_row))
    return RunInfo(
        name=cfg.run.name,
        folder=folder,
        command=work.command,
        config=asdict(cfg),
        max_steps=steps_to_run(cfg.engine, batch_size=batch_size, seq_len=tokens, n_sequences=n_sequences),
        facts={
            "n_params": sum(p.numel() for p in work.model.parameters()),
            "tokens_per_step": batch_size * tokens,
            "n_sequences": n_sequences,
            "data_key": start.data_key,
            "tokenizer": work.tokenizer.fingerprint,
            **work.facts,
        },
    )


def checkpoint_writer(
    start: Start, engine: EngineConfig, recorder: Recorder, save_model: Callable[[Path], None]
) -> Callable[[Trainer, bool], None]:
    """The trainer's ``save``: weights as a Hugging Face folder, optimizer, progress; published by one rename."""

    def save(trainer: Trainer, best: bool) -> None:
        if not trainer.accelerator.is_main_process:
            return
        state = trainer.state() | {
            "metrics_offset": recorder.secured_offset(),
            "metrics": recorder.latest,
            "data_key": start.data_key,
            "choices": {name: getattr(engine, name) for name in CHOICES},
        }
        tensors = trainer.optimizer_tensors()
        start.store.save(trainer.progress.step, state=state, tensors=tensors, write_model=save_model, best=best)

    return save
