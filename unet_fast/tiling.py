"""Prediction at any size, by tiles that join without seams.

Tiles start on the max-pool grid (steps are multiples of 2^depth), so that every pixel is pooled as in one large tile;
the image continues by reflection without repeating its edge, 1234 -> 32123432, as far as the last tile reads, also
beyond its own size. Each output pixel is computed once and depends on the image alone, not on how it was cut.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import geometry
from .errors import BadInput
from .memory import estimate, largest_tile
from .model import FastUNet
from .progress import Progress
from .units import bytes_of

__all__ = ["OUTPUTS", "TilePlan", "covering_tile", "cut_tile", "plan_tiles", "predict", "seam_check"]

OUTPUTS = ("labels", "probabilities", "logits")
AXES = ("YX", "CYX", "YXC", "ZYX", "ZCYX")

# the paper's tile; larger ones waste less on the halo, smaller ones take less memory
_USUAL_TILE = 572


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
    cutter = _Cutter(depth, up_mode, padding)
    # the net whose bytes are known
    counted = model if isinstance(model, FastUNet) and padding == "valid" else None
    if memory is not None:
        if tile_in is not None or counted is None:
            raise BadInput("memory needs a model with padding 'valid', and no tile_in beside it")
        cutter.largest = _fitting(memory, counted, batch, dtype, cutter)
    rows, columns = (
        cutter.cut(int(n), None if side is None else int(side)) for n, side in zip(shape[-2:], sides, strict=True)
    )
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
    cutter = _Cutter(depth, up_mode, "valid")
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
    cutter = _Cutter(depth, up_mode, "valid")
    geometry.check_legal(whole, depth, name="whole")
    if cutter.right(whole) < 1:
        raise BadInput(f"whole {whole} has no output that counts; the smallest with one is {cutter.smallest(1)}")
    cut = cutter.cut(cutter.right(whole), min(tile_in, whole))
    tiles, start = [], 0
    while start + cut.tile < whole:
        tiles.append((start, cut.tile, cut.keep))
        start += cut.keep
    return [*tiles, (start, whole - start, cutter.right(whole - start))]


def _fitting(memory: str | float, model: FastUNet, batch: int, dtype: torch.dtype | None, cutter: "_Cutter") -> int:
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


class _Cutter:
    """One axis at a time: which tiles a net can take, and what of them is right."""

    def __init__(self, depth: int, up_mode: str, padding: str) -> None:
        self.depth, self.step = depth, geometry.step_multiple(depth)
        # resize repeats the last row (column) at each level: wrong by then for 2^depth - 1 pixels
        self.spoiled = self.step - 1 if up_mode == "resize" else 0
        self.same = padding == "same"
        self.halo = geometry.halo(depth)
        # a tile nobody asked for is no larger than this
        self.largest = max(_USUAL_TILE, 6 * self.halo)
        if self.same:
            # up to here a padded zero can be felt: two pixels further than a halo, because the pooling grid begins at
            # the tile's first pixel and not at its third; tiles of padded nets start on the grid themselves
            self.halo = -(-(self.halo + 2 + self.spoiled) // self.step) * self.step
            self.spoiled = 0
            self.largest = max(_USUAL_TILE, 6 * self.halo)

    def right(self, tile: int) -> int:
        """Pixels of the tile's output that equal those of an endless image."""
        return tile - 2 * self.halo - self.spoiled

    def smallest(self, kept: int) -> int:
        """The smallest legal tile with at least `kept` right pixels."""
        needed = kept + 2 * self.halo + self.spoiled
        if self.same:
            return -(-needed // self.step) * self.step
        # legal sizes lie one step apart, from the first that leaves a pixel on
        return geometry.legal_sizes(needed, needed + self.step, self.depth)[0]

    def cut(self, n: int, tile: int | None) -> _Cut:
        if tile is None:
            tile = self._usual(n)
        self._check(tile)
        right = self.right(tile)
        if right >= n:
            return _Cut(tile, n, 1)
        keep = right // self.step * self.step
        if keep < 1:
            raise BadInput(
                f"tile_in {tile} keeps {max(0, right)} right pixels of each tile, fewer than the {self.step} that one "
                f"step needs; the smallest for an image of {n} is {self.smallest(min(n, self.step))}"
            )
        return _Cut(tile, keep, -(-n // keep))

    def _usual(self, n: int) -> int:
        """The tile of the fewest equal tiles that are not too large."""
        count = 1
        tile = self.smallest(n)
        while tile > self.largest:
            count += 1
            tile = self.smallest(-(-n // (count * self.step)) * self.step)
        return tile

    def _check(self, tile: int) -> None:
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


def predict(
    model: nn.Module,
    image: Any,
    *,
    axes: str | None = None,
    tile_in: int | Sequence[int] | None = None,
    memory: str | float | None = None,
    output: str = "labels",
    threshold: float | None = None,
    out: Any = None,
    batch: int = 1,
    progress: bool = False,
) -> Any:
    """Segment an image or a stack of any size from 1 x 1, tile by tile, without seams.

    Args:
        model: a FastUNet (or any module with its geometry: `depth`, `in_channels`); used in eval mode, in its own
            dtype and on its own device; its mode is restored. A normalisation saved with it is applied first.
        image: array or tensor; numpy in, numpy out, a tensor likewise.
        axes: "YX", "CYX", "YXC", "ZYX" or "ZCYX". None allows 2-D, and 3-D whose first axis is in_channels > 1.
        tile_in, memory: see `plan_tiles`.
        output: "labels" (the likeliest class: uint8, uint16 above 256 classes), "probabilities" (softmax, float32) or
            "logits" (the model's dtype, float32 at least).
        threshold: for labels of two classes: the probability above which a pixel is a cell; None takes the likelier.
        out: anything that can be written by index, of the result's shape; it is returned then.
        batch: tiles that go through the net together.
        progress: show progress on stderr.

    Returns:
        labels [Z,] H, W; otherwise [Z,] K, H, W: the image's own rows and columns.

    Raises:
        ValueError: the axes are unclear, the number of channels is another, NaN or infinite pixels, a tile that does
            not fit, an `out` of another shape, a batch of none.
    """
    if output not in OUTPUTS:
        raise BadInput(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    if batch < 1:
        raise BadInput(f"batch must be 1 or more, got {batch}")
    slices, piled = _slices(_pixels(image), axes, int(getattr(model, "in_channels", 1)))
    if slices.dtype.kind == "f" and not np.isfinite(slices).all():
        raise BadInput(f"image has {int((~np.isfinite(slices)).sum())} NaN or infinite pixels; replace them first")
    plan = plan_tiles(slices.shape, tile_in=tile_in, memory=memory, model=model, batch=batch)
    if threshold is not None and not (output == "labels" and model.out_channels == 2 and 0 <= threshold <= 1):
        raise BadInput(f"threshold must lie between 0 and 1, for labels of two classes, got {threshold:g}")
    classes = int(getattr(model, "out_channels", 2))
    inner = plan.shape if output == "labels" else (classes, *plan.shape)
    shape = (len(slices), *inner) if piled else inner
    made_here = out is None
    if made_here:
        out = np.empty(shape, _dtype(model, output, classes))
    elif tuple(out.shape) != shape:
        raise BadInput(f"out must have shape {list(shape)}, got {list(out.shape)}")
    with _evaluating(model), Progress("predict", len(slices) * len(plan), shown=progress) as bar:
        for z, plane in enumerate(slices):
            for (row, column), tile in _outputs(model, plane, plan, batch):
                where = (..., slice(row, row + tile.shape[-2]), slice(column, column + tile.shape[-1]))
                out[(z, *where) if piled else where] = _as_output(tile, output, threshold, out)
                bar.advance(f"slice {z + 1} of {len(slices)}" if piled else "")
    return torch.from_numpy(out).to(image.device) if made_here and isinstance(image, Tensor) else out


def _pixels(image: Any) -> np.ndarray[Any, Any]:
    if not isinstance(image, Tensor):
        return np.asarray(image)
    image = image.detach().cpu()
    # numpy has no bfloat16
    return np.asarray(image.float() if image.dtype == torch.bfloat16 else image)


def _slices(pixels: np.ndarray[Any, Any], axes: str | None, channels: int) -> tuple[np.ndarray[Any, Any], bool]:
    """([D, C, H, W], whether D was an axis of the image)."""
    if pixels.dtype.kind not in "uifb":
        raise BadInput(f"image must be integer or floating, got {pixels.dtype}")
    if axes is None:
        if pixels.ndim == 2:
            axes = "YX"
        elif pixels.ndim == 3 and channels > 1 and pixels.shape[0] == channels:
            axes = "CYX"
        else:
            raise BadInput(f"image of shape {list(pixels.shape)} needs axes: say axes, one of {', '.join(AXES)}")
    if axes not in AXES or len(axes) != pixels.ndim:
        raise BadInput(f"axes must be one of {', '.join(AXES)} and fit {pixels.ndim} axes, got {axes!r}")
    pixels = np.moveaxis(pixels, -1, 0) if axes == "YXC" else pixels
    if "C" not in axes:
        pixels = pixels[..., None, :, :]
    if "Z" not in axes:
        pixels = pixels[None]
    if pixels.shape[1] != channels:
        raise BadInput(f"image must have {channels} channel(s) like the model, got {pixels.shape[1]}")
    if 0 in pixels.shape:
        raise BadInput(f"an image must have at least one row and one column, got {list(pixels.shape)}")
    # a mask is no number to a percentile
    return pixels.astype(np.uint8) if pixels.dtype == bool else pixels, "Z" in axes


def _dtype(model: nn.Module, output: str, classes: int) -> Any:
    if output == "labels":
        return np.uint8 if classes <= 256 else np.uint16
    own = next(model.parameters()).dtype
    return np.float64 if own == torch.float64 else np.float32


def _as_output(tile: Tensor, output: str, threshold: float | None, out: Any) -> Any:
    if output == "labels":
        tile = tile.argmax(0) if threshold is None else tile.softmax(0)[1] > threshold
    else:
        tile = tile.double() if tile.dtype == torch.float64 else tile.float()
        tile = tile.softmax(0) if output == "probabilities" else tile
    return tile.to(out.device, out.dtype) if isinstance(out, Tensor) else tile.cpu().numpy()


class _evaluating:  # noqa: N801 (used as a function)
    """Eval mode, no gradients; the mode of every module is restored."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.grad = model, torch.no_grad()

    def __enter__(self) -> None:
        self.before = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        self.grad.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.grad.__exit__(*error)
        for module, training in self.before:
            module.training = training


def _outputs(
    model: nn.Module, plane: np.ndarray[Any, Any], plan: TilePlan, batch: int
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """(first row and column, logits [K, rows, columns]) of each tile of one slice [C, H, W]."""
    parameter = next(model.parameters())
    normalise = getattr(model, "normalisation", None)
    plane = normalise(plane) if normalise is not None else plane
    places = list(plan)
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        tiles = np.stack([window(plane, place, plan) for place in some])
        # torch takes neither uint16 nor the byte order of another machine
        tiles = tiles.astype(np.float64 if parameter.dtype == torch.float64 else np.float32, copy=False)
        logits = model(torch.from_numpy(tiles).to(parameter.device, parameter.dtype))
        start = plan.halo if logits.shape[-2:] == tiles.shape[-2:] else 0
        for (row, column), tile in zip(some, logits, strict=True):
            rows = min(plan.keep[0], plan.shape[0] - row)
            columns = min(plan.keep[1], plan.shape[1] - column)
            yield (row, column), tile[:, start : start + rows, start : start + columns]


def window(plane: np.ndarray[Any, Any], place: tuple[int, int], plan: TilePlan) -> np.ndarray[Any, Any]:
    """What goes into the net for the tile whose output begins at `place`: [C, *tile_in], mirrored beyond the image."""
    rows, columns = (
        _mirrored(start - plan.halo, count, n) for start, count, n in zip(place, plan.tile_in, plan.shape, strict=True)
    )
    return plane[:, rows[:, None], columns]


def _mirrored(start: int, count: int, n: int) -> np.ndarray[Any, Any]:
    """Indices of `count` pixels from `start` on an axis of n that continues by reflection."""
    if n == 1:
        return np.zeros(count, np.intp)
    index = np.arange(start, start + count) % (2 * (n - 1))
    return np.minimum(index, 2 * (n - 1) - index)


def seam_check(model: nn.Module, image: Any, *, tile_in: int | None = None, axes: str | None = None) -> dict[str, Any]:
    """Compare tiled prediction with prediction in one piece, on the user's own model and image.

    Returns:
        the largest difference of the logits, their standard deviation, how many labels differ, the number of tiles,
        and `difference` [H, W], the largest over classes (and slices).
    """
    image = _pixels(image)
    one_piece = plan_tiles(np.shape(image) if axes is None else _shape(image, axes), tile_in=None, model=model)
    cutter = _Cutter(
        getattr(model, "depth", 4), getattr(model, "up_mode", "deconv"), getattr(model, "padding", "valid")
    )
    whole = tuple(cutter.smallest(n) for n in one_piece.shape)
    small = tile_in or cutter.smallest(2 * cutter.step)
    a = predict(model, image, axes=axes, tile_in=whole, output="logits")
    b = predict(model, image, axes=axes, tile_in=small, output="logits")
    difference = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
    classes = 1 if "Z" in (axes or "") else 0
    flips = int((np.asarray(a).argmax(classes) != np.asarray(b).argmax(classes)).sum())
    return {
        "largest_difference": float(difference.max()),
        "logits_sd": float(np.asarray(a, np.float64).std()),
        "labels_that_differ": flips,
        "tiles": len(plan_tiles(one_piece.shape, tile_in=small, model=model)),
        "tile_in": small,
        "difference": difference.reshape(-1, *one_piece.shape).max(0),
    }


def _shape(image: Any, axes: str) -> tuple[int, int]:
    shape = np.shape(image)
    return shape[axes.index("Y")], shape[axes.index("X")]
