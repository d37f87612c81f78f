"""From class labels to cells: connected components, and the gap between touching cells given back to them.

An image is looked at in bands of rows, twice: once to learn which pieces belong together, once to number them; the
labels need not lie in memory.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import ndimage, sparse

import unet_kernels

__all__ = ["Cells", "find_cells"]

Array = np.ndarray[Any, Any]

# pixels of a band
_BAND = 2**20
# growing back looks so many rows further
_CONTEXT = 2


def find_cells(labels: Array, *, min_pixels: int = 1) -> Array:
    """Instance ids of predicted class labels, slice by slice: int32, ids 1 .. n in each slice.

    A cell is a 4-connected component of one class. Training cuts a gap between touching cells
    (`unet_kernels.cut_gap`); the opposite is done here: cells grow by one pixel where, and only where, that makes them
    touch another cell's new pixel, so that `cut_gap` of what comes out has the foreground that went in (unless
    cells of two classes adjoined there).

    Args:
        labels: [H, W] or [D, H, W], class ids, 0 = background.
        min_pixels: components smaller than this are dropped.

    Raises:
        ValueError: labels of another number of dimensions.

    >>> find_cells(np.array([[1, 1, 0, 0, 1, 0]]))
    array([[1, 1, 1, 2, 2, 0]], dtype=int32)
    """
    if labels.ndim not in (2, 3):
        raise ValueError(f"labels must be [H, W] or [D, H, W], got shape {list(labels.shape)}")
    if not labels.size:
        return np.zeros(labels.shape, np.int32)
    stack = labels if labels.ndim == 3 else labels[None]
    found = np.stack([_of_plane(plane, min_pixels) for plane in stack])
    return found if labels.ndim == 3 else found[0]


def _of_plane(plane: Array, min_pixels: int) -> Array:
    height, width = plane.shape
    return Cells(lambda first, stop: plane[first:stop], height, width, min_pixels=min_pixels).rows(0, height)


class Cells:
    """The cells of one plane of class labels that is read in bands of rows; see `find_cells`.

    Args:
        labels: gives rows [first, stop) of the labels, as often as it is asked.
        height, width: of the plane.
        min_pixels: components smaller than this are dropped.
        band: rows that are looked at together; None: some million pixels.
    """

    def __init__(
        self,
        labels: Callable[[int, int], Array],
        height: int,
        width: int,
        *,
        min_pixels: int = 1,
        band: int | None = None,
    ) -> None:
        self.labels, self.height = labels, height
        self.band = min(height, band or max(64, _BAND // width))
        # the first piece of each band; of each piece its class and size, and which pieces touch across two bands
        self._first: list[int] = [0]
        classes, sizes, pairs = [], [], []
        above: tuple[Array, Array] | None = None
        for start in range(0, height, self.band):
            values = labels(start, min(height, start + self.band))
            pieces, kinds = _pieces(values)
            pieces = np.where(pieces > 0, pieces + self._first[-1], 0)
            if above is not None:
                same = (above[0] == values[0]) & (values[0] > 0)
                pairs.append(np.unique(np.stack([above[1][same], pieces[0][same]]), axis=1))
            above = values[-1], pieces[-1]
            sizes.append(np.bincount(pieces[pieces > 0] - self._first[-1], minlength=len(kinds) + 1)[1:])
            classes.append(kinds)
            self._first.append(self._first[-1] + len(kinds))
        self._number = _numbered(np.concatenate(classes), np.concatenate(sizes), pairs, min_pixels)
        self.count = int(self._number.max(initial=0))
        self._kept: dict[int, Array] = {}

    def rows(self, first: int, stop: int) -> Array:
        """Ids of rows [first, stop), int32."""
        low, high = max(0, first - _CONTEXT), min(self.height, stop + _CONTEXT)
        bands = range(low // self.band, -(-high // self.band))
        self._kept = {number: self._kept[number] for number in bands if number in self._kept}
        for number in bands:
            if number not in self._kept:
                self._kept[number] = self._ids(number)
        ids = np.concatenate([self._kept[number] for number in bands]) if len(bands) > 1 else self._kept[bands[0]]
        start = bands[0] * self.band
        if stop == self.height:
            # the last rows: nothing more is asked for, as a rule
            self._kept = {}
        return _regrown(ids[low - start : high - start])[first - low : stop - low]

    def _ids(self, number: int) -> Array:
        start = number * self.band
        pieces, _ = _pieces(self.labels(start, min(self.height, start + self.band)))
        return self._number[np.where(pieces > 0, pieces + self._first[number], 0)]


def _pieces(values: Array) -> tuple[Array, Array]:
    """(4-connected components of each class, numbered from 1 on; the class of each)."""
    found, kinds = np.zeros(values.shape, np.int32), np.zeros(0, np.int64)
    for kind in np.unique(values[values > 0]):
        here, more = ndimage.label(values == kind)
        found[here > 0] = here[here > 0] + len(kinds)
        kinds = np.concatenate([kinds, np.full(more, kind, np.int64)])
    return found, kinds


def _numbered(classes: Array, sizes: Array, pairs: list[Array], min_pixels: int) -> Array:
    """The id of each piece, 0 for background and what is too small: by class, and by the first pixel."""
    count = len(classes)
    if not count:
        return np.zeros(1, np.int32)
    joined = np.concatenate(pairs, axis=1) - 1 if pairs else np.zeros((2, 0), np.int64)
    graph = sparse.coo_array((np.ones(joined.shape[1], np.int8), (joined[0], joined[1])), shape=(count, count))
    _, whole = sparse.csgraph.connected_components(graph, directed=False)
    found, first = np.unique(whole, return_index=True)
    pixels = np.bincount(whole, weights=sizes, minlength=len(found))
    order = np.lexsort((first, classes[first]))
    order = order[pixels[order] >= min_pixels]
    number = np.zeros(len(found), np.int32)
    number[order] = np.arange(1, len(order) + 1)
    return np.concatenate([np.zeros(1, np.int32), number[whole]])


def _regrown(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    around = np.pad(ids, 1)
    beside = np.stack([around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]])
    # a pixel beside two cells stays background: whoever took it would touch, and cut, the other's old pixel
    alone = ((beside == 0) | (beside == beside.max(0))).all(0)
    grown = np.where((ids == 0) & alone, beside.max(0), ids)
    touching = unet_kernels.cut_gap(torch.from_numpy(grown)[None])[0].numpy() == 0
    return np.where((ids == 0) & ~touching, 0, grown)
