"""The training loop. There is one in llmkit: pretraining and fine-tuning differ in what is handed to it.

The loss of a step is (sum over trained tokens) / (number of trained tokens over all micro-batches and ranks): the count
is known before the first forward pass, each micro-batch contributes its sum divided by that count, and because data
parallelism averages gradients over ranks, the sum is multiplied by the number of ranks first. An objective with losses
of several kinds (masked tokens, sentence pairs) has a count for each.

Randomness is a function of (seed, step, rank), set anew before each step, and the data order is a function of the
position, so a resumed run repeats the unbroken one without any generator state in the checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llmkit.engine import optim
from llmkit.engine.best_metric import BestMetric
from llmkit.engine.evaluate import EvalSet, TrainModule, evaluate
from llmkit.engine.meter import Meter
from llmkit.errors import ConfigError, LLMKitError, NumericsError, Stopped
from llmkit.interfaces import Batch, Callback, RunInfo, Schedule
from llmkit.settings import EngineConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("llmkit.training")

OBJECTIVE = "objective"  # the name of what is differentiated, among a step's sums


class StepData(Protocol):
    """This rank's micro-batches of one step, and the first sample id over all ranks."""

    @property
    def batches(self) -> list[Batch]: ...
    @property
    def first_sample_id(self) -> int: ...


@dataclass
class Progress:
    """All that a resumed run must know besides weights and optimizer state."""

    step: int = 0
    position: int = 0  # samples consumed: the whole state of the data order
    n_tokens: int = 0
    elapsed_seconds: float = 0.0
    evaluated_step: int = -1
    best_step: int = 0
    best_value: float | None = None  # of the metric that picks the best checkpoint
    evaluations_since_best: int = 0
    first_losses: dict[str, float] = field(default_factory=dict)  # before the first step, where that is measured
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class StepResult:
    """Sums over all micro-batches and ranks of one step."""

    sums: dict[str, float]  # nats and the like
    counts: dict[str, int]  # targets of each loss
    objective: float  # what was differentiated: each loss over its count, added up
    n_tokens: int
    n_computed: int  # tokens and padding
    grad_norm: float
    stop: bool  # some rank was asked to stop


