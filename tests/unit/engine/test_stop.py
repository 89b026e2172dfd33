from __future__ import annotations

import contextlib
import os
import signal

import pytest

from llmkit.engine.stop import SIGNALS, StopSignal, leave_on_signal
from llmkit.errors import Stopped
from tests.faults.tiny import in_child


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_nothing_else_happens(number: signal.Signals) -> None:
    earlier = [signal.getsignal(each) for each in SIGNALS]
    with StopSignal() as stop:
        assert not stop.requested
        assert stop.name is None
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.name == number.name
    assert [signal.getsignal(each) for each in SIGNALS] == earlier


def test_the_first_name_is_kept_and_repeated_terms_are_patient() -> None:
    with StopSignal() as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.name == "SIGUSR1"


def test_handlers_come_back_after_an_error() -> None:
    earlier = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), StopSignal():
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) is earlier


def test_a_second_interrupt_leaves_at_once() -> None:
    def work() -> None:
        with StopSignal():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(1)

    assert in_child(work) == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_before_the_first_step_a_signal_ends_the_start(number: int, code: int) -> None:
    with StopSignal() as stop:
        with pytest.raises(Stopped, match="before the first step") as caught, leave_on_signal():
            os.kill(os.getpid(), number)
        assert caught.value.exit_code == code
        os.kill(os.getpid(), number)  # the outer handler is back
        assert stop.requested


def test_a_signal_that_the_start_took_for_a_failure_is_not_lost() -> None:
    with pytest.raises(Stopped, match="SIGTERM"), leave_on_signal(), contextlib.suppress(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
