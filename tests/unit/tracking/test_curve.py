"""The loss curve: well-formed, the same for the same rows, and true to the numbers."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.tracking.curve import curve_svg, points_of, smooth, thin, ticks, write_curve
from llmkit.tracking.jsonl import MetricsFile

SVG = "{http://www.w3.org/2000/svg}"


def rows(n: int) -> list[dict[str, float]]:
    train = [{"step": s, "train/loss": 2 + 5 / s} for s in range(1, n + 1)]
    return [*train, {"step": n, "val/loss": 2.5, "val/bpb": 1.1}]


def test_equal_rows_give_equal_bytes_and_a_well_formed_picture(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "mine <&>" / "metrics.jsonl")
    for row in rows(1500):
        file.append(row)
    pictures = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for picture in pictures:
        write_curve(file.path, picture)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    root = ElementTree.fromstring(pictures[0].read_text())
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert {"mine <&>", "step", "bits per byte", "loss (nats per token)", "validation 1.1000"} <= set(words)
    assert len(root.findall(f"{SVG}polyline")) == 4  # train raw and smoothed, val/loss, val/bpb
    assert len(pictures[0].read_bytes()) < 60_000


@pytest.mark.parametrize("content", [None, b"", b'{"step": 1}\n', b'{"step": 1, "train/loss": "NaN"}\n', b'{"torn'])
def test_nothing_to_draw_is_still_a_picture(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    write_curve(path, tmp_path / "curve.svg")
    assert "no values yet" in (tmp_path / "curve.svg").read_text()


def test_a_broken_metrics_file_is_a_warning_and_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"not json\n{}\n")
    write_curve(path, tmp_path / "curve.svg")
    assert not (tmp_path / "curve.svg").exists()


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e12, 1e12)), max_size=30))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_any_finite_values_stay_inside_the_picture(points: list[tuple[int, float]]) -> None:
    picture = curve_svg([{"step": s, "train/loss": v} for s, v in sorted(points)], "x")
    root = ElementTree.fromstring(picture)
    height = float(root.attrib["height"])
    for line in root.iter(f"{SVG}polyline"):
        for place in line.attrib["points"].split():
            x, y = map(float, place.split(","))
            assert 0 <= x <= 760
            assert 0 <= y <= height


def test_a_point_lies_where_the_axes_say() -> None:
    """Values 1 and 3 at steps 0 and 10: the plot is 232 to 760-24 wide, its margin 6 % of the range."""
    root = ElementTree.fromstring(curve_svg([{"step": 0, "train/loss": 1.0}, {"step": 10, "train/loss": 3.0}], "x"))
    line = next(root.iter(f"{SVG}polyline"))
    top, bottom = 44 + 12, 44 + 300 - 44
    low, high = 1 - 0.12, 3 + 0.12
    expected = [
        (64.0, bottom - (bottom - top) * (1 - low) / (high - low)),
        (736.0, bottom - (bottom - top) * (3 - low) / (high - low)),
    ]
    got = [tuple(map(float, place.split(","))) for place in line.attrib["points"].split()]
    assert got == [pytest.approx(place, abs=0.06) for place in expected]


def test_points_skip_what_is_not_a_finite_number() -> None:
    found = points_of(
        [{"step": 1, "a": 2}, {"step": 2, "a": math.nan}, {"step": 3}, {"a": 1.0}, {"step": 4, "a": "x"}], "a"
    )
    assert found == [(1.0, 2.0)]


def test_smoothing_keeps_lines_ends_and_the_mean_of_its_window() -> None:
    straight = [(float(i), 3.0 * i + 1) for i in range(240)]
    assert smooth(straight) == [(step, pytest.approx(value)) for step, value in straight]
    spike = [(float(i), 9.0 if i == 120 else 0.0) for i in range(240)]
    assert smooth(spike)[120] == (120.0, pytest.approx(1.0))  # 4 to either side: nine values
    assert smooth([]) == []


def test_thinning_keeps_both_ends() -> None:
    points = [(float(i), float(i)) for i in range(12_345)]
    thinned = thin(points)
    assert len(thinned) == 600
    assert (thinned[0], thinned[-1]) == (points[0], points[-1])
    assert thin(points[:600]) == points[:600]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 10.0, [0, 2, 4, 6, 8, 10]),
        (1.13, 1.87, [1.2, 1.4, 1.6, 1.8]),
        (-0.3, 0.3, [-0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 6) == pytest.approx(expected)


def test_steps_have_whole_ticks() -> None:
    assert ticks(0.0, 3.0, 8, smallest=1.0) == [0, 1, 2, 3]
