"""Grey values to numbers from 0 to 1: each plane by itself, whatever its dtype, exposure and contrast."""

import json
import re
from typing import Any

import numpy as np
import pytest

from tests.proof.properties import given, st
from unet_fast.errors import BadInput
from unet_fast.normalisation import KINDS, Normalisation

DTYPES = ["u1", "u2", "u4", "i2", "i4", "f4", "f8"]


def _image(shape: tuple[int, ...], dtype: Any = "f8", seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 120, shape).astype(dtype)


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(*[st.integers(1, 4)] * 2, *[st.integers(1, 9)] * 2),
    low=st.floats(0, 50),
    high=st.floats(50.5, 100),
)
def test_percentiles_of_each_plane_become_0_and_1(dtype: str, shape: tuple[int, ...], low: float, high: float) -> None:
    image = _image(shape, dtype)
    found = Normalisation("percentile", low, high)(image)
    assert found.dtype == np.float32
    assert found.shape == image.shape
    for plane, before in zip(found.reshape(-1, *shape[2:]), image.reshape(-1, *shape[2:]), strict=True):
        a, b = np.percentile(before.astype(np.float64), (low, high))
        wanted = np.clip((before - a) / (b - a), 0, 1) if b > a else np.zeros_like(plane)
        np.testing.assert_allclose(plane, wanted, atol=1e-4)


@given(gain=st.integers(1, 500), offset=st.integers(0, 1000))
def test_exposure_and_contrast_do_not_matter(gain: int, offset: int) -> None:
    image = _image((2, 8, 8), np.int64)
    changed = (image * gain + offset).astype(np.uint16)
    np.testing.assert_allclose(Normalisation()(changed), Normalisation()(image), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["percentile", "range"])
def test_one_grey_value_everywhere_is_no_division_by_zero(dtype: str, kind: str) -> None:
    found = Normalisation(kind, 0, 100)(np.full((2, 5, 6), 100, dtype))
    np.testing.assert_array_equal(found, 0 if kind == "percentile" else 1)


def test_one_step_of_sixteen_bits_is_kept() -> None:
    image = np.full((4, 4), 60_000, np.uint16)
    image[0, 0], image[3, 3] = 59_999, 60_001
    np.testing.assert_allclose(np.unique(Normalisation("percentile", 0, 100)(image)), [0, 0.5, 1])


def test_a_range_is_the_same_for_every_image() -> None:
    normalise = Normalisation("range", 100, 300)
    np.testing.assert_allclose(normalise(np.array([[0, 100, 200, 300, 65535]], np.uint16)), [[0, 0, 0.5, 1, 1]])
    # unsigned grey values below `low` do not wrap around
    np.testing.assert_allclose(normalise(np.array([[7]], np.uint8)), [[0]])


def test_none_leaves_grey_values_alone() -> None:
    image = _image((3, 4, 5), np.uint16)
    found = Normalisation("none")(image)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, image)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_plane(kind: str) -> None:
    image = _image((3, 5, 6), np.float32)
    image[1, 2, 3] = np.nan
    found = Normalisation(kind, 0, 100)(image)
    assert np.isnan(found[1, 2, 3])
    assert not np.isnan(found[[0, 2]]).any()


def test_the_image_is_left_alone() -> None:
    image = _image((4, 4), np.float32)
    for kind in KINDS:
        before = image.copy()
        assert not np.shares_memory(Normalisation(kind, 0, 100)(image), image)
        np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("zscore",), "normalisation must be one of percentile, range, none, got 'zscore'"),
        (("percentile", 50, 50), "normalisation must have low below high, got low 50 and high 50"),
        (("range", 3, 2), "normalisation must have low below high, got low 3 and high 2"),
        (("percentile", -1, 50), "percentiles must lie between 0 and 100, got -1 and 50"),
        (("percentile", 1, 101), "percentiles must lie between 0 and 100, got 1 and 101"),
        (("range", float("nan"), 1), "normalisation must have finite low and high, got low nan and high 1"),
        (("range", 0, float("inf")), "normalisation must have finite low and high, got low 0 and high inf"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: tuple[Any, ...], said: str) -> None:
    with pytest.raises(BadInput, match=re.escape(said)):
        Normalisation(*settings)


@given(kind=st.sampled_from(KINDS), low=st.floats(0, 40), high=st.floats(41, 100))
def test_it_is_kept_as_json(kind: str, low: float, high: float) -> None:
    normalise = Normalisation(kind, low, high)
    assert Normalisation(**json.loads(json.dumps(normalise.as_dict()))) == normalise


def test_a_few_bright_pixels_on_black_are_not_lost() -> None:
    image = np.zeros((1, 120, 120), np.uint8)
    image[0, 50:53, 50:56] = 200
    out = Normalisation()(image)
    assert out.max() == 1
    assert (out > 0).sum() == 18
