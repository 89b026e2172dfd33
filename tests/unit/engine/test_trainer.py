"""The loop itself, on a model small enough to follow by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmkit.engine.best_metric import BestMetric
from llmkit.engine.device import make_accelerator
from llmkit.engine.evaluate import EvalSet, TrainModule, evaluate
from llmkit.engine.launch import refuse_solo_runs
from llmkit.engine.meter import Meter
from llmkit.engine.optim import AdamW
from llmkit.engine.schedule import Linear
from llmkit.engine.trainer import Trainer
from llmkit.errors import DistributedError, NumericsError, Stopped
from llmkit.interfaces import IGNORE_INDEX, NO_DOCUMENT, Batch, LossSum, RunInfo, Tokens
from llmkit.settings import EngineConfig
from tests.unit.engine.settings import ENGINE

VOCAB, SEQ_LEN = 13, 6


class Bigram(nn.Module):
    """Predicts the next id from the current one."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(VOCAB, VOCAB)
        self.dropout = nn.Dropout(dropout)

    def hidden_states(self, batch: Batch) -> Tensor:
        return self.dropout(self.table(batch.input_ids))


class PlainLoss:
    scores_all_text = True
    sum_names = ("nll",)

    def metrics(self, sums: dict[str, float], counts: dict[str, int]) -> dict[str, float]:
        return {"loss": sums["nll"] / max(counts["token"], 1)}

    def loss(self, model: Bigram, batch: Batch) -> LossSum:
        logits = model.hidden_states(batch).flatten(0, 1)
        nll = nn.functional.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        return LossSum({"token": nll}, {"nll": nll})


def make_batch(sample_ids: Sequence[int]) -> Batch:
    """Rows that depend on the sample id alone, with uneven numbers of targets."""
    rows, labels = [], []
    for sample in sample_ids:
        generator = torch.Generator().manual_seed(sample)
        ids = torch.randint(VOCAB, (SEQ_LEN + 1,), generator=generator)
        n_targets = 1 + sample % SEQ_LEN
        rows.append(ids[:-1])
        labels.append(torch.where(torch.arange(SEQ_LEN) < n_targets, ids[1:], IGNORE_INDEX))
    stacked = torch.stack(labels)
    positions = torch.arange(SEQ_LEN).expand(len(rows), SEQ_LEN)
    return Batch(torch.stack(rows), stacked, positions, None, int((stacked != IGNORE_INDEX).sum()))


@dataclass
class StepRows:
    batches: list[Batch]
    first_sample_id: int


def loader(engine: EngineConfig) -> Any:
    def load(position: int) -> StepRows:
        size = engine.micro_batch_size
        batches = [
            make_batch(range(position + m * size, position + (m + 1) * size)) for m in range(engine.grad_accum_steps)
        ]
        return StepRows(batches, position)

    return load


def val_batches() -> Iterator[Batch]:
    for first in range(1000, 1010, 2):
        yield make_batch([first, first + 1])


