"""Versions of an image whose probabilities are averaged: mirrored and turned ("d4"), or rotated ("rot7").

A version is an image of its own, with its own pooling grid from its own first pixel on, and goes on by reflection
beyond its edges. What it says of a tile is read from the nearest place on that grid, so that an average, too, does not
depend on how the image is cut.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .greys import Greys
from .tiling import Cutter, Tile, reflect

__all__ = ["Version", "versions_of"]

Array = np.ndarray[Any, Any]

# rows that are interpolated together: coordinates take a hundred bytes a pixel
_STRIP = 64
# of coordinates, in pixels
_ROUNDING = 1e-6


class Version(Protocol):
    """One way to look at the image."""

    def window(self, greys: Greys, tile: Tile, cutter: Cutter, sides: tuple[int, int]) -> Array:
        """What goes into the net for a tile, [C, rows, columns]; `sides` are the plan's tile_in."""

    def back(self, output: Tensor, tile: Tile, cutter: Cutter) -> Tensor:
        """What the net says of the tile's own pixels, [K, rows, columns], of its output for that window."""


def versions_of(tta: str, shape: tuple[int, int]) -> list[Version]:
    """All versions of an image of so many rows and columns; the first is the image itself."""
    if tta == "d4":
        ways = [(flip_rows, flip_columns) for flip_rows in (False, True) for flip_columns in (False, True)]
        return [Turned(shape, *way, swapped) for swapped in (False, True) for way in ways]
    if tta == "rot7":
        return [Rotated(shape, 360 * k / 7) for k in range(7)]
    return [Turned(shape, False, False, False)]


@dataclass(frozen=True, slots=True)
class Turned:
    """The image with rows or columns in reverse order, and the two swapped: a symmetry of the square."""

    shape: tuple[int, int]
    flip_rows: bool
    flip_columns: bool
    swapped: bool

    def window(self, greys: Greys, tile: Tile, cutter: Cutter, sides: tuple[int, int]) -> Array:
        spans = zip(self._spans(tile), self.shape, (self.flip_rows, self.flip_columns), sides, strict=True)
        rows, columns = (self._read(start, count, n, flip, side, cutter) for (start, count), n, flip, side in spans)
        pixels = gather(greys, tile.z, rows, columns)
        return pixels.swapaxes(1, 2) if self.swapped else pixels

    def back(self, output: Tensor, tile: Tile, cutter: Cutter) -> Tensor:
        output = output.transpose(1, 2) if self.swapped else output
        for axis, ((start, count), flip) in enumerate(
            zip(self._spans(tile), (self.flip_rows, self.flip_columns), strict=True), 1
        ):
            # padded nets say something of the halo too
            first = start % cutter.step + (cutter.halo if cutter.same else 0)
            output = output.narrow(axis, first, count)
            output = output.flip(axis) if flip else output
        return output

    def _spans(self, tile: Tile) -> Iterator[tuple[int, int]]:
        """First row of the tile in this version, and how many; columns likewise."""
        spans = ((tile.row, tile.rows, self.flip_rows), (tile.column, tile.columns, self.flip_columns))
        for (start, count, flip), n in zip(spans, self.shape, strict=True):
            yield n - start - count if flip else start, count

    @staticmethod
    def _read(start: int, count: int, n: int, flip: bool, side: int, cutter: Cutter) -> Array:
        """Rows of the image that are read for `count` rows from `start` on in this version."""
        first = start - start % cutter.step - cutter.halo
        # what lies further changes nothing that is kept: the last row again, rather than one far above
        last = start + count - 1 + cutter.beyond
        index = reflect(np.minimum(np.arange(first, first + side), last), n)
        return n - 1 - index if flip else index


