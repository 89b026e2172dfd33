"""Learning-rate schedules against closed forms and against transformers' own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.engine.schedule import WSD, Constant, Cosine, InverseSqrt, Linear

SCHEDULES = [
    Constant(7),
    InverseSqrt(7),
    Linear(7, min_lr_ratio=0.1),
    Cosine(7, min_lr_ratio=0.1),
    WSD(7, min_lr_ratio=0.1, decay_fraction=0.2),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_warmup_is_linear_and_peaks_at_its_last_step(schedule: Constant) -> None:
    assert [schedule.factor(step, 100) for step in range(1, 7)] == pytest.approx([s / 7 for s in range(1, 7)])
    assert schedule.factor(7, 100) == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES[2:], ids=lambda s: type(s).__name__)
def test_last_step_has_the_minimum(schedule: Linear) -> None:
    assert schedule.factor(100, 100) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("ours", "name", "options"),
    [
        (Cosine(10, min_lr_ratio=0.0), "get_cosine_schedule_with_warmup", {}),
        (Linear(10, min_lr_ratio=0.0), "get_linear_schedule_with_warmup", {}),
        (Constant(10), "get_constant_schedule_with_warmup", None),
    ],
)
def test_equals_transformers(ours: Cosine, name: str, options: dict[str, int] | None) -> None:
    """transformers numbers a step from 0; its factor at count s is ours for update s."""
    import transformers

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    more = {} if options is None else {"num_training_steps": 60}
    theirs = getattr(transformers, name)(optimizer, num_warmup_steps=10, **more).lr_lambdas[0]
    assert [ours.factor(s, 60) for s in range(1, 61)] == pytest.approx([theirs(s) for s in range(1, 61)])


def test_wsd_is_flat_then_falls_in_a_straight_line() -> None:
    schedule = WSD(10, min_lr_ratio=0.0, decay_fraction=0.2)
    assert {schedule.factor(step, 100) for step in range(10, 81)} == {1.0}
    assert [schedule.factor(step, 100) for step in (85, 90, 95, 100)] == pytest.approx([0.75, 0.5, 0.25, 0.0])


def test_inverse_sqrt_closed_form() -> None:
    assert InverseSqrt(16).factor(64, 1000) == pytest.approx(0.5)
    assert InverseSqrt(0).factor(4, 1000) == pytest.approx(0.5)


@settings(derandomize=True, max_examples=50)
@given(st.integers(0, 50), st.integers(1, 200), st.floats(0, 1), st.floats(0.01, 1), st.data())
def test_factors_stay_in_range(warmup: int, max_steps: int, ratio: float, decay: float, data: st.DataObject) -> None:
    step = data.draw(st.integers(1, max_steps))
    for schedule in (Linear(warmup, ratio), Cosine(warmup, ratio), WSD(warmup, ratio, decay)):
        factor = schedule.factor(step, max_steps)
        assert math.isfinite(factor)
        assert -1e-12 <= factor <= 1 + 1e-12


def test_problems_name_the_field() -> None:
    assert [field for field, _ in WSD(-1, min_lr_ratio=2.0, decay_fraction=0.0).problems()] == [
        "warmup_steps",
        "min_lr_ratio",
        "decay_fraction",
    ]
