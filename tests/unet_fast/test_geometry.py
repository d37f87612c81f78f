"""Proves that the closed formulas of `unet_fast.geometry` are what a U-Net does to a row of pixels.

Each function is compared, at depths 0 to 6, with a walk through the layers one at a time: a valid convolution takes a
pixel from each side, a pool halves what must be even, an up-convolution doubles. The sentences of the errors are part
of the contract, and so is that the module needs neither torch nor numpy.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.proof.properties import given, settings, st
from unet_fast import geometry

ROOT = Path(__file__).parents[2]

ordinary = settings(derandomize=True, database=None, deadline=None, max_examples=200)

depths = st.integers(0, 6)
sizes = st.integers(-50, 3000)


def walk(n: int, depth: int) -> int | None:
    """Pixels that come out for n, layer by layer; None where a pool meets an odd map or a convolution runs out."""
    for _ in range(depth):
        n = n - 2 - 2
        if n < 1 or n % 2 == 1:
            return None
        n = n // 2
    n = n - 2 - 2
    if n < 1:
        return None
    for _ in range(depth):
        n = 2 * n - 2 - 2
        if n < 1:
            return None
    return n


def fits(n: int, depth: int) -> bool:
    return walk(n, depth) is not None


def or_refused(function: Callable[[int, int], int], n: int, depth: int) -> int | None:
    """What the function answers, None for a ValueError."""
    try:
        return function(n, depth)
    except ValueError:
        return None


def nearest_legal(n: int, depth: int) -> tuple[int | None, int]:
    """The legal sizes around n, by counting down and up one pixel at a time."""
    below = next((m for m in range(n - 1, 0, -1) if fits(m, depth)), None)
    above = next(m for m in range(max(n + 1, 1), 10_000) if fits(m, depth))
    return below, above


def seen_by(pixel: int, level: int) -> set[int]:
    """Input pixels that reach one value of `level` after its two convolutions."""
    seen = {pixel}
    for step in range(level + 1):
        if step > 0:
            seen = {2 * p + k for p in seen for k in (0, 1)}
        for _ in range(2):
            seen = {p + k for p in seen for k in (0, 1, 2)}
    return seen


def output_pixel_sees(pixel: int, n: int, depth: int) -> set[int]:
    """Input pixels of a row of n that reach output pixel `pixel`, along every path through skips and bottom."""
    margins, size = [], n
    for _ in range(depth):
        size = (size - 4) // 2
    rising = size - 4
    for level in range(depth - 1, -1, -1):
        map_here = n
        for _ in range(level):
            map_here = (map_here - 4) // 2
        margins.append((map_here - 4 - 2 * rising) // 2)
        rising = 2 * rising - 4
    margins.reverse()
    wanted, seen = {pixel}, set()
    for level in range(depth):
        for _ in range(2):
            wanted = {p + k for p in wanted for k in (0, 1, 2)}
        seen |= {q for p in wanted for q in seen_by(p + margins[level], level)}
        wanted = {p // 2 for p in wanted}
    return seen | {q for p in wanted for q in seen_by(p, depth)}


@given(sizes, depths)
@ordinary
def test_output_size_is_what_a_walk_through_the_layers_leaves(n: int, depth: int) -> None:
    legal = nearest_legal(n, depth)[1]
    assert geometry.output_size(legal, depth) == walk(legal, depth)


@pytest.mark.parametrize("depth", range(7), ids="depth {}".format)
def test_every_size_is_taken_or_refused_as_the_walk_says(depth: int) -> None:
    assert [or_refused(geometry.output_size, n, depth) for n in range(1600)] == [walk(n, depth) for n in range(1600)]


@given(sizes, depths)
@ordinary
def test_an_illegal_size_is_refused_with_both_neighbours_named(n: int, depth: int) -> None:
    illegal = n if not fits(n, depth) else n + 1 if depth > 0 else 4
    below, above = nearest_legal(illegal, depth)
    expected = (
        f"tile_in {illegal} is too small to be pooled {depth} times; the smallest is {above}"
        if below is None
        else f"tile_in {illegal} cannot be pooled {depth} times; nearest are {below} and {above}"
    )
    with pytest.raises(ValueError, match="pooled") as caught:
        geometry.output_size(illegal, depth)
    assert str(caught.value) == expected


@given(sizes, depths)
@ordinary
def test_input_size_is_the_inverse_of_output_size(n: int, depth: int) -> None:
    legal = nearest_legal(n, depth)[1]
    assert geometry.input_size(geometry.output_size(legal, depth), depth) == legal


@pytest.mark.parametrize("depth", range(7), ids="depth {}".format)
def test_input_size_takes_exactly_the_outputs_that_exist(depth: int) -> None:
    made = {walk(n, depth): n for n in range(2400) if fits(n, depth)}
    outputs = range(-5, 1200)
    assert [or_refused(geometry.input_size, out, depth) for out in outputs] == [made.get(out) for out in outputs]


@given(st.integers(-50, 1200), st.integers(1, 6))
@ordinary
def test_an_output_that_cannot_be_is_refused_with_both_neighbours_named(out: int, depth: int) -> None:
    outputs = sorted(m for m in (walk(n, depth) for n in range(2400)) if m is not None)
    impossible = out if out not in outputs else out + 1
    below = [m for m in outputs if m < impossible]
    above = min(m for m in outputs if m > impossible)
    nearest = f"nearest are {below[-1]} and {above}" if below else f"the smallest is {above}"
    with pytest.raises(ValueError, match="does not come out") as caught:
        geometry.input_size(impossible, depth)
    assert str(caught.value) == f"tile_out {impossible} does not come out of a net pooled {depth} times; {nearest}"


@given(sizes, st.integers(0, 900), depths)
@ordinary
def test_legal_sizes_are_those_that_the_walk_survives(low: int, width: int, depth: int) -> None:
    high = low + width
    assert geometry.legal_sizes(low, high, depth) == [n for n in range(low, high + 1) if fits(n, depth)]


@given(sizes, depths, st.integers(0, 5))
@ordinary
def test_legal_sizes_include_both_ends(n: int, depth: int, steps: int) -> None:
    low = nearest_legal(n, depth)[1]
    high = low + steps * 2**depth
    found = geometry.legal_sizes(low, high, depth)
    assert (found[0], found[-1], len(found)) == (low, high, steps + 1)


def test_legal_sizes_of_the_paper_are_188_and_every_sixteenth_after() -> None:
    assert geometry.legal_sizes(188, 604) == [188 + 16 * j for j in range(27)]
    assert geometry.legal_sizes(0, 187) == []
    assert geometry.legal_sizes(572, 572) == [572]


@pytest.mark.parametrize("depth", range(7), ids="depth {}".format)
def test_halo_is_half_of_what_the_walk_takes_away(depth: int) -> None:
    for n in geometry.legal_sizes(0, 1600, depth):
        assert n - walk(n, depth) == 2 * geometry.halo(depth)


@pytest.mark.parametrize("depth", range(5), ids="depth {}".format)
def test_the_outermost_outputs_see_to_the_edge_of_the_tile_and_lie_one_halo_inside(depth: int) -> None:
    halo, step = geometry.halo(depth), geometry.step_multiple(depth)
    n = geometry.legal_sizes(0, 2000, depth)[3]
    reach = [output_pixel_sees(p, n, depth) for p in range(geometry.output_size(n, depth))]
    assert (min(reach[0]), max(reach[-1])) == (0, n - 1)
    # output pixel p lies over input pixel p + halo; where it lies on the pooling grid adds up to a step less one
    left = [p + halo - min(seen) for p, seen in enumerate(reach)]
    right = [max(seen) - (p + halo) for p, seen in enumerate(reach)]
    assert (left[0], right[-1]) == (halo, halo)
    assert (max(left), max(right)) == (halo + step - 1, halo + step - 1)


@pytest.mark.parametrize("level", range(7), ids="level {}".format)
def test_receptive_field_is_the_number_of_input_pixels_that_one_value_sees(level: int) -> None:
    seen = seen_by(3, level)
    assert geometry.receptive_field(level) == len(seen) == max(seen) - min(seen) + 1


def test_the_receptive_fields_of_the_paper_are_5_14_32_68_140() -> None:
    assert [geometry.receptive_field(level) for level in range(5)] == [5, 14, 32, 68, 140]


@given(depths, st.integers(1, 400))
@ordinary
def test_a_step_keeps_every_pool_on_its_grid_exactly_when_it_is_a_multiple_of_step_multiple(
    depth: int, step: int
) -> None:
    aligned, remaining = True, step
    for _ in range(depth):
        aligned, remaining = aligned and remaining % 2 == 0, remaining // 2
    assert aligned == (step % geometry.step_multiple(depth) == 0)


def test_the_paper_takes_572_and_gives_388_with_a_halo_of_92_and_steps_of_16() -> None:
    assert geometry.output_size(572) == 388
    assert geometry.input_size(388) == 572
    assert geometry.halo() == 92
    assert geometry.step_multiple() == 16


@given(sizes, depths)
@ordinary
def test_check_legal_is_silent_exactly_where_output_size_answers(n: int, depth: int) -> None:
    legal = nearest_legal(n, depth)[1]
    assert geometry.check_legal(legal, depth, name="rows") is None
    with pytest.raises(ValueError, match=r"^rows 3 is too small to be pooled"):
        geometry.check_legal(3, depth, name="rows")


SENTENCES = {
    "between two legal sizes": (
        lambda: geometry.output_size(570),
        "tile_in 570 cannot be pooled 4 times; nearest are 556 and 572",
    ),
    "between two legal sizes at depth 2": (
        lambda: geometry.output_size(46, 2),
        "tile_in 46 cannot be pooled 2 times; nearest are 44 and 48",
    ),
    "too small": (
        lambda: geometry.output_size(187),
        "tile_in 187 is too small to be pooled 4 times; the smallest is 188",
    ),
    "on the grid but nothing left": (
        lambda: geometry.output_size(172),
        "tile_in 172 is too small to be pooled 4 times; the smallest is 188",
    ),
    "zero": (lambda: geometry.output_size(0), "tile_in 0 is too small to be pooled 4 times; the smallest is 188"),
    "negative": (
        lambda: geometry.output_size(-572),
        "tile_in -572 is too small to be pooled 4 times; the smallest is 188",
    ),
    "named by the caller": (
        lambda: geometry.output_size(570, name="rows of x"),
        "rows of x 570 cannot be pooled 4 times; nearest are 556 and 572",
    ),
    "an output between two": (
        lambda: geometry.input_size(390),
        "tile_out 390 does not come out of a net pooled 4 times; nearest are 388 and 404",
    ),
    "an output below the smallest": (
        lambda: geometry.input_size(3),
        "tile_out 3 does not come out of a net pooled 4 times; the smallest is 4",
    ),
    "no output at all": (
        lambda: geometry.input_size(0),
        "tile_out 0 does not come out of a net pooled 4 times; the smallest is 4",
    ),
    "an output on the grid below zero": (
        lambda: geometry.input_size(-12),
        "tile_out -12 does not come out of a net pooled 4 times; the smallest is 4",
    ),
    "an output named by the caller": (
        lambda: geometry.input_size(389, name="keep"),
        "keep 389 does not come out of a net pooled 4 times; nearest are 388 and 404",
    ),
    "ends in the wrong order": (
        lambda: geometry.legal_sizes(572, 188),
        "low must not be above high, got low 572 and high 188",
    ),
    "negative level": (
        lambda: geometry.receptive_field(-1),
        "level must be 0 (full resolution) or more, got -1",
    ),
}


@pytest.mark.parametrize(("call", "sentence"), SENTENCES.values(), ids=SENTENCES.keys())
def test_a_refused_value_is_explained_in_this_sentence(call, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence[:4]) as caught:
        call()
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "call",
    [
        lambda depth: geometry.halo(depth),
        lambda depth: geometry.step_multiple(depth),
        lambda depth: geometry.output_size(572, depth),
        lambda depth: geometry.input_size(388, depth),
        lambda depth: geometry.legal_sizes(188, 572, depth),
    ],
    ids=["halo", "step_multiple", "output_size", "input_size", "legal_sizes"],
)
def test_a_negative_or_broken_depth_is_refused_by_every_function(call) -> None:
    with pytest.raises(ValueError, match=r"^depth must be 0 or more, got -1$"):
        call(-1)
    for wrong in (4.0, True, "4", None):
        with pytest.raises(TypeError, match=f"^depth must be a whole number, got {wrong!r}$"):
            call(wrong)


@pytest.mark.parametrize("wrong", [572.0, True, "572", None], ids=repr)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("tile_in", lambda n: geometry.output_size(n)),
        ("tile_out", lambda n: geometry.input_size(n)),
        ("low", lambda n: geometry.legal_sizes(n, 1000)),
        ("high", lambda n: geometry.legal_sizes(0, n)),
        ("level", lambda n: geometry.receptive_field(n)),
    ],
    ids=["output_size", "input_size", "legal_sizes low", "legal_sizes high", "receptive_field"],
)
def test_what_is_no_whole_number_is_refused_by_name(name: str, call, wrong: object) -> None:
    with pytest.raises(TypeError) as caught:
        call(wrong)
    assert str(caught.value) == f"{name} must be a whole number, got {wrong!r}"


def test_a_numpy_integer_is_a_whole_number_and_a_plain_int_comes_back() -> None:
    answer = geometry.output_size(np.int64(572), np.int32(4))
    assert (answer, type(answer)) == (388, int)


def test_importing_geometry_loads_neither_torch_nor_numpy_nor_the_kernels() -> None:
    script = (
        "import sys, unet_fast.geometry as g; assert g.output_size(572) == 388;"
        "print(sorted({'torch', 'numpy', 'unet_kernels', 'triton'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("depth", range(1, 6))
def test_what_arrives_at_a_skip_is_what_comes_from_below(depth: int) -> None:
    for n in geometry.legal_sizes(1, 700, depth):
        skips = [n - 4]
        for _ in range(depth):
            skips.append(skips[-1] // 2 - 4)
        came = skips[depth]
        for level in reversed(range(depth)):
            assert geometry.arriving_size(skips[level], depth - level) == 2 * came
            came = 2 * came - 4
        assert came == geometry.output_size(n, depth)
