"""Where an image of any size is cut, so that its tiles join without seams: plain integers.

Tiles start on the max-pool grid (steps are multiples of 2^depth), so that every pixel is pooled as in one large tile;
the image continues by reflection without repeating its edge, 1234 -> 32123432, as far as the last tile reads, also
beyond its own size. Each output pixel is computed once and depends on the image alone, not on how it was cut.

An average over mirrored or rotated versions of the image ("d4", "rot7") is cut by the same rule: each version has its
own pooling grid, and a tile must reach as far as the nearest place on it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from . import geometry
from .errors import BadInput
from .memory import estimate, largest_tile
from .model import FastUNet
from .units import bytes_of, readable

__all__ = ["TTA", "Cutter", "Tile", "TilePlan", "covering_tile", "cut_tile", "mirrored", "plan_tiles", "reflect"]

# versions of the image whose probabilities are averaged: itself; 8 mirrored and turned; 7 rotated by 360/7 degrees each
TTA = ("none", "d4", "rot7")

# the paper's tile; larger ones waste less on the halo, smaller ones take less memory
_USUAL_TILE = 572


@dataclass(frozen=True, slots=True, order=True)
class Tile:
    """Output rows and columns that one tile answers for, in slice z of a stack."""

    z: int
    row: int
    column: int
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class TilePlan:
    """How an image is cut. Pairs are (rows, columns), in pixels.

    tile_in goes into the net; its output's first `keep` pixels are kept; tiles lie `step` apart and are read from
    `halo` pixels before their output; `grid` tiles cover `shape`; `overhead` is the pixels read per pixel kept.
    """

    shape: tuple[int, int]
    tile_in: tuple[int, int]
    keep: tuple[int, int]
    step: tuple[int, int]
    grid: tuple[int, int]
    halo: int
    overhead: float
    # what `unet_fast.memory` counts for a prediction of one batch of such tiles; None where the net is not known to it
    predicted_bytes: int | None = None

    def __len__(self) -> int:
        return self.grid[0] * self.grid[1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """First output row and column of each tile."""
        for i in range(self.grid[0]):
            for j in range(self.grid[1]):
                yield i * self.step[0], j * self.step[1]

    def tiles(self, slices: int = 1) -> Iterator[Tile]:
        """What each tile answers for, slice by slice and row by row."""
        for z in range(slices):
            for row, column in self:
                yield Tile(z, row, column, *self._kept(row, column))

    def _kept(self, row: int, column: int) -> tuple[int, int]:
        return min(self.keep[0], self.shape[0] - row), min(self.keep[1], self.shape[1] - column)

    def __str__(self) -> str:
        """A table for people."""
        needs = "unknown" if self.predicted_bytes is None else readable(self.predicted_bytes)
        lines = {
            "image": _by(self.shape),
            "tile": f"{_by(self.tile_in)}, of which {_by(self.keep)} are kept (halo {self.halo})",
            "tiles": f"{_by(self.grid)} = {len(self)}, {_by(self.step)} apart",
            "overhead": f"{self.overhead:.2f} pixels read per pixel kept",
            "memory": f"{needs} counted",
        }
        return "\n".join(f"{name:9s} {text}" for name, text in lines.items())


def _by(pair: tuple[int, int]) -> str:
    return f"{pair[0]} x {pair[1]}"


def plan_tiles(
    shape: Sequence[int],
    *,
    tile_in: int | Sequence[int] | None = None,
    memory: str | float | None = None,
    model: nn.Module | None = None,
    depth: int = 4,
    up_mode: str = "deconv",
    padding: str = "valid",
    batch: int = 1,
    dtype: torch.dtype | None = None,
    tta: str = "none",
) -> TilePlan:
    """Cut an image of `shape` (its last two sizes are rows and columns) into tiles.

    Args:
        shape: of the image.
        tile_in: side (or rows, columns) of what goes into the net; None takes tiles that fit the image with little
            waste, 572 at most where the net's depth allows.
        memory: instead of tile_in: a budget, "6GB" or bytes; the fewest tiles that `unet_fast.memory` says fit into it
            (weights included). Needs a model with padding "valid". What a library takes for itself is not counted.
        model: a FastUNet, from which depth, up_mode and padding are taken.
        depth: number of poolings.
        up_mode: "resize" spoils the last 2^depth - 1 rows and columns of a tile, which are not kept then.
        padding: "same": what zero-padding has touched is not kept; tile_in is a multiple of 2^depth then.
        batch, dtype: of the prediction, for its bytes; None: the model's dtype.
        tta: "d4" or "rot7": what of a tile is kept is right for every version of the image; see `unet_fast.predict`.

    Raises:
        ValueError: an empty image; a budget that is no size or too small, or given with tile_in; a tile that cannot be
            pooled, or that keeps less than the 2^depth pixels that one step needs; the nearest that would do are named.
    """
    if model is not None:
        depth = getattr(model, "depth", depth)
        up_mode = getattr(model, "up_mode", up_mode)
        padding = getattr(model, "padding", padding)
    if len(shape) < 2 or min(shape[-2:]) < 1:
        raise BadInput(f"an image must have at least one row and one column, got {list(shape)}")
    sides = list(tile_in) if isinstance(tile_in, Sequence | np.ndarray) else [tile_in] * 2
    if len(sides) != 2 or not all(side is None or hasattr(side, "__index__") for side in sides):
        raise BadInput(f"tile_in must be one side or rows and columns, in whole pixels, got {tile_in!r}")
    cutter = Cutter(depth, up_mode, padding, tta)
    # the net whose bytes are known
    counted = model if isinstance(model, FastUNet) and padding == "valid" else None
    if memory is not None:
        if tile_in is not None or counted is None:
            raise BadInput("memory needs a model with padding 'valid', and no tile_in beside it")
        cutter.largest = _fitting(memory, counted, batch, dtype, cutter)
    if tta == "rot7" and sides != [None, None]:
        # a turned tile is as high as it is wide
        sides = [min(side for side in sides if side is not None)] * 2
    rows, columns = cutter.cut_both((int(shape[-2]), int(shape[-1])), [None if n is None else int(n) for n in sides])
    predicted = None
    if counted is not None:
        predicted = estimate(counted, (rows.tile, columns.tile), mode="predict", batch=batch, dtype=dtype).total
    read = rows.tile * columns.tile * rows.count * columns.count
    return TilePlan(
        shape=(int(shape[-2]), int(shape[-1])),
        tile_in=(rows.tile, columns.tile),
        keep=(rows.keep, columns.keep),
        step=(rows.keep, columns.keep),
        grid=(rows.count, columns.count),
        halo=cutter.halo,
        overhead=read / (int(shape[-2]) * int(shape[-1])),
        predicted_bytes=predicted,
    )


def covering_tile(shape: Sequence[int], *, depth: int = 4, up_mode: str = "deconv") -> tuple[int, int]:
    """Rows and columns of the smallest tile that answers for all of an image.

    >>> covering_tile((388, 100))
    (572, 284)
    """
    cutter = Cutter(depth, up_mode, "valid")
    return cutter.smallest(int(shape[-2])), cutter.smallest(int(shape[-1]))


def cut_tile(whole: int, tile_in: int, *, depth: int = 4, up_mode: str = "deconv") -> list[tuple[int, int, int]]:
    """Cut one axis of a large tile into small ones that answer together for what the large one answers for.

    Args:
        whole: legal side of the large tile.
        tile_in: legal side that no small one exceeds.
        depth, up_mode: of the net.

    Returns:
        for each small tile: its first pixel in the large one, its side, and how many of its first outputs count; the
        outputs follow one another without gap or overlap. What "resize" spoils of the large tile is left out.

    Raises:
        ValueError: a side that cannot be pooled, or a tile_in that keeps less than the 2^depth pixels of one step.

    >>> cut_tile(700, 572)
    [(0, 572, 384), (384, 316, 132)]
    """
    cutter = Cutter(depth, up_mode, "valid")
    geometry.check_legal(whole, depth, name="whole")
    if cutter.right(whole) < 1:
        raise BadInput(f"whole {whole} has no output that counts; the smallest with one is {cutter.smallest(1)}")
    cut = cutter.cut(cutter.right(whole), min(tile_in, whole))
    tiles, start = [], 0
    while start + cut.tile < whole:
        tiles.append((start, cut.tile, cut.keep))
        start += cut.keep
    return [*tiles, (start, whole - start, cutter.right(whole - start))]


def _fitting(memory: str | float, model: FastUNet, batch: int, dtype: torch.dtype | None, cutter: "Cutter") -> int:
    """The largest tile of a budget, if it keeps a pixel's step."""
    try:
        budget = bytes_of(memory)
        largest = largest_tile(budget, model, mode="predict", batch=batch, dtype=dtype)
    except ValueError as error:
        raise BadInput(str(error)) from error
    smallest = cutter.smallest(cutter.step)
    if largest < smallest:
        needed = estimate(model, smallest, mode="predict", batch=batch, dtype=dtype).total
        raise BadInput(f"memory must be at least {needed} bytes, for tiles of {smallest}, got {budget}")
    return largest