@dataclass
class Trainer:
    """Everything a run needs, built by a command. ``save`` and ``record`` act on rank 0 and do nothing elsewhere."""

    accelerator: Accelerator
    module: TrainModule
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    engine: EngineConfig
    seed: int
    global_batch_size: int
    load_step: Callable[[int], StepData]  # position -> this rank's micro-batches
    eval_sets: Mapping[str, EvalSet]  # by the prefix of their metrics
    best_metric: BestMetric
    evaluate_first: bool  # also before the first step
    record: Callable[[int, dict[str, float]], None]
    save: Callable[[Trainer, bool], None]  # (trainer, is this the best so far)
    stop_requested: Callable[[], bool]
    callbacks: Sequence[Callback]
    run: RunInfo
    meter: Meter
    progress: Progress = field(default_factory=Progress)
    saved_step: int = 0
    _clock_zero: float = 0.0  # on the performance counter; elapsed time of earlier starts lies before it

    def __post_init__(self) -> None:
        optim.remember_peak_lr(self.optimizer)
        self.wrapped, self.stepper = self.accelerator.prepare(self.module, self.optimizer)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]

    @property
    def max_steps(self) -> int:
        return self.run.max_steps

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    def fit(self) -> Progress:
        """Train to ``max_steps`` or ``max_hours``. Raises ``Stopped`` once a stop signal's checkpoint is safe."""
        self.wrapped.train()
        self._clock_zero = time.perf_counter() - self.progress.elapsed_seconds
        stop = self._evaluate_if_due(force=self.evaluate_first and self.progress.step == 0)
        while self.progress.step < self.max_steps and not stop and not self._time_is_up() and not self.has_stalled:
            stop = self._advance()
            stop = self._evaluate_if_due() or stop
            if self._is_due(self.engine.save_every):
                self._save()
        stop = stop or self._evaluate_if_due(force=True)
        self._save()
        if self.has_stalled:
            log.info("no better %s in %d evaluations: the run ends", self.best_metric.name, self.engine.patience)
        if stop:
            raise Stopped(
                f"stopped after step {self.progress.step}; a checkpoint is saved", fix="run the same command to go on"
            )
        return self.progress

    def _advance(self) -> bool:
        """One step from data to log line; True when some rank was asked to stop."""
        started = time.perf_counter()
        data = self.load_step(self.progress.position)
        data_seconds = time.perf_counter() - started
        before = self._fingerprint() if self.progress.step == 0 else None
        result = self.train_step(data)
        if before is not None and not self._skipped() and before == self._fingerprint():
            raise NumericsError(
                "the first update changed no weight", fix="raise optim.lr, or train more of the model than now"
            )
        progress = self.progress
        progress.step += 1
        progress.position += self.global_batch_size
        progress.n_tokens += result.n_tokens
        self.meter.add(result, time.perf_counter() - started, data_seconds)
        progress.elapsed_seconds = time.perf_counter() - self._clock_zero
        if progress.step % self.engine.log_every == 0 or progress.step == self.max_steps:
            row = {
                "optim/lr": self.optimizer.param_groups[0]["lr"],
                "optim/grad_norm": result.grad_norm,
                "data/first_sample_id": data.first_sample_id,
                "data/samples": progress.position,
                "data/tokens": progress.n_tokens,
                "perf/elapsed_seconds": progress.elapsed_seconds,
            }
            self.record(progress.step, self.meter.flush() | row)
        return result.stop

    @torch.no_grad()
    def _fingerprint(self) -> list[float]:
        """A number for each trained tensor that changes when its values do."""
        numbers: list[float] = torch.stack([p.sum(dtype=torch.float64) for p in self.parameters]).tolist()
        return numbers

    def _skipped(self) -> bool:
        """Whether the latest update may have been left out; under fp16 the loss scaler does not say."""
        return self.progress.skipped_in_a_row > 0 or self.engine.precision == "fp16"

    def train_step(self, data: StepData) -> StepResult:
        """Forward, backward, clip, update. Nothing is updated when the loss or the gradient is not finite."""
        step = self.progress.step + 1
        torch.manual_seed(self._seed_of(step))
        counts = self._counts(data.batches)
        totals = self._backward(data.batches, counts)
        max_norm = math.inf if self.engine.max_grad_norm is None else self.engine.max_grad_norm
        norm: Tensor = self.accelerator.clip_grad_norm_(self.parameters, max_norm)
        *sums, grad_norm = torch.stack([*totals.values(), norm.to(torch.float32)]).tolist()  # the step's one sync
        n_tokens, n_computed = (sum(getattr(b, name) for b in data.batches) for name in ("n_tokens", "n_computed"))
        *sums, tokens, computed, n_stop = self._sum_over_ranks([*sums, n_tokens, n_computed, self.stop_requested()])
        optim.set_lr(self.optimizer, self.schedule.factor(step, self.max_steps))
        named_sums = dict(zip(totals, sums, strict=True))
        if self._may_update(named_sums, grad_norm, data.first_sample_id):
            self.stepper.step()
        self.stepper.zero_grad(set_to_none=True)
        objective = named_sums.pop(OBJECTIVE) / self.accelerator.num_processes
        return StepResult(named_sums, counts, objective, int(tokens), int(computed), grad_norm, bool(n_stop))

    def _counts(self, batches: Sequence[Batch]) -> dict[str, int]:
        """Targets of each loss, over all micro-batches and ranks."""
        names = batches[0].counts
        totals = self._sum_over_ranks([sum(batch.counts[name] for batch in batches) for name in names])
        return {name: int(total) for name, total in zip(names, totals, strict=True)}

    def _backward(self, batches: Sequence[Batch], counts: dict[str, int]) -> dict[str, Tensor]:
        """Gradients of all micro-batches, summed; ranks exchange them with the last one only."""
        n_ranks = self.accelerator.num_processes
        totals: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            exchange = contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.wrapped)
            with exchange:
                losses, sums = self.wrapped(batch.to(self.device, non_blocking=True))
                parts = [loss * (n_ranks / max(counts[name], 1)) for name, loss in losses.items()]
                objective = sum(parts[1:], parts[0])
                self.accelerator.backward(objective)
            for name, value in {OBJECTIVE: objective, **sums}.items():
                value = value.detach().float()
                totals[name] = totals[name] + value if name in totals else value
        return totals

    def _may_update(self, sums: dict[str, float], grad_norm: float, first_sample_id: int) -> bool:
        """True when all is finite. Otherwise stop or skip, as ``engine.on_nonfinite`` says, the same on every rank."""
        # Under fp16 an overflowing gradient is routine: the loss scaler skips that update and lowers the scale.
        gradient_ok = math.isfinite(grad_norm) or self.engine.precision == "fp16"
        if gradient_ok and all(map(math.isfinite, sums.values())):
            self.progress.skipped_in_a_row = 0
            return True
        self.progress.skipped_in_a_row += 1
        skipping = self.engine.on_nonfinite == "skip"
        if skipping and self.progress.skipped_in_a_row <= self.engine.max_skipped_steps:
            return False
        bad = [n for n, p in self.module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        raise NumericsError(
            f"step {self.progress.step + 1}: loss {sums[OBJECTIVE]}, gradient norm {grad_norm}"
            + (f", {self.progress.skipped_in_a_row} such steps in a row" if skipping else ""),
            where=f"sample {first_sample_id} and the {self.global_batch_size - 1} after it"
            + (f"; first bad gradient: {bad[0].removeprefix('model.')}" if bad else ""),
            fix="lower optim.lr, lengthen schedule.warmup_steps, or set engine.on_nonfinite=skip",
        )

    def _evaluate_if_due(self, *, force: bool = False) -> bool:
        """Evaluate when this step's turn has come and it was not done yet; True when a stop cut it short."""
        progress = self.progress
        due = force or self._is_due(self.engine.eval_every)
        if not self.eval_sets or not due or progress.evaluated_step == progress.step:
            return False
        metrics: dict[str, float] = {}
        for name, rows in self.eval_sets.items():
            scored = evaluate(
                self.module,
                rows.batches(),
                n_bytes=rows.n_bytes,
                device=self.device,
                prefix=name,
                sum_over_ranks=self._sum_over_ranks,
                should_stop=self.stop_requested,
            )
            answered = {} if scored is None or rows.score is None else rows.score()
            if scored is None or answered is None:
                return True
            metrics |= scored | {f"{name}/{key}": value for key, value in answered.items()}
        progress.evaluated_step = progress.step
        progress.elapsed_seconds = time.perf_counter() - self._clock_zero
        if progress.step == 0:
            progress.first_losses = {name: metrics[f"{name}/loss"] for name in self.eval_sets}
        else:
            self._compare_with_best(metrics)
        self.record(progress.step, metrics | {"perf/elapsed_seconds": progress.elapsed_seconds})
        if self.accelerator.is_main_process:
            for callback in self.callbacks:
                callback.on_evaluation(progress.step, self.module.model, self.run)
        return False

    def _compare_with_best(self, metrics: Mapping[str, float]) -> None:
        """Note whether this evaluation is the best so far, by ``best_metric``."""
        progress, value = self.progress, metrics.get(self.best_metric.name)
        if value is None and "val" in self.eval_sets:
            known = sorted(name for name in metrics if name.startswith("val/"))
            raise ConfigError(
                f"no metric is called {self.best_metric.name}",
                where="engine.best_metric",
                fix=f"one of {', '.join(known)}",
            )
        if value is None:  # no validation rows, only text the model knew before
            return
        if self.best_metric.is_better(value, progress.best_value):
            progress.best_value, progress.best_step, progress.evaluations_since_best = value, progress.step, 0
        else:
            progress.evaluations_since_best += 1

    @property
    def has_stalled(self) -> bool:
        """Whether ``engine.patience`` evaluations have passed without a better one."""
        patience = self.engine.patience
        return patience is not None and self.progress.evaluations_since_best >= patience

    def _save(self) -> None:
        """Publish a checkpoint of this step, on rank 0; a failure there ends every rank."""
        progress = self.progress
        if progress.step == self.saved_step:
            return
        if not all(p.isfinite().all() for p in self.parameters):
            raise NumericsError(f"weights are not finite after step {progress.step}; nothing was saved")
        failure = None
        try:
            self.save(self, progress.best_step == progress.step)
        except LLMKitError as error:
            failure = error
        (n_failed,) = self._sum_over_ranks([failure is not None])
        if failure is not None:
            raise failure
        if n_failed:
            raise LLMKitError(f"another process could not save step {progress.step}")
        self.saved_step = progress.step

    def state(self) -> dict[str, Any]:
        """JSON-ready state beside weights and optimizer."""
        scaler = self.accelerator.scaler
        return {
            "progress": asdict(self.progress),
            "global_batch_size": self.global_batch_size,
            "world_size": self.accelerator.num_processes,
            "scaler": None if scaler is None else scaler.state_dict(),
            "meter": self.meter.state(),
        }

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return optim.state_tensors(self.optimizer, self.module.model.named_parameters())

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Continue from ``state`` and ``optimizer_tensors``; the weights are the command's to load."""
        self.progress = Progress(**state["progress"])
        self.saved_step = self.progress.step
        self.meter.restore(state["meter"])
        optim.load_state_tensors(self.optimizer, self.module.model.named_parameters(), tensors)
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.progress.step > 0 and self.progress.step % every == 0

    def _time_is_up(self) -> bool:
        """Rank 0's clock decides for all."""
        if self.engine.max_hours is None:
            return False
        late = self.accelerator.is_main_process and self.progress.elapsed_seconds >= self.engine.max_hours * 3600
        return bool(self._sum_over_ranks([late])[0])

    def _seed_of(self, step: int) -> int:
        """A 64-bit seed from (seed, step, rank)."""
        sequence = np.random.SeedSequence((self.seed, step, self.accelerator.process_index))
        return int(sequence.generate_state(1, np.uint64)[0])

    def _sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over all processes, in float64."""
        if self.accelerator.num_processes == 1:
            return [float(value) for value in values]
        local = torch.tensor(values, dtype=torch.float64, device=self.device)
        totals: list[float] = self.accelerator.reduce(local, reduction="sum").tolist()
        return totals