class Recorder:
    """Collects log rows and checkpoints in memory; raises a stop at a chosen moment."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.saved: dict[int, tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]] = {}
        self.best: list[int] = []
        self.stop_now = False

    def record(self, step: int, row: dict[str, float]) -> None:
        self.rows.append((step, row))

    def save(self, trainer: Trainer, best: bool) -> None:
        weights = {k: v.clone() for k, v in trainer.module.model.state_dict().items()}
        tensors = {k: v.clone() for k, v in trainer.optimizer_tensors().items()}
        self.saved[trainer.progress.step] = (trainer.state(), tensors, weights)
        if best:
            self.best.append(trainer.progress.step)

    def curve(self) -> list[tuple[int, dict[str, float]]]:
        """All that must repeat exactly: everything but timings."""
        return [(step, {k: v for k, v in row.items() if not k.startswith("perf/")}) for step, row in self.rows]


def make_trainer(engine: EngineConfig, recorder: Recorder, model: nn.Module, **changes: Any) -> Trainer:
    options: dict[str, Any] = dict(
        accelerator=make_accelerator(engine),
        module=TrainModule(model, PlainLoss()),
        optimizer=AdamW(lr=0.05, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, layer_decay=1.0).build(model),
        schedule=Linear(2, min_lr_ratio=0.1),
        engine=engine,
        seed=3,
        global_batch_size=engine.micro_batch_size * engine.grad_accum_steps,
        load_step=loader(engine),
        eval_sets={"val": EvalSet(val_batches, 100)},
        best_metric=BestMetric.of(engine.best_metric),
        evaluate_first=False,
        record=recorder.record,
        save=recorder.save,
        stop_requested=lambda: recorder.stop_now,
        callbacks=[],
        run=RunInfo("test", Path(), "pretrain", {}, engine.max_steps or 10, {}),
        meter=Meter(PlainLoss().metrics, 1.0, None, 1, "cpu"),
    )
    return Trainer(**(options | changes))


def test_equals_a_plain_torch_loop() -> None:
    """Same data, same optimizer, one batch a step: losses, norms and weights agree."""
    engine = replace(ENGINE, micro_batch_size=4, grad_accum_steps=2)
    recorder, model = Recorder(), Bigram()
    make_trainer(engine, recorder, model).fit()

    twin, schedule = Bigram(), Linear(2, min_lr_ratio=0.1)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, 11):
        batch = make_batch(range((step - 1) * 8, step * 8))
        loss = nn.functional.cross_entropy(twin.table(batch.input_ids).flatten(0, 1), batch.labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * schedule.factor(step, 10)
        optimizer.step()
        row = dict(recorder.rows)[step] if step < 10 else recorder.rows[9][1]
        assert row["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert row["optim/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert row["train/n_targets"] == batch.n_targets
    torch.testing.assert_close(model.table.weight, twin.table.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "accum"), [(1, 8), (2, 4), (8, 1)])
def test_micro_batches_do_not_change_the_gradient(size: int, accum: int) -> None:
    """Uneven target counts: k micro-batches of b give the gradient of one batch of k * b, to 1e-6 relative."""
    batch = make_batch(range(8))
    reference = Bigram()
    logits = reference.table(batch.input_ids).flatten(0, 1)
    nn.functional.cross_entropy(logits.double(), batch.labels.flatten()).backward()

    engine = replace(ENGINE, micro_batch_size=size, grad_accum_steps=accum)
    trainer = make_trainer(engine, Recorder(), Bigram())
    data = trainer.load_step(0)
    trainer._backward(data.batches, trainer._counts(data.batches))
    ours, theirs = trainer.module.model.table.weight.grad, reference.table.weight.grad
    assert (ours - theirs).norm() / theirs.norm() < 1e-6


def test_evaluation_does_not_depend_on_the_batch_size() -> None:
    losses = []
    for size in (1, 2, 3, 5, 10):
        ids = list(range(1000, 1010))
        batches = [make_batch(ids[i : i + size]) for i in range(0, 10, size)]
        metrics = evaluate(TrainModule(Bigram(), PlainLoss()), batches, n_bytes=100, device=torch.device("cpu"))
        assert metrics is not None
        losses.append(metrics["val/loss"])
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-6)
    batch = make_batch(range(1000, 1010))
    expected = nn.functional.cross_entropy(Bigram().table(batch.input_ids).flatten(0, 1), batch.labels.flatten())
    assert losses[0] == pytest.approx(expected.item(), rel=1e-6)
    assert metrics["val/bpb"] == pytest.approx(losses[0] * batch.n_targets / math.log(2) / 100)
    assert metrics["val/ppl"] == pytest.approx(math.exp(losses[0]))


@pytest.mark.parametrize("log_every", [1, 5])
@pytest.mark.parametrize("moments", [(3,), (1, 2, 3), (4, 8)])
def test_resumed_curve_is_bitwise_equal(moments: tuple[int, ...], log_every: int) -> None:
    """Dropout on, an evaluation every 4 steps, stops at the given steps, also between two lines of the log."""
    engine = replace(ENGINE, micro_batch_size=3, eval_every=4, save_every=3, log_every=log_every)
    unbroken = Recorder()
    whole = Bigram(dropout=0.3)
    make_trainer(engine, unbroken, whole).fit()

    pieces = Recorder()
    state = None
    for moment in (*moments, None):
        model = Bigram(dropout=0.3)
        trainer = make_trainer(engine, pieces, model)
        if state is not None:
            model.load_state_dict(state[2])
            trainer.restore(state[0], state[1])
        if moment is None:
            pieces.stop_now = False
            trainer.fit()
        else:
            trainer.stop_requested = lambda trainer=trainer, moment=moment: trainer.progress.step + 1 >= moment
            with pytest.raises(Stopped):
                trainer.fit()
            state = pieces.saved[moment]
    assert pieces.curve() == unbroken.curve()
    assert torch.equal(model.table.weight, whole.table.weight)


def test_stop_saves_first_and_asks_to_run_again() -> None:
    recorder = Recorder()
    recorder.stop_now = True
    with pytest.raises(Stopped) as caught:
        make_trainer(ENGINE, recorder, Bigram()).fit()
    assert caught.value.exit_code == 75
    assert list(recorder.saved) == [1]


def test_finished_run_has_nothing_to_do() -> None:
    recorder, model = Recorder(), Bigram()
    make_trainer(ENGINE, recorder, model).fit()
    state, tensors, _ = recorder.saved[10]
    again = Recorder()
    trainer = make_trainer(ENGINE, again, model)
    trainer.restore(state, tensors)
    trainer.fit()
    assert (again.rows, again.saved) == ([], {})


class Poisoned(PlainLoss):
    """Infinite loss whenever the batch holds sample ``bad``."""

    def __init__(self, bad: int) -> None:
        self.bad = make_batch([bad]).input_ids[0]

    def loss(self, model: Bigram, batch: Batch) -> LossSum:
        losses, sums = super().loss(model, batch)
        if (batch.input_ids == self.bad).all(dim=1).any():
            losses["token"] = losses["token"] * math.inf
        return LossSum(losses, sums)


def test_nonfinite_loss_stops_before_the_update() -> None:
    recorder, model = Recorder(), Bigram()
    trainer = make_trainer(ENGINE, recorder, model, module=TrainModule(model, Poisoned(bad=5)))
    with pytest.raises(NumericsError, match="step 3") as caught:
        trainer.fit()
    assert "sample 4" in caught.value.where
    assert caught.value.exit_code == 5
    assert torch.isfinite(model.table.weight).all()
    assert [step for step, _ in recorder.rows] == [1, 2]


def test_nonfinite_loss_is_skipped_by_policy_and_bounded() -> None:
    engine = replace(ENGINE, on_nonfinite="skip", max_skipped_steps=1)
    recorder, model = Recorder(), Bigram()
    before_and_after = []
    trainer = make_trainer(engine, recorder, model, module=TrainModule(model, Poisoned(bad=5)))
    step = trainer.train_step

    def watched(data: Any) -> Any:
        before = model.table.weight.detach().clone()
        result = step(data)
        before_and_after.append(torch.equal(before, model.table.weight))
        return result

    trainer.train_step = watched  # type: ignore[method-assign]
    trainer.fit()
    assert before_and_after == [False, False, True] + [False] * 7

    class AlwaysBad(PlainLoss):
        def loss(self, model: Bigram, batch: Batch) -> LossSum:
            losses, sums = super().loss(model, batch)
            return LossSum({"token": losses["token"] * math.nan}, sums)

    with pytest.raises(NumericsError, match="2 such steps in a row"):
        make_trainer(engine, Recorder(), model, module=TrainModule(model, AlwaysBad())).fit()


def test_batch_without_targets_gives_zero_loss() -> None:
    empty = make_batch([0])
    empty = Batch(empty.input_ids, torch.full_like(empty.labels, IGNORE_INDEX), empty.position_ids, None, 0)
    recorder = Recorder()
    trainer = make_trainer(
        replace(ENGINE, max_steps=1), recorder, Bigram(), load_step=lambda position: StepRows([empty], 0)
    )
    trainer.fit()
    assert recorder.rows[0][1]["train/loss"] == 0.0


def test_best_is_the_lowest_validation_loss_among_saved() -> None:
    recorder = Recorder()
    make_trainer(replace(ENGINE, eval_every=2, save_every=2), recorder, Bigram()).fit()
    losses = {step: row["val/loss"] for step, row in recorder.rows if "val/loss" in row}
    running = [step for step in losses if losses[step] == min(v for s, v in losses.items() if s <= step)]
    assert recorder.best == running


def test_time_limit_ends_the_run_with_a_checkpoint() -> None:
    recorder = Recorder()
    progress = make_trainer(replace(ENGINE, max_hours=1e-9), recorder, Bigram()).fit()
    assert progress.step == 1
    assert list(recorder.saved) == [1]


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_silent_solo_runs_are_refused(name: str) -> None:
    with pytest.raises(DistributedError, match=name):
        refuse_solo_runs({name: "2"})
    refuse_solo_runs({name: "1"})
    refuse_solo_runs({name: "2", "WORLD_SIZE": "2"})


class TwoLosses(PlainLoss):
    """Every target's loss, and that of each row's first token, which is another kind of target."""

    def loss(self, model: Bigram, batch: Batch) -> LossSum:
        losses, sums = super().loss(model, batch)
        first = nn.functional.cross_entropy(model.table(batch.input_ids[:, 0]), batch.labels[:, 0], reduction="sum")
        return LossSum(losses | {"pair": 0.5 * first}, sums)


@pytest.mark.parametrize(("size", "accum"), [(8, 1), (2, 4)])
def test_each_loss_is_divided_by_its_own_count(size: int, accum: int) -> None:
    """A mean over targets and a mean over rows, though micro-batches have as many rows but not as many targets."""
    batch, reference = make_batch(range(8)), Bigram()
    logits = reference.table(batch.input_ids).double()
    per_target = nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    per_row = nn.functional.cross_entropy(logits[:, 0], batch.labels[:, 0])
    (per_target + 0.5 * per_row).backward()

    engine = replace(ENGINE, micro_batch_size=size, grad_accum_steps=accum)
    trainer = make_trainer(engine, Recorder(), Bigram(), module=TrainModule(Bigram(), TwoLosses()))
    data = trainer.load_step(0)
    batches = [replace(part, n_pairs=part.input_ids.shape[0]) for part in data.batches]
    counts = trainer._counts(batches)
    assert counts == {"token": batch.n_targets, "pair": 8, "example": 0}
    totals = trainer._backward(batches, counts)
    ours, theirs = trainer.module.model.table.weight.grad, reference.table.weight.grad
    assert (ours - theirs).norm() / theirs.norm() < 1e-6
    assert float(totals["objective"]) == pytest.approx((per_target + 0.5 * per_row).item(), rel=1e-6)


def test_the_share_of_real_tokens_counts_padding() -> None:
    """Half of every row is padding, and the source of an encoder-decoder counts as well."""
    documents = torch.tensor([[0, 0, 0, NO_DOCUMENT, NO_DOCUMENT, NO_DOCUMENT]] * 2)
    ids = torch.zeros(2, SEQ_LEN, dtype=torch.int64)
    half = Batch(ids, ids, ids, documents, n_targets=12)
    assert (half.n_tokens, half.n_computed) == (6, 12)
    both = replace(half, source=Tokens(ids, ids, None))
    assert (both.n_tokens, both.n_computed) == (18, 24)
    recorder = Recorder()
    data = StepRows([half, both], 0)
    make_trainer(replace(ENGINE, max_steps=1), recorder, Bigram(), load_step=lambda position: data).fit()
    assert recorder.rows[0][1]["perf/real_token_fraction"] == pytest.approx(24 / 36)
