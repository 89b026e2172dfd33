"""``loss_curve.svg``: the losses of a run as a picture, drawn from ``metrics.jsonl`` alone.

Equal rows give equal bytes: no date, no random id, numbers with fixed digits.
"""

from __future__ import annotations

import html
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.errors import DataError
from llmkit.tracking.jsonl import read_metrics

logger = logging.getLogger(__name__)

Point = tuple[float, float]  # step, value

WIDTH, PANEL_HEIGHT, TITLE_HEIGHT = 760, 300, 44
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 12, 44  # margins of a panel around its plot
MAX_POINTS = 600  # more would not be seen at this width
STYLE = """
  text { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #475569 }
  .title { font-size: 15px; font-weight: 600; fill: #0f172a }
  .grid { stroke: #e2e8f0; stroke-width: 1 }
  .axis { stroke: #94a3b8; stroke-width: 1 }
  .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
  .faint { opacity: 0.25; stroke-width: 1 }
""".strip("\n")


@dataclass(frozen=True)
class Series:
    """One line of a panel."""

    label: str
    colour: str
    points: Sequence[Point]
    faint: bool = False  # the raw values behind a smoothed line: no legend
    marks: bool = False  # a dot at each point: there are few


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    y_label: str
    series: Sequence[Series]
    x_label: str = "step"


def write_curve(metrics_path: Path, svg_path: Path) -> None:
    """Draw train and validation loss, and bits per byte where there is some. A failure is a warning."""
    try:
        rows = read_metrics(metrics_path) if metrics_path.exists() else []
        svg_path.write_text(curve_svg(rows, title=metrics_path.parent.name), encoding="utf-8")
    except (OSError, DataError) as error:
        logger.warning("no loss curve: %s", error)


def curve_svg(rows: Sequence[dict[str, Any]], title: str) -> str:
    """The picture of a run as SVG text."""
    train, val, bpb = (points_of(rows, name) for name in ("train/loss", "val/loss", "val/bpb"))
    loss = Panel(
        "loss (nats per token)",
        [
            Series("train", "#2563eb", thin(train), faint=True),
            Series("train, smoothed", "#2563eb", thin(smooth(train))),
            Series("validation", "#ea580c", thin(val), marks=True),
        ],
    )
    panels = [loss]
    if bpb:
        panels.append(Panel("bits per byte", [Series("validation", "#059669", thin(bpb), marks=True)]))
    return picture(panels, title)


