"""Proves what the drawn microscopy promises: labels without flaw, the same bytes again, images too hard for Otsu."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from tests.proof.properties import given, settings, st
from unet_fast.baselines import blurred, otsu_cells, otsu_threshold
from unet_fast.synthetic import cells, membranes

few = settings(derandomize=True, database=None, deadline=None, max_examples=12)

seeds = st.integers(0, 2**32 - 1)
SEEDS = range(6)


def best_iou(truth: NDArray[np.int32], found: NDArray[np.int32]) -> float:
    """Mean over the true cells of the best intersection over union with any of the found."""
    shared = np.zeros((truth.max() + 1, found.max() + 1))
    np.add.at(shared, (truth, found), 1)
    union = shared.sum(1, keepdims=True) + shared.sum(0, keepdims=True) - shared
    return float((shared / union)[1:, 1:].max(axis=1, initial=0).mean())


def touching(instances: NDArray[np.int32]) -> set[tuple[int, int]]:
    pairs = set()
    for a, b in ((instances[1:], instances[:-1]), (instances[:, 1:], instances[:, :-1])):
        meet = (a != b) & (a > 0) & (b > 0)
        pairs |= set(zip(np.minimum(a, b)[meet].tolist(), np.maximum(a, b)[meet].tolist(), strict=True))
    return pairs


@few
@given(seed=seeds, size=st.integers(32, 200), radius_px=st.sampled_from([(11.0, 17.0), (6.0, 9.0), (12.0, 12.0)]))
def test_every_cell_is_one_piece_and_no_sliver(seed: int, size: int, radius_px: tuple[float, float]) -> None:
    image, instances = cells(size, seed=seed, radius_px=radius_px)
    assert (image.shape, image.dtype) == ((size, size), np.uint8)
    assert (instances.shape, instances.dtype) == ((size, size), np.int32)
    n = int(instances.max())
    assert n >= 1
    assert np.array_equal(np.unique(instances[instances > 0]), np.arange(1, n + 1))
    assert np.bincount(instances.ravel())[1:].min() >= np.pi * radius_px[0] ** 2 / 3
    for cell in range(1, n + 1):
        assert ndimage.label(instances == cell)[1] == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_cells_touch_and_otsu_does_not_part_them(seed: int) -> None:
    image, instances = cells(seed=seed)
    assert 25 <= instances.max() <= 45
    assert len(touching(instances)) >= 20
    assert best_iou(instances, otsu_cells(image)) < 0.6
    # the yardstick itself can say yes
    assert best_iou(instances, instances) == 1.0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seam_is_darker_than_what_it_parts(seed: int) -> None:
    image, instances = cells(seed=seed)
    blur = ndimage.gaussian_filter(image.astype(np.float64), 0.7)
    bottom, top = (filter_(instances, 3) for filter_ in (ndimage.minimum_filter, ndimage.maximum_filter))
    darker = 0
    pairs = touching(instances)
    for a, b in pairs:
        # of the 3 x 3 around: these two cells only
        seam = (bottom == a) & (top == b) & np.isin(instances, (a, b))
        near = ndimage.distance_transform_edt(~seam) if seam.any() else np.full(seam.shape, np.inf)
        inside = [blur[(instances == cell) & (near >= 4) & (near < 7)] for cell in (a, b)]
        if not seam.any() or min(map(len, inside)) == 0:
            continue
        darker += blur[seam].mean() < 0.93 * min(part.mean() for part in inside)
    assert darker >= 0.85 * len(pairs)


@pytest.mark.parametrize("seed", SEEDS)
def test_light_falls_off_further_than_cells_stand_out(seed: int) -> None:
    image, instances = cells(seed=seed)
    smooth = ndimage.gaussian_filter(image.astype(np.float64), 2)
    assert np.quantile(smooth[instances == 0], 0.99) > np.quantile(smooth[instances > 0], 0.05)


def test_as_many_cells_as_are_asked_for_at_most() -> None:
    for wanted in (1, 5, 400):
        assert 1 <= cells(96, seed=3, cells=wanted)[1].max() <= wanted


@few
@given(seed=seeds, shape=st.tuples(st.integers(1, 3), st.integers(32, 90), st.integers(32, 90)))
def test_a_fifth_is_membrane(seed: int, shape: tuple[int, int, int]) -> None:
    stack, labels = membranes(shape, seed=seed)
    assert (stack.shape, stack.dtype) == (shape, np.uint8)
    assert (labels.shape, labels.dtype) == (shape, np.uint8)
    assert set(np.unique(labels)) == {0, 255}
    assert 0.17 <= (labels == 0).mean() <= 0.23


@pytest.mark.parametrize("seed", [0, 1])
def test_slices_resemble_their_neighbours_most(seed: int) -> None:
    stack, labels = membranes((6, 192, 192), seed=seed)
    mean = {}
    for step in (1, 4):
        mean[step] = np.mean([(a == b).mean() for a, b in zip(labels, labels[step:], strict=False)])
    assert mean[1] > 0.82
    assert mean[1] > mean[4] + 0.03
    assert not np.array_equal(stack[0], stack[1])


@pytest.mark.parametrize("seed", [0, 1])
def test_membranes_are_dark_but_not_alone(seed: int) -> None:
    stack, labels = membranes((2, 256, 256), seed=seed)
    cell = labels == 255
    assert stack[cell].mean() > stack[~cell].mean() + 30
    # a threshold takes organelles for membranes and misses faded ones; a blur does no better
    for found in (stack > otsu_threshold(stack), blurred(stack) > 0.5):
        share_lost = (cell & ~found).sum() / (~found).sum()
        share_missed = (~cell & found).sum() / (~cell).sum()
        assert share_lost > 0.05 or share_missed > 0.1
        assert share_lost + share_missed < 1


def test_the_same_seed_gives_the_same_bytes() -> None:
    drawn: list[list[NDArray[Any]]] = [
        [*cells(64, seed=seed), *membranes((2, 40, 48), seed=seed)] for seed in (7, 7, 8)
    ]
    for first, again, other in zip(*drawn, strict=True):
        assert first.tobytes() == again.tobytes()
        assert first.tobytes() != other.tobytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"size": 31}, "size must be 32 or more, got 31"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"cells": 0}, "cells must be 1 or more, got 0"),
        ({"radius_px": (9.0, 8.0)}, r"radius_px must be 4 <= low <= high <= 128, got \(9.0, 8.0\)"),
        ({"radius_px": (3.0, 8.0)}, r"radius_px must be 4 <= low <= high <= 128, got \(3.0, 8.0\)"),
        ({"radius_px": (9.0, float("nan"))}, r"radius_px must be 4 <= low <= high <= 128, got \(9.0, nan\)"),
        ({"radius_px": (9.0,)}, r"radius_px must be \(low, high\), got \(9.0,\)"),
    ],
)
def test_cells_names_what_it_cannot_draw(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        cells(**{"seed": 0, **arguments})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"shape": (256, 256)}, r"shape must be \(slices, rows, columns\), got \(256, 256\)"),
        ({"shape": (0, 256, 256)}, r"shape\[0\] must be 1 or more, got 0"),
        ({"shape": (1, 256, 16)}, r"shape\[2\] must be 32 or more, got 16"),
        ({"seed": -3}, "seed must be 0 or more, got -3"),
    ],
)
def test_membranes_names_what_it_cannot_draw(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        membranes(**{"seed": 0, **arguments})


@pytest.mark.parametrize("seed", [1.5, True, "1"])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    for draw in (cells, membranes):
        with pytest.raises(TypeError, match=r"^seed must be a whole number, got"):
            draw(seed=seed)
