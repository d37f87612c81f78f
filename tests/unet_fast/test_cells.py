"""Proves that find_cells undoes the gap that training cuts: what it gives back, and that it takes nothing."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

import unet_kernels as uk
from tests.proof.properties import given, settings, st
from unet_fast.cells import find_cells

ordinary = settings(derandomize=True, database=None, deadline=None, max_examples=150)


def cut(instances: NDArray[Any]) -> NDArray[Any]:
    return uk.cut_gap(torch.from_numpy(np.ascontiguousarray(instances))[None])[0].numpy()


@st.composite
def touching_cells(draw: Any) -> NDArray[np.int32]:
    """A Voronoi map of round cells, some of which touch, with pieces of noise if the draw says so."""
    h, w, n = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(0, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        return rng.integers(0, n + 1, (h, w)).astype(np.int32)
    y, x = np.indices((h, w))
    distance = np.stack([np.full((h, w), draw(st.integers(3, 9)) ** 2)] * 2)
    instances, best = np.zeros((h, w), np.int32), distance[0].copy()
    for cell in range(1, n + 1):
        d = (y - rng.integers(h)) ** 2 + (x - rng.integers(w)) ** 2
        instances[d < best] = cell
        best = np.minimum(best, d)
    return instances


@given(instances=touching_cells())
@ordinary
def test_the_cut_of_what_comes_out_is_what_went_in(instances: NDArray[np.int32]) -> None:
    labels = (cut(instances) > 0).astype(np.uint8)
    found = find_cells(labels)
    assert (found.dtype, found.shape) == (np.int32, labels.shape)
    assert np.array_equal(cut(found) > 0, labels > 0)


@given(mask=touching_cells())
@ordinary
def test_any_mask_is_kept_cell_by_cell(mask: NDArray[np.int32]) -> None:
    labels = (mask > 0).astype(np.uint8)
    found, (pieces, count) = find_cells(labels), ndimage.label(labels)
    assert np.array_equal(np.unique(found[found > 0]), np.arange(1, count + 1))
    # the numbering apart, the old pixels of a cell are the component's
    assert np.array_equal(found[labels > 0], pieces[labels > 0])
    grown = (found > 0) & (labels == 0)
    for y, x in np.argwhere(grown):
        beside = [(y + dy, x + dx) for dy, dx in ((1, 0), (-1, 0), (0, 1), (0, -1))]
        inside = [(a, b) for a, b in beside if 0 <= a < labels.shape[0] and 0 <= b < labels.shape[1]]
        assert found[y, x] in {pieces[p] for p in inside}
        assert any(found[p] not in (0, found[y, x]) for p in inside)


def test_touching_cells_come_back_whole() -> None:
    y, x = np.indices((40, 60))
    instances = np.where((y - 20) ** 2 + (x - 22) ** 2 < 144, 1, 0)
    instances[((y - 20) ** 2 + (x - 40) ** 2 < 144) & (x > 30)] = 2
    instances = instances.astype(np.int32)
    found = find_cells(cut(instances))
    # but for the tips of the line along which they touch
    assert ((found > 0) & (instances > 0)).sum() >= (instances > 0).sum() - 4
    assert np.array_equal(found[(found > 0) & (instances > 0)], instances[(found > 0) & (instances > 0)])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([[1, 1, 0, 0, 1, 0]], [[1, 1, 1, 2, 2, 0]]),
        # one pixel between them belongs to neither: whoever had it would cut the other
        ([[1, 0, 1]], [[1, 0, 2]]),
        ([[1, 0], [0, 1]], [[1, 0], [0, 2]]),
        # three pixels: too far to be a gap
        ([[1, 0, 0, 0, 1]], [[1, 0, 0, 0, 2]]),
        ([[0, 0]], [[0, 0]]),
        ([[1]], [[1]]),
        # classes are cells of their own, also side by side
        ([[1, 1, 2, 2, 0, 0, 1]], [[1, 1, 3, 3, 3, 2, 2]]),
        ([[-1, 1, 255, 0]], [[0, 1, 2, 0]]),
    ],
    ids=str,
)
def test_small_maps(labels: list[list[int]], expected: list[list[int]]) -> None:
    assert find_cells(np.array(labels)).tolist() == expected


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, bool])
def test_any_integer_dtype(dtype: Any) -> None:
    labels = np.array([[1, 1, 0, 0, 1, 0]])
    assert np.array_equal(find_cells(labels.astype(dtype)), find_cells(labels))


def test_slices_are_numbered_each_by_itself() -> None:
    rng = np.random.default_rng(0)
    stack = ndimage.gaussian_filter(rng.normal(size=(4, 30, 40)), (0, 2, 2)) > 0.03
    found = find_cells(stack)
    assert found.shape == stack.shape
    for plane, cells in zip(stack, found, strict=True):
        assert np.array_equal(find_cells(plane), cells)
        assert cells.max() == len(np.unique(cells[cells > 0]))


@given(mask=touching_cells(), least=st.integers(1, 40))
@ordinary
def test_small_components_are_dropped_and_the_rest_renumbered(mask: NDArray[np.int32], least: int) -> None:
    labels = (mask > 0).astype(np.uint8)
    pieces, count = ndimage.label(labels)
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)
    large = np.isin(pieces, [i for i in range(1, count + 1) if sizes[i] >= least])
    # as if the small ones had never been there: they neither stay nor make others grow
    assert np.array_equal(find_cells(labels, min_pixels=least), find_cells(large.astype(np.uint8)))
