"""Charts say what the numbers say: places in proportion, round numbers on the axes, no peak lost."""

import doctest
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unet_fast import charts, report
from unet_fast.charts import HEIGHT, WIDTH, Chart, chart

NUMBERS = st.floats() | st.integers(-(10**40), 10**40).map(float) | st.sampled_from([0.0, 1e-320, 1e29, -1e29, 5.0])


def places(made: Chart, line: int = 0) -> list[tuple[float, float]]:
    found = re.findall(r"(\S+) (\S+?)(?: L|$)", made.lines[line].path[1:])
    return [(float(x), float(y)) for x, y in found]


def test_the_examples_are_true() -> None:
    assert doctest.testmod(charts).failed == 0
    assert doctest.testmod(report).failed == 0


@pytest.mark.parametrize("logarithmic", [False, True])
def test_places_are_in_proportion(logarithmic: bool) -> None:
    values = [1.0, 10.0, 100.0] if logarithmic else [1.0, 50.5, 100.0]
    made = chart("loss", [("a", list(zip([0, 50, 100], values, strict=True)))], logarithmic=logarithmic)
    assert made is not None
    (left, bottom), (middle, half), (right, top) = places(made)
    assert middle == pytest.approx((left + right) / 2, abs=0.02)
    assert half == pytest.approx((bottom + top) / 2, abs=0.02)
    assert (left, top, right, bottom) == made.box
    # a tick stands where a point of that value would
    tick = next(each for each in made.up if each.text == "100")
    assert tick.at == top


def test_the_net_that_was_kept_is_marked_on_its_line() -> None:
    made = chart("IoU", [("a", [(10, 0.5), (20, 0.8), (30, 0.7)])], best=(20, 0.8))
    assert made is not None
    assert made.best == places(made)[1]
    assert made.said == "a: 0.5 at step 10, 0.7 at step 30"


def test_nothing_to_draw_is_no_chart() -> None:
    assert chart("loss", []) is None
    assert chart("loss", [("a", []), ("b", [(1.0, float("nan")), (float("inf"), 2.0), (3.0, 1e31)])]) is None


@given(points=st.lists(st.tuples(NUMBERS, NUMBERS), max_size=20), best=st.tuples(NUMBERS, NUMBERS), log=st.booleans())
def test_any_numbers_lie_inside_the_drawing(
    points: list[tuple[float, float]], best: tuple[float, float], log: bool
) -> None:
    made = chart("a", [("a", points)], best=best, logarithmic=log)
    if made is None:
        return
    left, top, right, bottom = made.box
    inside = [*places(made), *([made.best] if made.best else [])]
    assert all(left <= x <= right and top <= y <= bottom for x, y in inside)
    assert all(left <= tick.at <= right for tick in made.across)
    assert all(top <= tick.at <= bottom for tick in made.up)
    assert 1 <= len(made.up) <= 10
    assert 0 <= left < right <= WIDTH
    assert 0 <= top < bottom <= HEIGHT


@given(low=st.floats(1e-3, 1e3), share=st.floats(1e-3, 1e3), log=st.booleans())
def test_axes_have_a_few_numbers_in_order(low: float, share: float, log: bool) -> None:
    made = chart("a", [("a", [(0, low), (1, low * (1 + share))])], logarithmic=log)
    assert made is not None
    values = [float(tick.text) for tick in made.up]
    assert values == sorted(set(values))
    assert 2 <= len(values) <= 8


@pytest.mark.parametrize("peak", [0, 1, 4321, 9998, 9999])
def test_many_points_become_few_and_keep_the_ends_and_the_peak(peak: int) -> None:
    points = [(float(i), 9.0 if i == peak else float(i % 3)) for i in range(10_000)]
    made = chart("a", [("a", points)])
    assert made is not None
    found = places(made)
    assert len(found) <= 402
    assert (found[0][0], found[-1][0]) == (made.box[0], made.box[2])
    assert min(y for _, y in found) == made.box[1]
    assert [x for x, _ in found] == sorted(x for x, _ in found)
