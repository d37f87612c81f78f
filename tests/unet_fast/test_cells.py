"""Proves that find_cells undoes the gap that training cuts: what it gives back, and that it takes nothing; and that
bands of rows give the same cells as the whole plane.
"""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

import unet_kernels as uk
from tests.proof.properties import given, settings, st
from unet_fast.cells import Cells, find_cells

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


# ---- in bands of rows


class _Asked:
    """Rows of labels, and which of them were asked for."""

    def __init__(self, labels: NDArray[Any]) -> None:
        self.labels = labels
        self.asked: list[tuple[int, int]] = []

    def __call__(self, first: int, stop: int) -> NDArray[Any]:
        assert 0 <= first < stop <= len(self.labels)
        self.asked.append((first, stop))
        return self.labels[first:stop]


@st.composite
def class_labels(draw: Any) -> NDArray[np.uint8]:
    """Classes in pieces of all sizes: noise, blobs that touch, stripes."""
    h, w, classes = draw(st.integers(1, 40)), draw(st.integers(1, 30)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    noise = rng.normal(size=(classes + 1, h, w))
    smooth = ndimage.gaussian_filter(noise, (0, *rng.choice([0, 0.6, 1, 2, 4], 2)))
    # some background: or else everything is one piece
    smooth[0] += draw(st.sampled_from([0, 0.1, 0.5, -5])) * smooth.std()
    return smooth.argmax(0).astype(np.uint8)


@given(
    labels=class_labels(),
    least=st.sampled_from([1, 1, 2, 5, 30]),
    band=st.integers(1, 45),
    cuts=st.lists(st.integers(0, 39), max_size=8),
    shuffled=st.booleans(),
)
@settings(ordinary, max_examples=300)
def test_bands_and_cuts_do_not_matter(
    labels: NDArray[np.uint8], least: int, band: int, cuts: list[int], shuffled: bool
) -> None:
    height, width = labels.shape
    whole = find_cells(labels, min_pixels=least)
    asked = _Asked(labels)
    cells = Cells(asked, height, width, min_pixels=least, band=band)
    assert cells.count == whole.max()
    edges = sorted({0, height, *(cut for cut in cuts if cut < height)})
    parts = list(itertools.pairwise(edges))
    order = np.random.default_rng(band).permutation(len(parts)) if shuffled else range(len(parts))
    found = np.full(labels.shape, -1, np.int32)
    for number in order:
        first, stop = parts[number]
        ids = cells.rows(first, stop)
        assert (ids.dtype, ids.shape) == (np.int32, (stop - first, width))
        found[first:stop] = ids
    np.testing.assert_array_equal(found, whole)
    assert max(stop - first for first, stop in asked.asked) <= band
    if not shuffled:
        # every row twice: to learn, and to number
        rows = [row for first, stop in asked.asked for row in range(first, stop)]
        assert sorted(rows) == sorted(2 * list(range(height)))


def _spiral(side: int) -> NDArray[np.uint8]:
    """A line that winds inwards, with a gap of one pixel: any band of rows sees nothing but pieces of it."""
    labels = np.zeros((side, side), np.uint8)
    y, x, dy, dx = 0, 0, 0, 1
    labels[0, 0] = 1
    while True:
        for _ in range(2):
            ahead = y + 2 * dy, x + 2 * dx
            inside = 0 <= y + dy < side and 0 <= x + dx < side
            free = not (0 <= ahead[0] < side and 0 <= ahead[1] < side) or labels[ahead] == 0
            if inside and free and labels[y + dy, x + dx] == 0:
                y, x = y + dy, x + dx
                labels[y, x] = 1
                break
            dy, dx = dx, -dy
        else:
            return labels


def _comb(height: int, teeth: int) -> NDArray[np.uint8]:
    """Teeth that hang together in the last row alone."""
    labels = np.zeros((height, 2 * teeth - 1), np.uint8)
    labels[:, ::2] = 1
    labels[-1] = 1
    return labels


@pytest.mark.parametrize("band", [1, 2, 3, 7, 64])
def test_what_joins_only_far_below_is_one_cell(band: int) -> None:
    spiral, comb = _spiral(41), _comb(40, 9)
    assert ndimage.label(spiral)[1] == ndimage.label(comb)[1] == 1
    assert (spiral > 0).sum() > 41 * 41 // 2 - 41
    # two combs whose teeth lie between each other: each is one cell, though the other's last row is far away
    both = np.zeros((43, 25), np.uint8)
    both[:41, ::4], both[40] = 1, 1
    both[2:, 2::4] = np.where(both[2:, 2::4] == 0, 2, both[2:, 2::4])
    both[42] = 2
    # and arches, one inside the other, which never meet
    arches = np.zeros((40, 41), np.uint8)
    for n in range(0, 20, 2):
        arches[n, n : 41 - n] = 1
        arches[n:, n] = arches[n:, 40 - n] = 1
    for labels, count in ((spiral, 1), (comb, 1), (arches, 10), (np.flipud(comb), 1), (np.flipud(arches), 10)):
        for least in (1, int((labels > 0).sum() / count)):
            cells = Cells(_Asked(labels), *labels.shape, min_pixels=least, band=band)
            if least == 1:
                assert cells.count == count
            found = np.concatenate([cells.rows(row, row + 1) for row in range(len(labels))])
            np.testing.assert_array_equal(found, find_cells(labels, min_pixels=least))
    # too small by one pixel, though no band knows
    for labels in (spiral, comb):
        pixels = int((labels > 0).sum())
        for least, count in ((pixels, 1), (pixels + 1, 0)):
            cells = Cells(_Asked(labels), *labels.shape, min_pixels=least, band=band)
            assert cells.count == count
            assert (cells.rows(0, len(labels)) > 0).sum() == pixels * count
    cells = Cells(_Asked(both), *both.shape, band=band)
    np.testing.assert_array_equal(cells.rows(0, 43), find_cells(both))
    assert cells.count == find_cells(both).max()


def test_cells_of_nothing_and_of_everything() -> None:
    for value, count in ((0, 0), (3, 1)):
        labels = np.full((10, 7), value, np.uint8)
        cells = Cells(_Asked(labels), 10, 7, band=3)
        assert cells.count == count
        np.testing.assert_array_equal(cells.rows(2, 9), np.full((7, 7), count))


def test_a_gap_that_lies_between_two_bands_is_given_back() -> None:
    labels = np.zeros((12, 5), np.uint8)
    labels[:5], labels[7:] = 1, 1
    for band in range(1, 13):
        cells = Cells(_Asked(labels), 12, 5, band=band)
        ids = np.concatenate([cells.rows(row, row + 1) for row in range(12)])
        assert ids[:, 0].tolist() == [1] * 6 + [2] * 6


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (0, 4, 4), (2, 0, 3), (3, 4, 0)])
def test_no_pixels_have_no_cells(shape: tuple[int, ...]) -> None:
    found = find_cells(np.zeros(shape, np.uint8))
    assert (found.shape, found.dtype) == (shape, np.int32)


@pytest.mark.parametrize("shape", [(), (4,), (1, 1, 4, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"labels must be \[H, W\] or \[D, H, W\], got shape \["):
        find_cells(np.zeros(shape, np.uint8))
