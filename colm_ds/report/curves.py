"""Curves made fit for a picture: smoothed, and thinned to what can be seen."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from colm_ds.report.facts import Curve

MAX_POINTS = 200
MAX_FAINT_POINTS = 400


def smooth(curve: Curve) -> Curve:
    """Moving average over a fifteenth of the points, at least 7.

    The window is centred; at the start it narrows, because curves are steep there, and at the end it is cut off.
    """
    count = len(curve.values)
    half = max(3, count // 30)
    sums = np.concatenate([[0.0], np.cumsum(curve.values)])
    places = np.arange(count)
    reach = np.minimum(half, places)
    stop = np.minimum(places + reach + 1, count)
    means = (sums[stop] - sums[places - reach]) / (stop - places + reach)
    return Curve(curve.steps, curve.seconds, [float(mean) for mean in means])


def thin(curve: Curve, max_points: int = MAX_POINTS) -> Curve:
    """Evenly spaced points of a curve, its first and last among them."""
    return at(curve, even_places(len(curve.values), max_points))


def at(curve: Curve, places: Sequence[int]) -> Curve:
    """The points of a curve at some places."""
    return Curve(
        [curve.steps[place] for place in places],
        [curve.seconds[place] for place in places] if curve.seconds else [],
        [curve.values[place] for place in places],
    )


def even_places(count: int, most: int) -> list[int]:
    """At most so many places out of `count`, evenly spaced, first and last included."""
    if count <= most:
        return list(range(count))
    return sorted({round(place) for place in np.linspace(0, count - 1, most)})


def envelope(curve: Curve, max_points: int = MAX_FAINT_POINTS) -> Curve:
    """Lowest and highest point of short stretches, so that thinning does not hide how noisy a curve is."""
    count = len(curve.values)
    if count <= max_points:
        return curve
    bounds = np.linspace(0, count, max_points // 2 + 1).astype(int)
    places: set[int] = set()
    for start, stop in itertools.pairwise(bounds):
        values = curve.values[start:stop]
        places |= {int(start + np.argmin(values)), int(start + np.argmax(values))}
    return at(curve, sorted(places))


def steps_of(curves: Sequence[Curve], most: int) -> list[int]:
    """Steps for the rows of a table: evenly spaced ones among all of the curves' steps."""
    steps = sorted({step for curve in curves for step in curve.steps})
    return [steps[place] for place in even_places(len(steps), most)]


def value_at(curve: Curve, step: int, nearby: int = 0) -> float | None:
    """The curve's value at a step, or at the nearest one that is at most `nearby` steps away."""
    if not curve.steps:
        return None
    place = int(np.argmin(np.abs(np.asarray(curve.steps) - step)))
    return curve.values[place] if abs(curve.steps[place] - step) <= nearby else None


def seconds_at(curve: Curve, step: int) -> float | None:
    """Training seconds at a step of the curve."""
    return curve.seconds[curve.steps.index(step)] if curve.seconds and step in curve.steps else None


def last_tenth(values: Sequence[float]) -> Sequence[float]:
    """The last tenth of some values, at least one."""
    return values[-max(1, len(values) // 10) :]
