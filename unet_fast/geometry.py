"""Sizes of a U-Net of unpadded convolutions, in plain integers.

A level is two valid 3x3 convolutions: each takes one pixel from every side. Between two levels lies a 2x2 max-pool on
the way down and a doubling on the way up. With depth d (the number of poolings) a map of m pixels at the bottom needs

    tile_in  = 2^d m + 4 (2^d - 1)        tile_out = tile_in - 2 halo        halo = 6 * 2^d - 4

so that, at depth 4, the legal tiles are 188 + 16 j, each 184 pixels wider than what comes out (572 -> 388).
Derivations: docs/mathematics.md, section 1.
"""

__all__ = [
    "arriving_size",
    "halo",
    "input_size",
    "legal_sizes",
    "output_size",
    "receptive_field",
    "step_multiple",
]


def halo(depth: int = 4) -> int:
    """Pixels that the valid convolutions take from each side: 6 * 2^depth - 4 (92 at depth 4).

    Raises:
        TypeError: depth is no whole number.
        ValueError: depth is negative.
    """
    return 6 * step_multiple(depth) - 4


def step_multiple(depth: int = 4) -> int:
    """What the distance between two tiles must be a multiple of, so that all pool on one grid: 2^depth.

    Raises:
        TypeError: depth is no whole number.
        ValueError: depth is negative.
    """
    depth = _whole("depth", depth)
    if depth < 0:
        raise ValueError(f"depth must be 0 or more, got {depth}")
    return 1 << depth


def receptive_field(level: int) -> int:
    """Side, in input pixels, of what one value sees after the two convolutions of `level` on the contracting path.

    9 * 2^level - 4: 5, 14, 32, 68, 140 for levels 0 (full resolution) to 4.

    Raises:
        TypeError: level is no whole number.
        ValueError: level is negative.
    """
    level = _whole("level", level)
    if level < 0:
        raise ValueError(f"level must be 0 (full resolution) or more, got {level}")
    return 9 * (1 << level) - 4


def output_size(n: int, depth: int = 4, *, name: str = "tile_in") -> int:
    """Rows (or columns) that come out of a valid U-Net for `n` that go in: n - 2 halo(depth).

    Args:
        n: input pixels along one axis.
        depth: number of poolings.
        name: what an error calls `n`.

    Raises:
        TypeError: n or depth is no whole number.
        ValueError: n cannot be pooled depth times without a rest, or nothing is left; both legal neighbours are named.
    """
    n = _whole(name, n)
    check_legal(n, depth, name=name)
    return n - 2 * halo(depth)


def arriving_size(n: int, below: int) -> int:
    """Rows (columns) of the up-convolved map that meets a skip of n rows with `below` levels of the U under it.

    On the way down each level pools and loses 4, on the way up it doubles and loses 4. No check: n is of a legal tile,
    and may be symbolic.

    >>> [arriving_size(n, below) for n, below in ((568, 4), (280, 3), (136, 2), (64, 1))]  # figure 1 of the paper
    [392, 200, 104, 56]
    """
    inner = n // 2 - 4
    return 2 * (inner if below == 1 else arriving_size(inner, below - 1) - 4)


def input_size(n: int, depth: int = 4, *, name: str = "tile_out") -> int:
    """Rows (or columns) that must go in for `n` to come out: the inverse of `output_size`.

    Raises:
        TypeError: n or depth is no whole number.
        ValueError: no legal input has this output; both neighbours that have one are named.
    """
    n = _whole(name, n)
    step, shrink = step_multiple(depth), 2 * halo(depth)
    if n >= 1 and _is_legal(n + shrink, step):
        return n + shrink
    below, above = _neighbours(n + shrink, step)
    nearest = _nearest(below if below is None else below - shrink, above - shrink)
    raise ValueError(f"{name} {n} does not come out of a net pooled {depth} times; {nearest}")


def legal_sizes(low: int, high: int, depth: int = 4) -> list[int]:
    """Every legal input size from `low` to `high`, both ends included.

    Raises:
        TypeError: an argument is no whole number.
        ValueError: depth is negative, or low is above high.
    """
    low, high = _whole("low", low), _whole("high", high)
    step = step_multiple(depth)
    if low > high:
        raise ValueError(f"low must not be above high, got low {low} and high {high}")
    first = _neighbours(low, step)[1] if not _is_legal(low, step) else low
    return list(range(first, high + 1, step))


def check_legal(n: int, depth: int, *, name: str) -> None:
    """Raise ValueError unless `n` pixels can go in. Arithmetic only: a symbolic size passes through untouched."""
    step = step_multiple(depth)
    if _is_legal(n, step):
        return
    below, above = _neighbours(n, step)
    if below is None:
        raise ValueError(f"{name} {n} is too small to be pooled {depth} times; {_nearest(below, above)}")
    raise ValueError(f"{name} {n} cannot be pooled {depth} times; {_nearest(below, above)}")


def _smallest(step: int) -> int:
    # the first n = -4 (mod step) that leaves at least one pixel: n - (12 step - 8) >= 1
    shrink = 12 * step - 8
    return shrink + 1 + (-4 - shrink - 1) % step


def _is_legal(n: int, step: int) -> bool:
    return n >= _smallest(step) and (n + 4) % step == 0


def _neighbours(n: int, step: int) -> tuple[int | None, int]:
    """The legal sizes next to an illegal `n`; None below the smallest."""
    smallest = _smallest(step)
    if n < smallest:
        return None, smallest
    below = n - (n + 4) % step
    return below, below + step


def _nearest(below: int | None, above: int) -> str:
    return f"the smallest is {above}" if below is None else f"nearest are {below} and {above}"


def _whole(name: str, n: int) -> int:
    # bool is an int to Python; as a size it is a mistake
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {n!r}")
    return n.__index__()
