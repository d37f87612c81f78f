"""Proves the baselines against slow twins: Otsu by trying every threshold, components by flooding, the blur's range."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from tests.proof.properties import given, settings, st
from unet_fast.baselines import blurred, otsu_cells, otsu_threshold

few = settings(derandomize=True, database=None, deadline=None, max_examples=40)

pixels = st.lists(st.integers(0, 255), min_size=1, max_size=40)


def between(values: list[int], threshold: float) -> tuple[int, int]:
    """The variance between the two classes, as a fraction in whole numbers; 0 where a class is empty."""
    low = [v for v in values if v <= threshold]
    high = [v for v in values if v > threshold]
    if not low or not high:
        return 0, 1
    return (sum(low) * len(high) - sum(high) * len(low)) ** 2, len(low) * len(high)


@few
@given(values=pixels)
def test_no_threshold_is_better_than_otsus(values: list[int]) -> None:
    threshold = otsu_threshold(np.array(values, np.uint8))
    assert threshold in values
    top, bottom = between(values, threshold)
    for other in range(256):
        other_top, other_bottom = between(values, other)
        # equal up to float64's rounding
        assert top * other_bottom >= other_top * bottom * (1 - 1e-12)


@few
@given(values=pixels, scale=st.sampled_from([1, 257]))
def test_more_bits_split_where_eight_do(values: list[int], scale: int) -> None:
    # 256 bins from the least value to the greatest: with 0 and 255 among them, one bin for each value of a byte
    image = np.array([*values, 0, 255], np.uint8)
    low = image <= otsu_threshold(image)
    words = image.astype(np.uint16) * np.uint16(scale)
    assert np.array_equal(words <= otsu_threshold(words), low)
    for dtype in (np.float32, np.float64):
        floats = image.astype(dtype) * dtype(0.25) - dtype(3)
        assert np.array_equal(floats <= otsu_threshold(floats), low)


def test_two_levels_are_split_between_them() -> None:
    assert otsu_threshold(np.array([[3, 3], [9, 9]], np.uint8)) == 3.0
    assert otsu_threshold(np.array([1.5, 1.5, -2.0], np.float16)) == -2.0


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_one_value_is_its_own_threshold_and_no_cell(dtype: type) -> None:
    image = np.full((5, 7), 41, dtype)
    assert otsu_threshold(image) == 41.0
    assert not otsu_cells(image).any()
    assert (otsu_cells(image, bright=False) == 1).all()


def test_floats_as_far_apart_as_they_go() -> None:
    big = np.finfo(np.float64).max
    assert otsu_threshold(np.array([-big, -big, big])) == -big


def flooded(inside: NDArray[np.bool_]) -> list[set[tuple[int, int]]]:
    left = {(int(y), int(x)) for y, x in np.argwhere(inside)}
    parts = []
    while left:
        edge, part = [left.pop()], set()
        while edge:
            y, x = edge.pop()
            part.add((y, x))
            for at in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if at in left:
                    left.remove(at)
                    edge.append(at)
        parts.append(part)
    return parts


@few
@given(seed=st.integers(0, 2**32 - 1), bright=st.booleans())
def test_components_touch_by_sides_only(seed: int, bright: bool) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (7, 9)).astype(np.uint8)
    instances = otsu_cells(image, bright=bright)
    above = image > otsu_threshold(image)
    parts = [{(int(y), int(x)) for y, x in np.argwhere(instances == i)} for i in range(1, instances.max() + 1)]
    assert instances.dtype == np.int32
    assert sorted(map(sorted, parts)) == sorted(map(sorted, flooded(above if bright else ~above)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_a_blur_reaches_from_zero_to_one(dtype: type) -> None:
    image = np.random.default_rng(0).integers(0, 200, (3, 20, 24)).astype(dtype)
    probability = blurred(image)
    assert (probability.shape, probability.dtype) == (image.shape, np.float32)
    assert (probability.min(axis=(1, 2)) == 0).all()
    assert (probability.max(axis=(1, 2)) == 1).all()
    for slice_, alone in zip(probability, image, strict=True):
        assert np.array_equal(slice_, blurred(alone))


def test_a_blur_is_scipys_with_the_edge_mirrored() -> None:
    image = np.random.default_rng(1).random((16, 18))
    blur = ndimage.gaussian_filter(np.pad(image, 12, mode="reflect"), 1.5)[12:-12, 12:-12]
    expected = (blur - blur.min()) / (blur.max() - blur.min())
    np.testing.assert_allclose(blurred(image, 1.5), expected, atol=1e-6)
    assert np.array_equal(blurred(image, 0) > 0.5, image > (image.min() + image.max()) / 2)


def test_a_slice_of_one_value_says_nothing() -> None:
    assert (blurred(np.full((6, 6), 0.1, np.float32)) == 0.5).all()


@pytest.mark.parametrize(
    ("image", "error", "sentence"),
    [
        ([[1, 2]], TypeError, "image must be a numpy array, got list"),
        (np.zeros((4, 4), np.int64), TypeError, "image must be uint8, uint16 or floating, got int64"),
        (np.zeros((4, 4), bool), TypeError, "image must be uint8, uint16 or floating, got bool"),
        (np.zeros((0, 4)), ValueError, r"image must have pixels, got shape \(0, 4\)"),
        (np.array([[1.0, np.nan]]), ValueError, "image must be finite, got a NaN or an infinity"),
    ],
)
def test_what_is_no_image_is_refused(image: NDArray[np.float64], error: type[Exception], sentence: str) -> None:
    for baseline in (otsu_threshold, otsu_cells, blurred):
        with pytest.raises(error, match=f"^{sentence}$"):
            baseline(image)


def test_axes_and_sigma_are_checked() -> None:
    with pytest.raises(ValueError, match=r"^image must be \[H, W\], got shape \(4,\)$"):
        otsu_cells(np.zeros(4))
    with pytest.raises(ValueError, match=r"^image must be \[H, W\] or \[D, H, W\], got shape \(4,\)$"):
        blurred(np.zeros(4))
    for sigma_px in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^sigma_px must be finite and 0 or more, got"):
            blurred(np.zeros((4, 4)), sigma_px)
