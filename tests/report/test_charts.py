"""Curves: what is drawn is what was recorded, however much of it there is."""

import re
from itertools import pairwise

import pytest

from vfun_cli.report.charts import MOST_POINTS, Chart, Curve, draw, smooth, thinned, ticks


def chart(points: list[tuple[float, float]], **given: bool) -> str:
    curve = Curve(name="a", points=points, role="trained")
    return draw(Chart(title="t", curves=[curve], write=lambda value: f"{value:.3g}", **given))


def drawn(svg: str) -> list[tuple[float, float]]:
    found = re.search(r'<polyline [^>]*points="([^"]*)"', svg)
    assert found
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found[1].split())]


def test_higher_is_higher_and_later_is_further_right() -> None:
    places = drawn(chart([(1, 5), (2, 1), (3, 3)]))
    assert places[0][1] < places[2][1] < places[1][1]
    assert places[0][0] < places[1][0] < places[2][0]
    assert places[1][0] - places[0][0] == pytest.approx(places[2][0] - places[1][0], abs=0.11)


@pytest.mark.parametrize("points", [[(1, 2)], [(1, 0), (2, 0)], [(1, -1e-9), (2, -1e-9)], [(5, 1e300), (6, -1e300)]])
def test_few_or_equal_or_immense_values_have_a_place_in_the_picture(points: list[tuple[float, float]]) -> None:
    for from_zero in (False, True):
        assert all(0 <= x <= 370 and 0 <= y <= 170 for x, y in drawn(chart(points, from_zero=from_zero)))


def test_of_a_long_run_the_peaks_stay() -> None:
    points = [(float(x), 1000.0 if x == 77_777 else float(x % 7)) for x in range(100_000)]
    few = thinned(points)
    assert len(few) <= MOST_POINTS and (77_777, 1000) in few
    assert few == sorted(few)
    assert min(y for _, y in few) == 0


def test_smoothing_keeps_a_line_and_halves_no_level() -> None:
    line = [(float(x), 3.0) for x in range(200)]
    assert smooth(line) == line
    jagged = smooth([(float(x), float(x % 2)) for x in range(200)])
    assert all(0.4 < y < 0.6 for _, y in jagged)
    assert smooth([(1.0, 2.0)]) == [(1.0, 2.0)]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3, 120), (1e-5, 4e-5), (-2, 7), (0, 1e9)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high, 4)
    assert 2 <= len(found) <= 6
    assert all(low <= value <= high for value in found)
    assert float(f"{found[1] - found[0]:e}".partition("e")[0]) in (1, 2, 5)
    steps = {round((b - a) / (found[1] - found[0]), 6) for a, b in pairwise(found)}
    assert steps == {1.0}
