"""What a person watches: a live view on a terminal, one line a logged step everywhere else and in ``train.log``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llmkit.interfaces import RunInfo
from llmkit.tracking.logs import LOGGER, PROGRESS, TerminalHandler
from llmkit.tracking.terminal import can_redraw, terminal

_FORMATS: dict[str, tuple[str, Callable[[float], str]]] = {
    "train/loss": ("loss", "{:.4f}".format),
    "optim/lr": ("lr", "{:.2e}".format),
    "optim/grad_norm": ("grad", "{:.2f}".format),
    "perf/tokens_per_second": ("tok/s", lambda rate: short_count(rate)),
    "perf/mfu": ("mfu", "{:.1%}".format),
    "perf/peak_memory_gib": ("mem", "{:.2f} GiB".format),
}
_RESULTS = ("val/", "val_old/", "task/")  # shown with their own names, and kept on the live view until the next ones
_COUNTS = ("/n_targets",)  # of the results: for the record, not for a glance


@dataclass(frozen=True)
class ConsoleTracker:
    """Shows the progress on stderr. ``live: false`` prints lines on a terminal too."""

    live: bool

    def start(self, run: RunInfo) -> None:
        view = self._view
        view.name, view.max_steps = run.name, run.max_steps
        if self.live and can_redraw():
            view.open()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        view = self._view
        view.update(step, metrics)
        parts = [f"step {step:,}/{view.max_steps:,}", *shown(metrics)]
        if view.eta is not None and "train/loss" in metrics:
            parts.append(f"eta {clock(view.eta)}")
        logging.getLogger(PROGRESS).info("  ".join(parts))

    def finish(self, status: str) -> None:
        self._view.close()

    @cached_property
    def _view(self) -> _View:
        return _View()


class _View:
    """The newest values, and the live region that shows them while it is open."""

    def __init__(self) -> None:
        self.name, self.max_steps, self.step = "", 0, 0
        self.training: dict[str, float] = {}
        self.results: dict[str, float] = {}
        self.results_step = 0
        self.eta: float | None = None
        self._first: tuple[int, float] | None = None  # step and elapsed seconds of the first row: what ETA counts from
        self._live: Live | None = None

    def open(self) -> None:
        # No refresh thread: the view changes when a row comes, and a terminal that hung up cannot fail behind our back.
        self._live = Live(self.render(), console=terminal(), auto_refresh=False, redirect_stdout=False)
        self._draw(self._live.start)
        _set_live(self._live is not None)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self.step = step
        results = {name: value for name, value in metrics.items() if name.startswith(_RESULTS)}
        if results:
            self.results, self.results_step = results, step
        else:
            self.training = dict(metrics)
        self._update_eta(step, metrics.get("perf/elapsed_seconds"))
        if self._live is not None:
            self._draw(partial(self._live.update, self.render(), refresh=True))

    def close(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            _set_live(False)
            with terminal().forgiving():
                live.stop()

    def render(self) -> Group:
        head = Table.grid(padding=(0, 2))
        eta = "" if self.eta is None else f"eta {clock(self.eta)}"
        bar = ProgressBar(total=max(self.max_steps, 1), completed=self.step, width=32)
        done = self.step / max(self.max_steps, 1)
        head.add_row(Text(self.name, "bold"), f"step {self.step:,}/{self.max_steps:,}", bar, f"{done:.0%}", eta)
        rows = [head]
        for values, note in ((self.training, ""), (self.results, f"at step {self.results_step:,}")):
            if values:
                line = Table.grid(padding=(0, 2))
                line.add_row(*shown(values), Text(note, "dim"))
                rows.append(line)
        return Group(*rows)

    def _update_eta(self, step: int, elapsed: float | None) -> None:
        if elapsed is None:
            return
        if self._first is None:
            self._first = (step, elapsed)
        first_step, first_elapsed = self._first
        self.eta = eta_seconds(step - first_step, elapsed - first_elapsed, self.max_steps - step)

    def _draw(self, draw: Callable[[], None]) -> None:
        """A view that cannot be drawn any more is given up; the log lines go on."""
        done = False
        with terminal().forgiving():
            draw()
            done = True
        if not done:
            self.close()


def shown(metrics: Mapping[str, float]) -> list[str]:
    """The values worth a glance, as text: ``loss 3.1416``. Results keep their name: ``val/bpb 1.5``."""
    known = [f"{label} {write(metrics[name])}" for name, (label, write) in _FORMATS.items() if name in metrics]
    results = [name for name in metrics if name.startswith(_RESULTS) and not name.endswith(_COUNTS)]
    return known + [f"{name} {metrics[name]:.4f}" for name in results]


def eta_seconds(n_steps: int, seconds: float, steps_left: int) -> float | None:
    """Seconds to the end at the mean pace of ``n_steps`` steps in ``seconds``; None before there is a pace."""
    if n_steps <= 0:
        return None
    return seconds / n_steps * max(steps_left, 0)


def clock(seconds: float) -> str:
    """``h:mm:ss``, with days in front when there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour}:{minute:02}:{second:02}"


def short_count(value: float) -> str:
    """Three significant digits: ``950``, ``12.3k``, ``1.23M``."""
    value = float(f"{value:.3g}")
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _set_live(live: bool) -> None:
    """Tell the log's terminal handlers whether a live view shows the progress."""
    for handler in logging.getLogger(LOGGER).handlers:
        if isinstance(handler, TerminalHandler):
            handler.live = live