@dataclass(frozen=True, slots=True)
class Rotated:
    """The image rotated about its centre by degrees, counter-clockwise as seen; linear interpolation both ways."""

    shape: tuple[int, int]
    degrees: float

    def window(self, greys: Greys, tile: Tile, cutter: Cutter, sides: tuple[int, int]) -> Array:
        box = self._box(tile, cutter)
        places = []
        for (start, count), side in zip(box, sides, strict=True):
            index = np.arange(start - cutter.halo, start - cutter.halo + side)
            places.append(np.minimum(index, start + count - 1 + cutter.beyond))
        # the part of the image that this sees
        corners = [self._turn(places[0][[0, -1]][:, None], places[1][[0, -1]], 1)]
        bounds = []
        for axis, n in enumerate(self.shape):
            low, high = math.floor(corners[0][axis].min()) - 1, math.ceil(corners[0][axis].max()) + 1
            seen = reflect(np.arange(low, high + 1), n)
            bounds.append((int(seen.min()), int(seen.max()) + 1))
        block = greys.read(tile.z, slice(*bounds[0]), slice(*bounds[1]))
        out = np.empty((len(block), *sides), block.dtype)
        for first in range(0, sides[0], _STRIP):
            strip = slice(first, first + _STRIP)
            rows, columns = self._turn(places[0][strip][:, None], places[1], 1)
            out[:, strip] = self._interpolated(block, rows, columns, (bounds[0][0], bounds[1][0]))
        return out

    def back(self, output: Tensor, tile: Tile, cutter: Cutter) -> Tensor:
        (top, _), (left, _) = self._box(tile, cutter)
        skip = cutter.halo if cutter.same else 0
        out = output.new_empty((len(output), tile.rows, tile.columns))
        flat, width = output.reshape(len(output), -1), output.shape[2]
        for first in range(0, tile.rows, _STRIP):
            count = min(_STRIP, tile.rows - first)
            index = np.arange(tile.row + first, tile.row + first + count)[:, None]
            rows, columns = self._turn(index, np.arange(tile.column, tile.column + tile.columns), -1)
            rows, columns = rows - top + skip, columns - left + skip
            above, before = np.floor(rows).astype(np.int64), np.floor(columns).astype(np.int64)
            down, right = (
                torch.from_numpy(part).to(output.device, output.dtype) for part in (rows - above, columns - before)
            )
            corner = torch.from_numpy(above * width + before).to(output.device)
            upper = torch.lerp(flat[:, corner], flat[:, corner + 1], right)
            lower = torch.lerp(flat[:, corner + width], flat[:, corner + width + 1], right)
            out[:, first : first + count] = torch.lerp(upper, lower, down)
        return out

    def _box(self, tile: Tile, cutter: Cutter) -> list[tuple[int, int]]:
        """First row and number of rows that the tile takes in this version; columns likewise; on the pooling grid."""
        rows = np.array([tile.row, tile.row + tile.rows - 1])[:, None]
        turned = self._turn(rows, np.array([tile.column, tile.column + tile.columns - 1]), -1)
        box = []
        for axis in turned:
            # of one more on either side where rounding could ask for it
            first, last = math.floor(axis.min() - _ROUNDING), math.floor(axis.max() + _ROUNDING)
            start = first // cutter.step * cutter.step
            box.append((start, last + 2 - start))
        return box

    def _turn(self, rows: Array, columns: Array, way: int) -> tuple[Array, Array]:
        """Where pixels of this version (way 1) lie in the image, or those of the image (way -1) in this version."""
        cos, sin = math.cos(math.radians(self.degrees)), way * math.sin(math.radians(self.degrees))
        middle = [(n - 1) / 2 for n in self.shape]
        y, x = rows - middle[0], columns - middle[1]
        return cos * y + sin * x + middle[0], cos * x - sin * y + middle[1]

    def _interpolated(self, block: Array, rows: Array, columns: Array, first: tuple[int, int]) -> Array:
        above, before = np.floor(rows).astype(np.intp), np.floor(columns).astype(np.intp)
        down, right = ((part).astype(block.dtype) for part in (rows - above, columns - before))
        (top, bottom), (left, far) = (
            [reflect((index + more).reshape(-1), n).reshape(index.shape) - start for more in (0, 1)]
            for index, n, start in zip((above, before), self.shape, first, strict=True)
        )
        upper = block[:, top, left] * (1 - right) + block[:, top, far] * right
        lower = block[:, bottom, left] * (1 - right) + block[:, bottom, far] * right
        out: Array = upper * (1 - down) + lower * down
        return out


def gather(greys: Greys, z: int, rows: Array, columns: Array) -> Array:
    """Rows and columns of a slice in any order, of one contiguous read: [C, len(rows), len(columns)]."""
    top, left = int(rows.min()), int(columns.min())
    pixels = greys.read(z, slice(top, int(rows.max()) + 1), slice(left, int(columns.max()) + 1))
    for axis, index in ((1, rows - top), (2, columns - left)):
        if len(index) != pixels.shape[axis] or (index != np.arange(len(index))).any():
            pixels = np.take(pixels, index, axis)
    return pixels
