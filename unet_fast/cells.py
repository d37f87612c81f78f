"""From class labels to cells: connected components, and the gap between touching cells given back to them."""

from typing import Any

import numpy as np
import torch
from scipy import ndimage

import unet_kernels

__all__ = ["find_cells"]


def find_cells(labels: np.ndarray[Any, Any], *, min_pixels: int = 1) -> np.ndarray[Any, Any]:
    """Instance ids of predicted class labels, slice by slice: int32, ids 1 .. n in each slice.

    A cell is a 4-connected component of one class. Training cuts a gap between touching cells
    (`unet_kernels.cut_gap`); the opposite is done here: cells grow by one pixel where, and only where, that makes them
    touch another cell's new pixel, so that `cut_gap` of what comes out has the foreground that went in (unless
    cells of two classes adjoined there).

    Args:
        labels: [H, W] or [D, H, W], class ids, 0 = background.
        min_pixels: components smaller than this are dropped.

    >>> find_cells(np.array([[1, 1, 0, 0, 1, 0]]))
    array([[1, 1, 1, 2, 2, 0]], dtype=int32)
    """
    stack = labels if labels.ndim == 3 else labels[None]
    found = np.stack([_cells(plane, min_pixels) for plane in stack])
    return found if labels.ndim == 3 else found[0]


def _cells(plane: np.ndarray[Any, Any], min_pixels: int) -> np.ndarray[Any, Any]:
    ids, count = np.zeros(plane.shape, np.int32), 0
    for c in np.unique(plane[plane > 0]):
        here, more = ndimage.label(plane == c)
        ids[here > 0] = here[here > 0] + count
        count += more
    if min_pixels > 1:
        keep = np.bincount(ids.ravel(), minlength=count + 1) >= min_pixels
        keep[0] = False
        ids = (np.cumsum(keep) * keep)[ids].astype(np.int32)
    return _regrown(ids)


def _regrown(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    around = np.pad(ids, 1)
    beside = np.stack([around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]])
    # a pixel beside two cells stays background: whoever took it would touch, and cut, the other's old pixel
    alone = ((beside == 0) | (beside == beside.max(0))).all(0)
    grown = np.where((ids == 0) & alone, beside.max(0), ids)
    touching = unet_kernels.cut_gap(torch.from_numpy(grown)[None])[0].numpy() == 0
    return np.where((ids == 0) & ~touching, 0, grown)
