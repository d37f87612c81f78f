"""Grey values of windows are those of the whole plane, normalised; percentiles are counted, never guessed; NaN is
refused with its place, or filled without moving anything else.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from tests.proof.properties import given, settings, st
from unet_fast import greys, sources
from unet_fast.errors import BadInput
from unet_fast.greys import Greys, order_statistics
from unet_fast.normalisation import KINDS, Normalisation
from unet_fast.sources import ArraySource, open_source

Array = np.ndarray[Any, Any]

DTYPES = ["?", "u1", "u2", ">u2", "u4", "i1", "i2", "i4", "i8", "f2", "f4", ">f4", "f8"]
ordinary = settings(derandomize=True, database=None, deadline=None, max_examples=150)

sides = st.integers(1, 30)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), sides, sides)
spots = st.lists(st.tuples(*[st.integers(0, 99)] * 5), min_size=1, max_size=4)


def _image(shape: tuple[int, ...], dtype: Any = "f4", seed: int = 0, values: int = 10**6) -> Array:
    """[D, C, H, W], negative where the dtype can be; few different `values` make many ties."""
    dtype, rng = np.dtype(dtype), np.random.default_rng(seed)
    if dtype.kind == "b":
        return rng.random(shape) < 0.3
    if dtype.kind == "f":
        most = float(np.finfo(dtype).max)
        return np.clip(np.round(rng.normal(size=shape) * values**0.5) * 0.37, -most, most).astype(dtype)
    ends = np.iinfo(dtype)
    low, high = max(ends.min, -values), min(ends.max, values)
    return rng.integers(low, high, shape, endpoint=True).astype(dtype)


def _window(numbers: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, slice, slice]:
    rows, columns = (
        sorted(n % size for n in pair) for pair, size in ((numbers[1:3], shape[2]), (numbers[3:], shape[3]))
    )
    return numbers[0] % shape[0], slice(rows[0], rows[1] + 1), slice(columns[0], columns[1] + 1)


def _all(found: Greys) -> Array:
    depth, _, height, width = found.shape
    return np.stack([found.read(z, slice(0, height), slice(0, width)) for z in range(depth)])


def _same_bits(a: Array, b: Array) -> None:
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    np.testing.assert_array_equal(a.view(f"u{a.dtype.itemsize}"), b.view(f"u{a.dtype.itemsize}"))


# ---- the whole plane's numbers, whatever the window


@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    shape=shapes,
    ends=st.tuples(st.floats(0, 49), st.floats(50, 100)),
    values=st.sampled_from([1, 4, 10**6]),
    counted=st.booleans(),
    band=st.integers(1, 200),
    windows=spots,
    seed=st.integers(0, 99),
)
@settings(ordinary, max_examples=300)
def test_windows_are_the_normalised_plane_bit_for_bit(
    kind: str, dtype: str, shape: tuple[int, ...], ends: tuple[float, float], values: int, counted: bool, band: int,
    windows: list[tuple[int, ...]], seed: int,
) -> None:  # fmt: skip
    image, normalisation = _image(shape, dtype, seed, values), Normalisation(kind, *ends)
    # the specification: planes in memory
    wanted = normalisation(image.view("u1") if image.dtype == bool else image)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greys, "_BAND", band)
        if counted:
            patch.setattr(greys, "_SORTED", 0)
        found = Greys(ArraySource(image), normalisation)
        assert (found.shape, found.dtype) == (shape, np.float32)
        for numbers in windows:
            z, rows, columns = _window(numbers, shape)
            _same_bits(found.read(z, rows, columns), wanted[z, :, rows, columns])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_counted_limits_are_those_of_sorted_values(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, values in enumerate((2, 50, 10**6)):
        image = _image((1, 2, 40, 50), dtype, seed, values)
        for low, high in ((0, 100), (1, 99.8), (0.1, 0.2), (50, 50.01)):
            normalisation = Normalisation("percentile", low, high)
            monkeypatch.undo()
            by_sorting = [Greys(ArraySource(image), normalisation).limits(0, channel) for channel in range(2)]
            monkeypatch.setattr(greys, "_SORTED", 0)
            monkeypatch.setattr(greys, "_BAND", 170)
            by_counting = [Greys(ArraySource(image), normalisation).limits(0, channel) for channel in range(2)]
            assert by_counting == by_sorting
            planes = image[0].reshape(2, -1)
            assert by_counting == [normalisation.limits(p.view("u1") if p.dtype == bool else p) for p in planes]


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_normalisation_grey_values_are_as_they_are(dtype: str) -> None:
    image = _image((2, 2, 7, 9), dtype)
    for wide, wanted in ((False, np.float32), (True, np.float64)):
        found = Greys(ArraySource(image), None, wide=wide)
        assert found.dtype == wanted
        _same_bits(_all(found), image.astype(wanted))


def test_wide_keeps_what_single_precision_loses() -> None:
    image = np.array([[[[2**31 - 1, 2**31 - 2, 2**53, -(2**53) + 1]]]])
    np.testing.assert_array_equal(_all(Greys(ArraySource(image), None, wide=True)).astype(np.int64), image)
    fine = np.nextafter(np.ones((1, 1, 2, 2)), 2)
    np.testing.assert_array_equal(_all(Greys(ArraySource(fine), None, wide=True)), fine)
    # what is normalised lies between 0 and 1
    assert Greys(ArraySource(image), Normalisation(), wide=True).dtype == np.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counted", [False, True])
def test_a_plane_of_one_grey_value_becomes_0(dtype: str, counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if counted:
        monkeypatch.setattr(greys, "_SORTED", 0)
    for value in (0, 1):
        found = Greys(ArraySource(np.full((1, 1, 5, 6), value, dtype)), Normalisation())
        np.testing.assert_array_equal(_all(found), 0)
        assert found.limits(0, 0) == (value, value)


def test_limits_are_of_each_plane_and_of_the_model() -> None:
    image = _image((2, 3, 8, 9), "u2")
    found = Greys(ArraySource(image), Normalisation("percentile", 0, 100))
    for z in range(2):
        for channel in range(3):
            assert found.limits(z, channel) == (image[z, channel].min(), image[z, channel].max())
    for kind in ("range", "none"):
        assert Greys(ArraySource(image), Normalisation(kind, 3, 7)).limits(1, 2) == (3, 7)


class _Watched(ArraySource):
    """A source that says how much was asked for."""

    def __init__(self, array: Array) -> None:
        super().__init__(array)
        self.most = self.reads = 0

    def read(self, z: int, rows: slice, columns: slice) -> Array:
        self.most, self.reads = (
            max(self.most, (rows.stop - rows.start) * (columns.stop - columns.start)),
            self.reads + 1,
        )
        return super().read(z, rows, columns)


def test_a_plane_is_looked_at_in_bands_and_its_limits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greys, "_SORTED", 0)
    for band, most in ((100, 100), (10, 20), (205, 200)):
        monkeypatch.setattr(greys, "_BAND", band)
        source = _Watched(_image((1, 1, 33, 20), "f8"))
        found = Greys(source, Normalisation())
        found.limits(0, 0)
        assert source.most == most
        reads = source.reads
        for _ in range(3):
            found.read(0, slice(0, 5), slice(0, 7))
        assert source.reads == reads + 3


@pytest.mark.parametrize(("dtype", "passes"), [("u1", 1), ("u2", 1), ("f4", 2)])
def test_looking_for_percentiles_leaves_what_is_kept_for_windows(
    dtype: str, passes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greys, "_SORTED", 0)
    monkeypatch.setattr(greys, "_BAND", 3000)
    monkeypatch.setattr(sources, "_ALWAYS_KEPT", 0)
    image = _image((2, 1, 200, 150), dtype)
    more: dict[str, Any] = {"photometric": "minisblack", "compression": "zlib", "metadata": {"axes": "ZYX"}}
    tifffile.imwrite(tmp_path / "x.tif", image[:, 0], tile=(16, 32), **more)
    chunks = 2 * 13 * 5
    with closing(open_source(tmp_path / "x.tif")) as source:
        assert not isinstance(source, ArraySource)
        # NaN is looked for first, where there may be some
        found = Greys(source, Normalisation())
        before = source.decoded
        assert before == (chunks if dtype == "f4" else 0)
        # the limits are found when the first window of a slice is read
        source.reserve(100)
        for z in range(2):
            for row in range(0, 200, 40):
                for column in range(0, 150, 50):
                    rows, columns = slice(max(0, row - 30), min(200, row + 70)), slice(column, column + 50)
                    wanted = Normalisation()(image)[z, :, rows, columns]
                    _same_bits(found.read(z, rows, columns), wanted)
        # sixteen bits a pass, and once for the windows
        assert source.decoded - before == chunks * (passes + 1)
        # and nothing of the slice is decoded again
        now = source.decoded
        found.read(1, slice(170, 200), slice(0, 150))
        assert source.decoded == now


# ---- order statistics


def _parts(values: Array, cuts: list[int]) -> Iterator[Array]:
    # empty ones too
    return iter(np.split(values, sorted(cut % (len(values) + 1) for cut in cuts)))


@given(
    dtype=st.sampled_from([d for d in DTYPES if d != "?"] + ["u8", ">i4", ">f8"]),
    count=st.integers(1, 60),
    values=st.sampled_from([1, 3, 10**6, 2**62]),
    cuts=st.lists(st.integers(0, 300), max_size=4),
    ranks=st.lists(st.integers(0, 10**6), min_size=1, max_size=6),
    seed=st.integers(0, 10**6),
)
@settings(ordinary, max_examples=150)
def test_order_statistics_are_those_of_sorting(
    dtype: str, count: int, values: int, cuts: list[int], ranks: list[int], seed: int
) -> None:
    array = _image((count,), dtype, seed, min(values, 10**4) if dtype == "f2" else values)
    rng = np.random.default_rng(seed)
    if array.dtype.kind == "f":
        odd = [0.0, -0.0, np.inf, -np.inf, np.finfo(array.dtype).max, np.finfo(array.dtype).smallest_subnormal]
        chosen = rng.random(count) < 0.3
        array[chosen] = rng.choice(np.array([*odd, -odd[-1]], array.dtype), chosen.sum())
    elif seed % 2:
        array[rng.integers(count)] = np.iinfo(array.dtype).max
        array[rng.integers(count)] = np.iinfo(array.dtype).min
    before, places = array.copy(), sorted(rank % count for rank in ranks)
    found = order_statistics(lambda: _parts(array, cuts), places)
    assert found.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(found, np.sort(array)[places])
    np.testing.assert_array_equal(array, before)
    if array.dtype.kind == "f":
        # all of them: zeros of both signs are kept apart, as many as there are
        whole = order_statistics(lambda: _parts(array, cuts), range(count))
        assert np.signbit(whole).sum() == np.signbit(array).sum()
        np.testing.assert_array_equal(np.signbit(whole), np.sort(np.signbit(array))[::-1])


def test_order_statistics_hold_no_more_than_a_table() -> None:
    # values in parts, none of them kept
    def parts() -> Iterator[Array]:
        for start in range(0, 2**20, 2**14):
            yield (np.arange(start, start + 2**14, dtype=np.uint32) * np.uint32(2654435761)) % np.uint32(2**31)

    wanted = np.sort(np.concatenate(list(parts())))
    ranks = [0, 1, 2**19, 2**20 - 1]
    np.testing.assert_array_equal(order_statistics(parts, ranks), wanted[ranks])


@pytest.mark.parametrize(("ranks", "count"), [([3], 3), ([0, 9], 3), ([2**20], 7)])
def test_a_rank_that_there_is_not_is_refused(ranks: list[int], count: int) -> None:
    with pytest.raises(ValueError, match=f"ranks must lie below the number of values, {count}, got {ranks[-1]}"):
        order_statistics(lambda: iter([np.arange(count, dtype=np.float32)]), ranks)


# ---- NaN


def _spoiled(shape: tuple[int, ...], dtype: Any = "f4") -> Array:
    """Every kind of what is no number, in the second slice's last channel."""
    image = _image(shape, dtype)
    image[1, -1, 3, 4], image[1, -1, 3, 5], image[1, -1, 6, 0] = np.nan, np.inf, -np.inf
    return image


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("band", [1, 25, 2**22])
def test_nan_is_refused_with_count_and_place(dtype: str, band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greys, "_BAND", band)
    image = _spoiled((3, 2, 8, 9), dtype)
    for is_stack, place in ((True, r"x\.tif\[1\]"), (False, r"x\.tif")):
        said = rf"^x\.tif has 3 NaN or infinite pixels, the first at {place} row 3 column 4; replace them first, "
        for normalisation in (None, Normalisation(), Normalisation("range", 0, 1), Normalisation("none")):
            with pytest.raises(BadInput, match=said):
                Greys(ArraySource(image, name="x.tif", is_stack=is_stack), normalisation)
    for value in (np.nan, np.inf, -np.inf):
        image = _image((1, 1, 8, 9), dtype)
        image[0, 0, 7, 8] = value
        with pytest.raises(BadInput, match="has 1 NaN or infinite pixels, the first at image row 7 column 8"):
            Greys(ArraySource(image), None)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_filled_nan_is_dark_and_moves_nothing_else(dtype: str, counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if counted:
        monkeypatch.setattr(greys, "_SORTED", 0)
    image, normalisation = _spoiled((2, 2, 8, 9), dtype), Normalisation("percentile", 5, 90)
    found = Greys(ArraySource(image), normalisation, nan="fill")
    clean = _image((2, 2, 8, 9), dtype)
    whole = _all(found)
    # planes without any are as they were
    _same_bits(whole[0], normalisation(clean)[0])
    _same_bits(whole[1, 0], normalisation(clean)[1, 0])
    plane = image[1, 1]
    finite = plane[np.isfinite(plane)]
    assert len(finite) == plane.size - 3
    limits = normalisation.limits(finite)
    assert found.limits(1, 1) == limits
    np.testing.assert_array_equal(whole[1, 1][np.isfinite(plane)], normalisation.scaled(finite, *limits))
    # NaN is the dark end, infinities are the ends
    assert [whole[1, 1, 3, 4], whole[1, 1, 3, 5], whole[1, 1, 6, 0]] == [0, 1, 0]


def test_filled_nan_in_a_range_and_without_one() -> None:
    image = np.array([[[[np.nan, np.inf, -np.inf, 5, 25, 15]]]], np.float32)
    found = Greys(ArraySource(image), Normalisation("range", 10, 20), nan="fill")
    assert _all(found).ravel().tolist() == [0, 1, 0, 0, 1, 0.5]
    for normalisation in (None, Normalisation("none")):
        found = Greys(ArraySource(image), normalisation, nan="fill")
        assert _all(found).ravel().tolist() == [0, 0, 0, 5, 25, 15]


@pytest.mark.parametrize("values", [[np.nan], [np.inf], [-np.inf], [np.nan, np.inf, -np.inf], [np.nan, np.inf, 7]])
@pytest.mark.parametrize("counted", [False, True])
def test_a_plane_of_nothing_but_nan_or_one_value_becomes_0(
    values: list[float], counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if counted:
        monkeypatch.setattr(greys, "_SORTED", 0)
    image = np.resize(np.array(values, np.float32), (1, 1, 4, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(_all(Greys(ArraySource(image), Normalisation(), nan="fill")), 0)


def test_filling_leaves_the_image_alone() -> None:
    image = _spoiled((2, 1, 8, 9), "f8")
    for normalisation, wide in ((None, True), (None, False), (Normalisation(), False), (Normalisation("none"), False)):
        before = image.copy()
        found = _all(Greys(ArraySource(image), normalisation, nan="fill", wide=wide))
        assert np.isfinite(found).all()
        np.testing.assert_array_equal(image, before)


def test_filling_is_nothing_to_whole_numbers() -> None:
    image = _image((1, 2, 6, 7), "u2")
    for nan in greys.NAN:
        _same_bits(_all(Greys(ArraySource(image), Normalisation(), nan=nan)), Normalisation()(image))


def test_what_to_do_with_nan_is_one_of_two_things() -> None:
    with pytest.raises(BadInput, match=re.escape("nan must be one of refuse, fill, got 'drop'")):
        Greys(ArraySource(_image((1, 1, 3, 3))), None, nan="drop")
