"""Which evaluation is the best, when the run ends for want of a better one, and a first update that changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from llmkit.engine.evaluate import EvalSet
from llmkit.engine.trainer import Trainer
from llmkit.errors import ConfigError, NumericsError, Stopped
from tests.unit.engine.settings import ENGINE
from tests.unit.engine.test_trainer import Bigram, Recorder, make_trainer, val_batches


def scored(values: Sequence[float | None], **engine: Any) -> tuple[Trainer, Recorder]:
    """A trainer that evaluates and saves after every step, with these scores; None is a stop in the middle."""
    left: Iterator[float | None] = iter(values)

    def score() -> dict[str, float] | None:
        value = next(left)
        return None if value is None else {"f1": value}

    recorder = Recorder()
    settings = replace(ENGINE, eval_every=1, save_every=1, **{"best_metric": "f1", **engine})
    sets = {"val": EvalSet(val_batches, 100, score), "other": EvalSet(val_batches, 100)}
    return make_trainer(settings, recorder, Bigram(), eval_sets=sets), recorder


def test_scores_stand_beside_the_loss_and_pick_the_best() -> None:
    values = [1.0, 3.0, 2.0, 3.0, float("nan"), 5.0, 4.0, 4.0, 4.0, 4.0]
    trainer, recorder = scored(values)
    progress = trainer.fit()
    assert recorder.best == [1, 2, 6]
    assert (progress.best_step, progress.best_value, progress.evaluations_since_best) == (6, 5.0, 4)
    rows = [row for _, row in recorder.rows if "val/f1" in row]
    assert str([row["val/f1"] for row in rows]) == str(values)
    assert all("other/loss" in row and "other/f1" not in row for row in rows)


@pytest.mark.parametrize(
    ("patience", "values", "last"),
    [
        (1, [1.0, 1.0], 2),
        (2, [1.0, 2.0, 1.0, 3.0, 3.0, 2.0], 6),
        (3, [3.0, 2.0, 2.0, 2.0], 4),
        (2, [float("nan"), float("nan")], 2),
        (None, [1.0] * 10, 10),
        (20, [1.0] * 10, 10),
    ],
)
def test_patience_counts_evaluations_without_a_better_one(
    patience: int | None, values: list[float], last: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The last step is evaluated and saved once, and the counter survives in the checkpoint."""
    trainer, recorder = scored(values, patience=patience)
    with caplog.at_level("INFO", "llmkit"):
        assert trainer.fit().step == last
    assert max(recorder.saved) == last
    assert ("no better val/f1" in caplog.text) == (last < 10) == trainer.has_stalled
    state, tensors, _ = recorder.saved[last]
    again, after = scored([], patience=patience)
    again.restore(state, tensors)
    again.fit()
    assert (after.rows, after.saved) == ([], {})


def test_more_patience_lets_a_run_go_on() -> None:
    trainer, recorder = scored([2.0, 1.0, 1.0], patience=2)
    trainer.fit()
    again, _ = scored([1.0, 1.0], patience=4)
    again.restore(*recorder.saved[3][:2])
    assert again.fit().step == 5


def test_answers_that_a_stop_cut_short_are_given_again() -> None:
    trainer, recorder = scored([1.0, None])
    with pytest.raises(Stopped):
        trainer.fit()
    assert [step for step, row in recorder.rows if "val/f1" in row] == [1]
    assert max(recorder.saved) == 2
    again, after = scored([4.0] * 9)
    again.restore(*recorder.saved[2][:2])
    again.fit()
    assert [step for step, row in after.rows if "val/f1" in row] == [2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_an_unknown_metric_names_those_there_are() -> None:
    trainer, _ = scored([1.0], best_metric="bleu")
    with pytest.raises(ConfigError) as caught:
        trainer.fit()
    assert caught.value.where == "engine.best_metric"
    assert "val/f1" in caught.value.fix
    assert "val/loss" in caught.value.fix
    assert "other" not in caught.value.fix


# -- the first update -----------------------------------------------------------------------------------------------


class Fixed(Bigram):
    """A model whose loss does not depend on the weights that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))
        self.table.weight.requires_grad_(False)

    def hidden_states(self, batch: Any) -> torch.Tensor:
        return super().hidden_states(batch) + 0 * self.unused.sum()


def test_a_first_update_that_changes_nothing_is_an_error() -> None:
    """Weight decay would change the weight; without it nothing moves."""
    model, recorder = Fixed(), Recorder()
    optimizer = torch.optim.SGD([model.unused], lr=0.1)
    with pytest.raises(NumericsError, match="the first update changed no weight"):
        make_trainer(ENGINE, recorder, model, optimizer=optimizer).fit()
    assert recorder.saved == {}


@pytest.mark.parametrize("frozen", [True, False])
def test_one_weight_that_moves_is_enough(frozen: bool) -> None:
    model = Bigram()
    model.still = nn.Parameter(torch.ones(3), requires_grad=not frozen)
    assert make_trainer(ENGINE, Recorder(), model).fit().step == 10


def test_a_resumed_run_and_a_skipped_update_are_not_asked() -> None:
    """Only the first step of a run is compared, and not when its update was left out."""
    model, recorder = Bigram(), Recorder()
    engine = replace(ENGINE, max_steps=2)
    make_trainer(engine, recorder, model).fit()
    again = make_trainer(replace(ENGINE, max_steps=3), Recorder(), model)
    again.restore(*recorder.saved[2][:2])
    again._fingerprint = lambda: [0.0]  # type: ignore[method-assign]
    assert again.fit().step == 3
    with torch.no_grad():
        model.table.weight.fill_(float("inf"))
    bad = make_trainer(replace(ENGINE, on_nonfinite="skip", max_steps=1), Recorder(), model)
    bad._save = lambda: None  # type: ignore[method-assign]
    assert bad.fit().skipped_in_a_row == 1
