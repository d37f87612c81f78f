"""Small line charts as plain numbers, from which a page draws SVG: no library, no script, a few kilobytes each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["HEIGHT", "WIDTH", "Chart", "Line", "Tick", "chart", "shown"]

WIDTH, HEIGHT = 380, 220
# room for the numbers beside and below, and for half a letter above and right
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 10, 38
_MOST_POINTS = 400
# beyond these a loss is no loss; what is between can be subtracted, divided and written
_LEAST, _MOST = 1e-30, 1e30

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """`path` is SVG's M and L; `dots` are drawn where a reader may want to know how many there are."""

    name: str
    path: str
    dots: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """All in units of a drawing of WIDTH x HEIGHT; `best` is a place to mark; `said` is the chart in words."""

    title: str
    lines: tuple[Line, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    best: tuple[float, float] | None
    said: str
    box: tuple[float, float, float, float] = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)


def shown(value: float) -> str:
    """A number for people: four digits.

    >>> shown(0.123456), shown(12000.0), shown(1.0)
    ('0.1235', '12000', '1')
    """
    if abs(value) < 1e6 and value == int(value):
        return f"{value:.0f}"
    return f"{value:.4g}"


def chart(
    title: str,
    lines: Sequence[tuple[str, Points]],
    *,
    best: tuple[float, float] | None = None,
    logarithmic: bool = False,
    whole: tuple[float, float] | None = None,
) -> Chart | None:
    """Lay a chart out.

    Args:
        title: what goes up.
        lines: (name, (step, value)...) each; what is no number that can be drawn is left out.
        best: a (step, value) to mark.
        logarithmic: if all values allow it.
        whole: (least, most) that the chart shows at least; None: what there is.

    Returns:
        the chart, or None where there is nothing to draw.
    """
    kept = [(name, [point for point in points if all(map(_drawable, point))]) for name, points in lines]
    kept = [(name, points) for name, points in kept if points]
    if not kept:
        return None
    steps = [x for _, points in kept for x, _ in points]
    values = [y for _, points in kept for _, y in points]
    logarithmic = logarithmic and min(values) > _LEAST
    low, high = min(*values, *(whole or values)), max(*values, *(whole or values))
    first, last = _apart(min(steps), max(steps))
    if logarithmic:
        low, high = (low / 1.2, high * 1.2) if high < 1.05 * low else (low, high)
    else:
        low, high = _apart(low, high)
    across = _scale(first, last, LEFT, WIDTH - RIGHT)
    up = _scale(low, high, HEIGHT - BOTTOM, TOP, logarithmic)
    drawn = tuple(_line(name, points, across, up) for name, points in kept)
    marked = None
    if best is not None and all(map(_drawable, best)) and low <= best[1] <= high and first <= best[0] <= last:
        marked = (across(best[0]), up(best[1]))
    levels = _decades(low, high) if logarithmic else []
    return Chart(
        title,
        drawn,
        tuple(Tick(across(x), f"{x:.10g}") for x in _round_numbers(first, last, 5)),
        tuple(Tick(up(y), f"{y:.10g}") for y in levels or _round_numbers(low, high, 5)),
        marked,
        "; ".join(
            f"{name}: {shown(points[0][1])} at step {shown(points[0][0])}, "
            f"{shown(points[-1][1])} at step {shown(points[-1][0])}"
            for name, points in kept
        ),
    )


def _drawable(value: float) -> bool:
    return math.isfinite(value) and abs(value) < _MOST


def _apart(low: float, high: float) -> tuple[float, float]:
    """The two, with something between them to draw."""
    if high - low > 1e-9 * max(abs(low), abs(high), 1e-20):
        return low, high
    room = 0.5 * abs(low) or 1.0
    return low - room, high + room


def _scale(low: float, high: float, start: float, end: float, logarithmic: bool = False) -> Callable[[float], float]:
    if logarithmic:
        low, high = math.log(low), math.log(high)

    def place(value: float) -> float:
        share = ((math.log(value) if logarithmic else value) - low) / (high - low)
        return round(start + min(max(share, 0.0), 1.0) * (end - start), 2)

    return place


def _line(name: str, points: Points, across: Callable[[float], float], up: Callable[[float], float]) -> Line:
    places = [(across(x), up(y)) for x, y in _thinned(points)]
    path = "M" + " L".join(f"{x:g} {y:g}" for x, y in places)
    return Line(name, path, tuple(places) if len(places) <= 60 else ())


def _thinned(points: Points) -> Points:
    """Not more than a screen can show: of neighbours the lowest and the highest, so that no peak is lost."""
    if len(points) <= _MOST_POINTS:
        return points
    count = _MOST_POINTS // 2
    ends = [len(points) * i // count for i in range(count + 1)]
    kept: list[tuple[float, float]] = []
    for start, end in pairwise(ends):
        few = points[start:end]
        low, high = min(few, key=lambda p: p[1]), max(few, key=lambda p: p[1])
        kept += sorted({low, high})
    # the ends are what one reads off
    return [points[0], *kept, points[-1]]


def _round_numbers(low: float, high: float, most: int) -> list[float]:
    """1, 2, 5 and their tenfolds, in [low, high]."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    start = math.ceil(low / step - 1e-9)
    found = [n * step for n in range(start, start + most + 3)]
    # 3 * 0.1 is to be read as 0.3
    return [float(f"{value:.12g}") for value in found if value <= high + 1e-9 * step]


def _decades(low: float, high: float) -> list[float]:
    """1, 2, 5 and their tenfolds in [low, high] of a logarithmic axis; none where there are fewer than two."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = len(powers) <= 4
    found = [m * 10.0**p for p in powers for m in ((1, 2, 5) if few else (1,)) if low <= m * 10.0**p <= high]
    every = -(-len(found) // 7)
    return [float(f"{value:.12g}") for value in found[::every]] if len(found) > 1 else []
