"""Smoothing and thinning keep what a curve shows; numbers as they are written."""

from __future__ import annotations

import pytest

from colm_ds.report.charts import Line, Style, _focused, even_places, smooth
from colm_ds.report.facts import Curve
from colm_ds.report.statistics import Difference, Measure
from colm_ds.report.tables import Column, Table, compact, fixed, shorten, signed


def curve(values: list[float]) -> Curve:
    steps = list(range(1, len(values) + 1))
    return Curve(steps, [2.0 * step for step in steps], [], values)


def test_smoothing_keeps_constants_and_the_first_value() -> None:
    assert smooth(curve([2.0] * 50)).values == pytest.approx([2.0] * 50)
    assert smooth(curve([9.0, 1.0, 1.0, 1.0])).values[0] == 9.0
    assert smooth(curve([5.0])).values == [5.0]


def test_smoothing_averages() -> None:
    noisy = smooth(curve([1.0, 3.0] * 100)).values
    assert all(abs(value - 2.0) < 0.2 for value in noisy[20:])


def test_thinning_keeps_both_ends() -> None:
    thinned = smooth(curve([float(value) for value in range(5000)]), 100)
    assert len(thinned.values) == len(thinned.seconds) == 100
    assert (thinned.steps[0], thinned.steps[-1]) == (1, 5000)
    assert even_places(3, 10) == [0, 1, 2]


def test_focus_leaves_short_lines_whole() -> None:
    """Held-out loss before and after a short run: both points are within the picture."""
    low, high = _focused([Line("short", Style(0), [0, 6], [5.4, 4.4])])
    assert low < 4.4 < 5.4 < high
    low, high = _focused([Line("long", Style(0), range(100), [9.0] * 20 + [1.0] * 80)])
    assert (low, high) == pytest.approx((0.95, 1.05))


def test_value_at_a_place() -> None:
    points = Curve([10, 20], [5.0, 7.0], [], [1.0, 2.0])
    assert points.at("steps", 20) == 2.0
    assert points.at("seconds", 6.5) == pytest.approx(1.75)
    assert points.at("steps", 9) is None
    assert points.at("tokens", 10) is None
    assert Curve().at("steps", 1) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1,234"), (12.345, "12.3"), (0.0123456, "0.0123"), (1e-7, "1e-07"), (-2.5, "-2.50")],
)
def test_compact(value: float, text: str) -> None:
    assert compact(value) == text


def test_signs_and_short_names() -> None:
    assert [signed(fixed(1))(value) for value in (0.04, -0.04, -1.26, 2.0)] == ["0.0", "0.0", "−1.3", "+2.0"]
    assert shorten("a long name of an arm, number 3", 15) == "a long …umber 3"
    assert shorten("short", 15) == "short"


def test_errors_beside_means() -> None:
    column = Column("loss", signed(fixed(2)))
    assert column.text(Measure(1.0, 0.25, {0: 1.0})) == "+1.00 ± 0.25"
    assert column.text(Difference(-1.0, 0.25, 0.0, True, ())) == "−1.00 ± 0.25"
    assert [column.text(cell) for cell in (Measure(1.0, None, {}), None, 0.5)] == ["+1.00", "–", "+0.50"]


def test_what_reads_the_same_is_equally_good() -> None:
    table = Table("t", "t", [Column("arm"), Column("loss", fixed(2), "min")], [["a", 1.001], ["b", 1.004], ["c", 2.0]])
    assert table.best_cells() == {(0, 1), (1, 1)}