@dataclass(frozen=True, slots=True)
class _Cut:
    tile: int
    keep: int
    count: int


class Cutter:
    """Which tiles a net can take, and what of them is right, one axis at a time."""

    def __init__(self, depth: int, up_mode: str, padding: str, tta: str = "none") -> None:
        if tta not in TTA:
            raise BadInput(f"tta must be one of {', '.join(TTA)}, got {tta!r}")
        self.depth, self.step, self.tta = depth, geometry.step_multiple(depth), tta
        # resize repeats the last row (column) at each level: wrong by then for 2^depth - 1 pixels
        self.spoiled = self.step - 1 if up_mode == "resize" else 0
        self.same = padding == "same"
        self.halo = geometry.halo(depth)
        if self.same:
            # up to here a padded zero can be felt: two pixels further than a halo, because the pooling grid begins at
            # the tile's first pixel and not at its third; tiles of padded nets start on the grid themselves
            self.halo = -(-(self.halo + 2 + self.spoiled) // self.step) * self.step
            self.spoiled = 0
        # what is kept depends on no pixel further to its right: a halo from the end of its pooling cell, and at each
        # level resize looks at the next pixel too, 2 + 4 + ... + 2^depth in all
        self.beyond = self.halo + self.step + 2 * self.spoiled
        # a tile nobody asked for is no larger than this
        self.largest = max(_USUAL_TILE, 6 * self.halo)

    @classmethod
    def of(cls, model: nn.Module, tta: str = "none") -> "Cutter":
        """By the model's own depth, up_mode and padding; those of the paper where it has none."""
        up_mode, padding = getattr(model, "up_mode", "deconv"), getattr(model, "padding", "valid")
        return cls(getattr(model, "depth", 4), up_mode, padding, tta)

    def right(self, tile: int) -> int:
        """Pixels of the tile's output that equal those of an endless image."""
        return tile - 2 * self.halo - self.spoiled

    def smallest(self, kept: int) -> int:
        """The smallest legal tile that answers for `kept` pixels."""
        needed = self.reach(kept) + 2 * self.halo + self.spoiled
        if self.same:
            return -(-needed // self.step) * self.step
        # legal sizes lie one step apart, from the first that leaves a pixel on
        return geometry.legal_sizes(needed, needed + self.step, self.depth)[0]

    def reach(self, kept: int) -> int:
        """Right pixels that a version of the image needs where `kept` pixels are answered for."""
        if self.tta == "none":
            return kept
        if self.tta == "rot7":
            # the diagonal, and pixels at both ends to interpolate from
            kept = math.ceil((kept - 1) * math.sqrt(2)) + 4
        # from the nearest place on the version's own pooling grid on
        return kept + self.step - 1

    def keep(self, tile: int) -> int:
        """Pixels that a tile answers for where others follow: whole steps; 0 where it is too small for one."""
        steps = max(0, self.right(tile)) // self.step
        while steps and self.reach(steps * self.step) > self.right(tile):
            steps -= 1
        return steps * self.step

    def cut_both(self, shape: tuple[int, int], tiles: Sequence[int | None]) -> tuple[_Cut, _Cut]:
        """Rows and columns of an image."""
        if self.tta == "rot7" and list(tiles) == [None, None]:
            # as high as wide
            tiles = [max(self.usual(n) for n in shape)] * 2
        rows, columns = (self.cut(n, tile) for n, tile in zip(shape, tiles, strict=True))
        return rows, columns

    def cut(self, n: int, tile: int | None) -> _Cut:
        if tile is None:
            tile = self.usual(n)
        self.check(tile)
        if self.right(tile) >= self.reach(n):
            return _Cut(tile, n, 1)
        keep = self.keep(tile)
        if keep < 1:
            raise BadInput(
                f"tile_in {tile} keeps {max(0, self.right(tile))} right pixels of each tile, fewer than the "
                f"{self.reach(self.step)} that one step needs; the smallest for an image of {n} is "
                f"{self.smallest(min(n, self.step))}"
            )
        return _Cut(tile, keep, -(-n // keep))

    def usual(self, n: int) -> int:
        """The tile of the fewest equal tiles that are not too large."""
        count = 1
        tile = self.smallest(n)
        while tile > self.largest and count * self.step < n:
            count += 1
            tile = self.smallest(-(-n // (count * self.step)) * self.step)
        return tile

    def check(self, tile: int) -> None:
        """Raise BadInput unless a tile can be pooled."""
        if not self.same:
            try:
                geometry.check_legal(tile, self.depth, name="tile_in")
            except (TypeError, ValueError) as error:
                raise BadInput(str(error)) from error
        elif tile % self.step or tile < self.step:
            below = tile // self.step * self.step
            raise BadInput(
                f"tile_in {tile} must be a multiple of {self.step} for padding 'same'; "
                f"nearest are {max(self.step, below)} and {below + self.step}"
            )

    def legal(self, side: float) -> int:
        """The largest tile of at most `side` that answers for a step; the smallest one where none does."""
        least = self.smallest(self.step)
        return max(least, least + int(side - least) // self.step * self.step)

    def split(self, tile: Tile, tile_in: tuple[int, int]) -> Iterator[Tile]:
        """The same pixels in smaller tiles, on the same grid."""
        rows, columns = (
            n if self.right(side) >= self.reach(n) else self.keep(side)
            for n, side in zip((tile.rows, tile.columns), tile_in, strict=True)
        )
        for row in range(0, tile.rows, rows):
            for column in range(0, tile.columns, columns):
                height, width = min(rows, tile.rows - row), min(columns, tile.columns - column)
                yield Tile(tile.z, tile.row + row, tile.column + column, height, width)


def mirrored(start: int, count: int, n: int) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """Indices of `count` pixels from `start` on an axis of n that continues by reflection."""
    return reflect(np.arange(start, start + count), n)


def reflect(index: np.ndarray[tuple[int], np.dtype[np.intp]], n: int) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """Places of an endless axis on one of n pixels: 1234 -> 32123432."""
    if n == 1:
        return np.zeros(len(index), np.intp)
    index = index % (2 * (n - 1))
    return np.minimum(index, 2 * (n - 1) - index)
