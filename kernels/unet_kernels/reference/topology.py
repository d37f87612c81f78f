"""What the ISBI 2012 challenge measures, in numpy and plain loops: docs/mathematics.md, section 7.

Written to be read, one slice [H, W] at a time; the C++ of `kernels/native/src/homotopic_warp.cpp` and `rand_sums.cpp`
must agree with every number here. Cell is 4-connected, background 8-connected. Sources: Jain et al., "Boundary
learning by optimization with topological constraints", CVPR 2010 (warping); Arganda-Carreras et al., Frontiers in
Neuroanatomy 9:142, 2015 (the challenge and its scores); Vincent and Soille, PAMI 13:583, 1991 (watershed).
"""

import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["KINDS", "SIMPLE_RINGS", "homotopic_warp", "mismatch_kinds", "rand_sums", "ring_of", "watershed_cells"]

KINDS = ("none", "split", "merge", "hole_addition", "hole_deletion", "object_addition", "object_deletion")

Bits = NDArray[np.bool_]

# the 8 neighbours in a circle; the ring of a pixel is a number whose bit i is the value of neighbour i
_CIRCLE = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))
_EDGES = ((-1, 0), (0, 1), (1, 0), (0, -1))


def _parts(places: set[tuple[int, int]], steps: tuple[tuple[int, int], ...]) -> Iterator[set[tuple[int, int]]]:
    """The connected parts of a set of places."""
    places = set(places)
    while places:
        todo = [places.pop()]
        part = set(todo)
        while todo:
            y, x = todo.pop()
            near = {(y + dy, x + dx) for dy, dx in steps} & places
            places -= near
            part |= near
            todo += near
        yield part


def _is_simple(ring: int) -> bool:
    """Whether flipping a pixel with this ring keeps the topology of cell (4-connected) and background (8-connected).

    It does if the cell among its neighbours has one 4-connected part that shares an edge with it, and the background
    among them one 8-connected part.
    """
    cell = {place for i, place in enumerate(_CIRCLE) if ring >> i & 1}
    beside = [part for part in _parts(cell, _EDGES) if part & set(_EDGES)]
    return len(beside) == 1 and len(list(_parts(set(_CIRCLE) - cell, _CIRCLE))) == 1


# 116 of 256
SIMPLE_RINGS = tuple(_is_simple(ring) for ring in range(256))


def ring_of(padded: Bits, y: int, x: int) -> int:
    return sum(1 << i for i, (dy, dx) in enumerate(_CIRCLE) if padded[y + dy, x + dx])


def homotopic_warp(prediction: NDArray[np.float64], truth: Bits, threshold: float, counted: Bits) -> Bits:
    """truth, warped towards prediction > threshold by flips of simple points among the counted pixels.

    The mismatches are visited from the strongest disagreement |prediction - threshold| to the weakest (float32),
    column by column among equals; each that is simple when its turn comes is flipped. Passes are made until one flips
    nothing. Beyond the image lies background. Predictions come as float64: a threshold is not rounded to float32.
    """
    warped = np.pad(truth, 1)
    strength = np.pad(np.abs(prediction - threshold).astype(np.float32), 1)
    x, y = np.nonzero(((warped != np.pad(prediction > threshold, 1)) & np.pad(counted, 1)).T)
    order = np.argsort(-strength[y, x], kind="stable")
    mismatches = list(zip(y[order].tolist(), x[order].tolist(), strict=True))
    while True:
        left = []
        for y, x in mismatches:
            if SIMPLE_RINGS[ring_of(warped, y, x)]:
                warped[y, x] = not warped[y, x]
            else:
                left.append((y, x))
        if len(left) == len(mismatches):
            return warped[1:-1, 1:-1]
        mismatches = left


