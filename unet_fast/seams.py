"""Whether tiles join without seams: on the user's own model and image, against tiles that lie across the seams."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from .fitting import parameter_of
from .greys import Greys
from .inference import Answer, Inference, evaluating, predict
from .tiling import Cutter, Tile, TilePlan, plan_tiles

__all__ = ["Seams", "seam_check", "verify_seams"]

Array = np.ndarray[Any, Any]

# differences that are rounding and no seam, in standard deviations of what is compared: a seam is around 1
_ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}


@dataclass(frozen=True, slots=True)
class Seams:
    """What was compared at places where tiles meet.

    `places` of `of` such places; the largest difference of the logits (of probabilities, where versions are averaged)
    and their standard deviation; how many of the `pixels` have another label; whether that is rounding.
    """

    places: int
    of: int
    largest_difference: float
    sd: float
    labels_that_differ: int
    pixels: int
    exact: bool

    def __str__(self) -> str:
        if not self.of:
            return "one tile, no seam"
        verdict = "no seam" if self.exact else "a SEAM"
        return (
            f"{verdict}: {self.places} of {self.of} places where tiles meet, largest difference "
            f"{self.largest_difference / self.sd if self.sd else 0:.1e} of the spread, "
            f"{self.labels_that_differ} of {self.pixels} labels differ"
        )


def verify_seams(
    model: nn.Module, greys: Greys, plan: TilePlan, *, tta: str = "none", places: int = 4, seed: int = 0
) -> Seams:
    """Compare tiles with one that lies across the place where they meet, at a sample of such places.

    Args:
        model, greys, plan, tta: as for the prediction.
        places: how many; corners where four tiles meet, where there are such.
        seed: which ones.
    """
    cutter = Cutter.of(model, tta)
    down, right = (range(1, n) if n > 1 else (0,) for n in plan.grid)
    corners = list(product(down, right))
    corners = [] if plan.grid == (1, 1) else corners
    every = len(corners) * greys.shape[0]
    chosen = np.random.default_rng(seed).permutation(every)[:places]
    answer = Answer("logits" if tta == "none" else "probabilities", np.dtype(np.float64))
    largest, pixels, differ, values = 0.0, 0, 0, []
    # infinities of a diverged net have no difference
    with evaluating(model), np.errstate(invalid="ignore"):
        for number in chosen:
            z, corner = divmod(int(number), len(corners))
            across = _across(plan, cutter, z, corners[corner])
            sides = cutter.smallest(across.rows), cutter.smallest(across.columns)
            sides = (max(sides),) * 2 if tta == "rot7" else sides
            [one] = _computed(model, greys, answer, tta, [across], sides)
            meeting = [replace(tile, z=z) for tile in plan.tiles() if _overlap(tile, across)]
            for tile, found in zip(meeting, _computed(model, greys, answer, tta, meeting, plan.tile_in), strict=True):
                rows, columns = _overlap(tile, across) or (slice(0), slice(0))
                a = found[:, rows.start - tile.row : rows.stop - tile.row]
                a = a[:, :, columns.start - tile.column : columns.stop - tile.column]
                b = one[:, rows.start - across.row : rows.stop - across.row]
                b = b[:, :, columns.start - across.column : columns.stop - across.column]
                # NaN stays
                largest = float(np.maximum(largest, np.abs(a - b).max()))
                differ += int((a.argmax(0) != b.argmax(0)).sum())
                pixels += a[0].size
                values.append(a.reshape(-1))
        sd = float(np.concatenate(values).std()) if values else 0.0
    limit = _ROUNDING.get(parameter_of(model).dtype, 0.3) * sd
    # a difference that is no number is none that was looked at
    exact = not values or largest <= limit + 1e-12
    return Seams(len(chosen), every, largest, sd, differ, pixels, exact)


def _across(plan: TilePlan, cutter: Cutter, z: int, corner: tuple[int, int]) -> Tile:
    """A tile in whose middle tiles of the plan meet."""
    spans = []
    for number, step, keep, n in zip(corner, plan.step, plan.keep, plan.shape, strict=True):
        middle, half = number * step, max(cutter.step, keep // 2 // cutter.step * cutter.step)
        # on the grid, whatever the plan
        start = max(0, middle - half) // cutter.step * cutter.step if number else 0
        spans.append((start, min(n, middle + half if number else keep) - start))
    (row, rows), (column, columns) = spans
    return Tile(z, row, column, rows, columns)


def _overlap(a: Tile, b: Tile) -> tuple[slice, slice] | None:
    rows = slice(max(a.row, b.row), min(a.row + a.rows, b.row + b.rows))
    columns = slice(max(a.column, b.column), min(a.column + a.columns, b.column + b.columns))
    return (rows, columns) if rows.start < rows.stop and columns.start < columns.stop else None


def _computed(
    model: nn.Module, greys: Greys, answer: Answer, tta: str, tiles: Sequence[Tile], sides: tuple[int, int]
) -> list[Array]:
    return [_one(model, greys, answer, tta, tile, sides) for tile in tiles]


def _one(model: nn.Module, greys: Greys, answer: Answer, tta: str, tile: Tile, sides: tuple[int, int]) -> Array:
    """[K, rows, columns] of a tile, or of its parts where there was no memory for it."""
    out = np.empty((int(getattr(model, "out_channels", 2)), tile.rows, tile.columns))

    def take(parts: Sequence[Tile], results: Sequence[Array]) -> None:
        for part, result in zip(parts, results, strict=True):
            row, column = part.row - tile.row, part.column - tile.column
            out[:, row : row + part.rows, column : column + part.columns] = result

    Inference(model, greys, answer, tta).run([[tile]], sides, take)
    return out


def seam_check(model: nn.Module, image: Any, *, tile_in: int | None = None, axes: str | None = None) -> dict[str, Any]:
    """Compare tiled prediction with prediction in one piece, for an image that fits into memory so.

    Returns:
        the largest difference of the logits, their standard deviation, how many labels differ, the number of tiles,
        and `difference` [H, W], the largest over classes (and slices).
    """
    shape = np.shape(image)
    shape = shape[-2:] if axes is None else (shape[axes.index("Y")], shape[axes.index("X")])
    cutter = Cutter.of(model)
    whole = tuple(cutter.smallest(n) for n in shape)
    small = tile_in or cutter.smallest(2 * cutter.step)
    a = np.asarray(predict(model, image, axes=axes, tile_in=whole, output="logits"), np.float64)
    b = np.asarray(predict(model, image, axes=axes, tile_in=small, output="logits"), np.float64)
    classes = 1 if "Z" in (axes or "") else 0
    return {
        "largest_difference": float(np.abs(a - b).max()),
        "logits_sd": float(a.std()),
        "labels_that_differ": int((a.argmax(classes) != b.argmax(classes)).sum()),
        "tiles": len(plan_tiles(shape, tile_in=small, model=model)),
        "tile_in": small,
        "difference": np.abs(a - b).reshape(-1, *shape).max(0),
    }