def picture(panels: Sequence[Panel], title: str) -> str:
    """Panels below one another as SVG text; those with the same label of x have the same scale of it."""
    height = TITLE_HEIGHT + PANEL_HEIGHT * len(panels)
    ends = {
        label: max((x for p in panels if p.x_label == label for s in p.series for x, _ in s.points), default=1.0)
        for label in {panel.x_label for panel in panels}
    }
    body = "\n".join(_panel(p, TITLE_HEIGHT + PANEL_HEIGHT * i, ends[p.x_label]) for i, p in enumerate(panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">\n'
        f"<style>\n{STYLE}\n</style>\n"
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n'
        f'<text class="title" x="{LEFT}" y="28">{html.escape(title)}</text>\n{body}\n</svg>\n'
    )


def points_of(rows: Sequence[dict[str, Any]], name: str) -> list[Point]:
    """The finite values of one metric, by step."""
    found = [(row.get("step"), row.get(name)) for row in rows]
    numbers = [(float(s), float(v)) for s, v in found if isinstance(s, int | float) and isinstance(v, int | float)]
    return [point for point in numbers if math.isfinite(point[1])]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Running mean over about a thirtieth of the curve to either side, so that the trend is seen and the ends stay."""
    reach = len(points) // 60
    totals = [0.0]
    for _, value in points:
        totals.append(totals[-1] + value)
    smoothed = []
    for i, (step, _) in enumerate(points):
        half = min(reach, i, len(points) - 1 - i)  # a window that is cut on one side only would bend the ends
        smoothed.append((step, (totals[i + half + 1] - totals[i - half]) / (2 * half + 1)))
    return smoothed


def thin(points: Sequence[Point]) -> Sequence[Point]:
    """At most about ``MAX_POINTS`` of them, evenly, both ends among them."""
    if len(points) <= MAX_POINTS:
        return points
    last = len(points) - 1
    return [points[round(i * last / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def ticks(low: float, high: float, about: int, smallest: float = 0.0) -> list[float]:
    """About ``about`` round numbers in [low, high]: 1, 2 or 5 times a power of ten apart, at least ``smallest``."""
    rough = max((high - low) / about, smallest)
    power = 10.0 ** math.floor(math.log10(rough))
    spacing = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / spacing - 1e-9), math.floor(high / spacing + 1e-9)
    return [i * spacing for i in range(first, last + 1)]


def value_range(values: Sequence[float]) -> tuple[float, float]:
    """Limits of the y axis: all values and a margin."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


@dataclass(frozen=True)
class _Frame:
    """Where data lies on the page."""

    top: float
    bottom: float
    last_step: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / self.last_step

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * (value - self.low) / (self.high - self.low)


def _panel(panel: Panel, offset: int, last_step: float) -> str:
    values = [value for series in panel.series for _, value in series.points]
    low, high = value_range(values)
    frame = _Frame(offset + TOP, offset + PANEL_HEIGHT - BOTTOM, max(last_step, 1.0), low, high)
    drawn = [_series(series, frame) for series in panel.series if series.points]
    if not drawn:
        drawn = [_text("no values yet", (LEFT + WIDTH - RIGHT) / 2, (frame.top + frame.bottom) / 2, "middle")]
    return "\n".join([*_axes(panel, frame), *drawn, *_legend(panel, frame)])


def _axes(panel: Panel, frame: _Frame) -> list[str]:
    parts = []
    values = ticks(frame.low, frame.high, 6)
    digits = max((len(f"{value:.6g}".partition(".")[2]) for value in values), default=0)
    for value in values:
        y = frame.y(value)
        parts.append(_line("grid", LEFT, y, WIDTH - RIGHT, y))
        parts.append(_text(f"{value:.{digits}f}", LEFT - 8, y + 4, "end"))
    for step in ticks(0.0, frame.last_step, 8, smallest=1.0):
        parts.append(_line("axis", frame.x(step), frame.bottom, frame.x(step), frame.bottom + 4))
        parts.append(_text(f"{step:,.6g}", frame.x(step), frame.bottom + 18, "middle"))
    parts.append(_line("axis", LEFT, frame.bottom, WIDTH - RIGHT, frame.bottom))
    parts.append(_text(panel.x_label, (LEFT + WIDTH - RIGHT) / 2, frame.bottom + 36, "middle"))
    middle = (frame.top + frame.bottom) / 2
    turned = f'transform="rotate(-90 16 {middle:.1f})"'
    parts.append(f'<text x="16" y="{middle:.1f}" text-anchor="middle" {turned}>{panel.y_label}</text>')
    return parts


def _series(series: Series, frame: _Frame) -> str:
    places = [(frame.x(step), frame.y(value)) for step, value in series.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    style = "line faint" if series.faint else "line"
    drawn = f'<polyline class="{style}" stroke="{series.colour}" points="{path}"/>'
    if (series.marks and len(places) <= 60) or len(places) == 1:
        drawn += "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{series.colour}"/>' for x, y in places)
    return drawn


def _legend(panel: Panel, frame: _Frame) -> list[str]:
    """Names and last values, at the top right where a falling curve leaves room."""
    parts = []
    y = frame.top + 14
    for series in panel.series:
        if series.points and not series.faint:
            place = f'x="{WIDTH - RIGHT - 190}" y="{y - 6:.1f}" width="18" height="4" rx="2"'
            parts.append(f'<rect {place} fill="{series.colour}"/>')
            parts.append(_text(f"{series.label} {series.points[-1][1]:.4f}", WIDTH - RIGHT - 164, y, "start"))
            y += 18
    return parts


def _line(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(text: str, x: float, y: float, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