def mismatch_kinds(warped: Bits, predicted: Bits, counted: Bits, radius: int) -> NDArray[np.uint8]:
    """What each mismatch of the warped truth is, as an index into KINDS, uint8; 0 elsewhere.

    With U the set of ids (0 = background) of the up to 8 neighbours among the 4-connected components of `warped`:

        U = {0} or empty      cell: object deletion                   background: object addition
        U = {a}, a > 0        cell: hole addition                     background: hole deletion
        |U| = 2               cell: split if its removal leaves more  background: hole addition
                              than two ids among its neighbours, by
                              the components within `radius` rows
                              and columns; else hole deletion
        |U| > 2               cell: split                             background: merge
    """
    kinds = np.zeros(warped.shape, np.uint8)
    ids = ndimage.label(warped)[0]
    for y, x in np.argwhere((warped != predicted) & counted).tolist():
        cell, near = warped[y, x], _ids_around(ids, y, x)
        if near <= {0}:
            kind = "object_deletion" if cell else "object_addition"
        elif len(near) == 1:
            kind = "hole_addition" if cell else "hole_deletion"
        elif len(near) > 2:
            kind = "split" if cell else "merge"
        elif not cell:
            kind = "hole_addition"
        else:
            top, left = max(0, y - radius), max(0, x - radius)
            window = warped[top : y + radius + 1, left : x + radius + 1].copy()
            window[y - top, x - left] = False
            near = _ids_around(ndimage.label(window)[0], y - top, x - left)
            kind = "split" if len(near) > 2 else "hole_deletion"
        kinds[y, x] = KINDS.index(kind)
    return kinds


def _ids_around(ids: NDArray[Any], y: int, x: int) -> set[int]:
    around = ids[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].ravel().tolist()
    around.remove(ids[y, x])
    return set(around)


def watershed_cells(mask: Bits) -> NDArray[np.int32]:
    """The 4-connected components of mask, grown over the rest until they meet at dams one pixel wide (0).

    Vincent and Soille's flooding of a two-valued image with 4 neighbours, in the order that the challenge's scores
    were made with: the shore column by column, then first come, first served. A pixel takes the basin that its
    neighbours have; where they have two, or none but dams, it is a dam. Without a component all is one basin, 1.
    """
    basins, found = ndimage.label(mask)
    if not found:
        return np.ones(mask.shape, np.int32)
    height, width = mask.shape
    dry, queued = -1, -2
    basins[~mask] = dry
    shore = ndimage.binary_dilation(mask) & ~mask
    queue = deque((y, x) for x, y in np.argwhere(shore.T).tolist())
    basins[shore] = queued
    while queue:
        y, x = queue.popleft()
        met = set()
        for dy, dx in _EDGES:
            v, u = y + dy, x + dx
            if not (0 <= v < height and 0 <= u < width):
                continue
            if basins[v, u] > 0:
                met.add(int(basins[v, u]))
            elif basins[v, u] == dry:
                basins[v, u] = queued
                queue.append((v, u))
        basins[y, x] = met.pop() if len(met) == 1 else 0
    return basins.astype(np.int32)


def rand_sums(truth: NDArray[np.int32], segments: NDArray[np.int32]) -> tuple[list[int], list[float]]:
    """Sums over the pixels of the truth's cells (ids > 0), with each of their pixels in segment 0 a segment by itself.

    With n_ij the pixels of cell i in segment j, t_i and s_j their sums: ([n, sum t_i^2, sum s_j^2, sum n_ij^2],
    [sum t_i log t_i, sum s_j log s_j, sum n_ij log n_ij]).
    """
    inside = truth > 0
    cells, lone = truth[inside], int((segments[inside] == 0).sum())
    table: dict[tuple[int, int], int] = {}
    for pair in zip(cells.tolist(), segments[inside].tolist(), strict=True):
        table[pair] = table.get(pair, 0) + 1
    of_cell: dict[int, int] = {}
    of_segment: dict[int, int] = {}
    for (i, j), n in table.items():
        of_cell[i] = of_cell.get(i, 0) + n
        if j > 0:
            of_segment[j] = of_segment.get(j, 0) + n
    both = [n for (_, j), n in table.items() if j > 0]

    def squares(counts: list[int]) -> int:
        return sum(n * n for n in counts)

    def logs(counts: list[int]) -> float:
        return math.fsum(n * math.log(n) for n in counts)

    t, s = list(of_cell.values()), list(of_segment.values())
    # n log n of a segment of one pixel is 0
    return [cells.size, squares(t), squares(s) + lone, squares(both) + lone], [logs(t), logs(s), logs(both)]
