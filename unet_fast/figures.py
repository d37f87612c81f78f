"""Pictures of what the net saw, was taught and found. All from arrays and files; none needs a screen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from unet_kernels import ERROR_KINDS

from .files import replacing

__all__ = [
    "Curve",
    "draw_curves",
    "draw_elastic",
    "draw_errors",
    "draw_prediction",
    "draw_profile",
    "draw_seams",
    "draw_weight",
    "outlined",
    "outlined_png",
    "ridge_png",
    "weight_png",
]

# told apart by colour-blind readers too
TRUTH, FOUND = (0, 190, 220), (255, 140, 0)
SPLIT, MERGED = (255, 40, 40), (60, 120, 255)
_ZOOM = 3
# Okabe and Ito's, which colour-blind readers tell apart
_COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#000000")
# memory of the graphics cards that labs have
_CARDS_GB = (4, 6, 8, 12, 24)


def outlined(
    image: NDArray[Any], instances: NDArray[Any], colour: tuple[int, int, int], zoom: int = _ZOOM
) -> NDArray[Any]:
    """Grey image [H, W] with the outline of every cell: uint8 [zoom H, zoom W, 3].

    The line lies inside the cell, two of its zoomed pixels wide, so that touching cells show two lines.
    """
    out = np.repeat(np.kron(_grey(image), np.ones((zoom, zoom), np.uint8))[..., None], 3, axis=2)
    out[_edges(np.kron(instances, np.ones((zoom, zoom), instances.dtype)), 2)] = colour
    return out


def _grey(image: NDArray[Any]) -> NDArray[np.uint8]:
    low, high = np.percentile(image, (0.5, 99.5))
    return (np.clip((image - low) / max(high - low, 1e-12), 0, 1) * 255).astype(np.uint8)


def _edges(ids: NDArray[Any], width: int) -> NDArray[np.bool_]:
    """Pixels of a cell so near to another or to the background, that they are its outline."""
    around = np.pad(ids, width, mode="edge")
    edge = np.zeros(ids.shape, bool)
    straight = [(0, reach) for reach in range(1, width + 1)]
    # a corner closes a line two pixels wide; one of a single pixel is thinner without it
    corners = [(1, 1), (1, -1)] if width > 1 else []
    for dy, dx in (*straight, *((dx, dy) for dy, dx in straight), *corners):
        for sign in (-1, 1):
            rows, columns = (
                slice(width + sign * d, width + sign * d + n) for d, n in zip((dy, dx), ids.shape, strict=True)
            )
            edge |= (around[rows, columns] != ids) & (ids > 0)
    return edge


def outlined_png(image: NDArray[Any], *outlines: tuple[NDArray[Any], tuple[int, int, int]], side: int = 768) -> bytes:
    """As `outlined`, as the bytes of a PNG for a page, with the (instances, colour) one over the other,
    all but the first three times as wide.

    No side is longer than `side`, and a small image is enlarged. A byte a pixel, the greys and the colours: a third of
    what three would take.
    """
    zoom, by = _zoom(image.shape, side), -(-max(image.shape) // side)
    if zoom < 1:
        image = _smaller(image, by)
    top = 255 - len(outlines)
    picture = np.minimum(np.kron(_grey(image), np.ones((max(zoom, 1),) * 2, np.uint8)), top)
    for number, (instances, _) in enumerate(outlines, 1):
        ids = np.kron(instances, np.ones((zoom, zoom), instances.dtype)) if zoom > 0 else instances[::by, ::by]
        # the ones above are few, and what a reader looks for
        picture[_edges(ids, (2 if zoom > 1 else 1) * (1 if number == 1 else 3))] = top + number
    greys = [(level, level, level) for level in range(top + 1)]
    return _indexed_png(picture, [*greys, *(colour for _, colour in outlines)])


def weight_png(weight: NDArray[Any], side: int = 768) -> bytes:
    """A weight map [H, W] as the bytes of a PNG, from 0 (black) to its greatest value (light yellow)."""
    zoom = _zoom(weight.shape, side)
    if zoom < 1:
        weight = _smaller(weight, -(-max(weight.shape) // side))
    levels = (np.clip(weight / max(float(weight.max()), 1e-12), 0, 1) * 255).astype(np.uint8)
    colours = (colormaps["magma"](np.arange(256))[:, :3] * 255).round().astype(int).tolist()
    return _indexed_png(np.kron(levels, np.ones((max(zoom, 1),) * 2, np.uint8)), colours)


def ridge_png(weight: NDArray[Any], instances: NDArray[Any]) -> bytes:
    """The weight map close by, where it is greatest, with the outlines of the cells in white: bytes of a PNG."""
    rows, columns = _around_peak(weight, 48)
    near, ids = weight[rows, columns], instances[rows, columns]
    levels = (np.clip(near / max(float(weight.max()), 1e-12), 0, 1) * 254).astype(np.uint8)
    large, ids = (np.kron(each, np.ones((8, 8), each.dtype)) for each in (levels, ids))
    large[_edges(ids, 2)] = 255
    colours = (colormaps["magma"](np.arange(255) / 254)[:, :3] * 255).round().astype(int).tolist()
    return _indexed_png(large, [*colours, (255, 255, 255)])


def _zoom(shape: tuple[int, ...], side: int) -> int:
    """By which an image is enlarged to be seen well; 0 where it must become smaller."""
    return min(4, side // max(shape))


def _smaller(image: NDArray[Any], by: int) -> NDArray[Any]:
    """The means of squares of so many pixels; those at the far edges are of what is there."""
    rows, columns = (np.arange(0, n, by) for n in image.shape)
    sums = np.add.reduceat(np.add.reduceat(image.astype(np.float64), rows, axis=0), columns, axis=1)
    high, wide = (np.diff([*starts, n]) for starts, n in zip((rows, columns), image.shape, strict=True))
    return sums / (high[:, None] * wide)


def _indexed_png(picture: NDArray[np.uint8], colours: Sequence[Sequence[int]]) -> bytes:
    image = Image.fromarray(picture)
    image.putpalette([value for colour in colours for value in colour])
    kept = BytesIO()
    image.save(kept, "PNG")
    return kept.getvalue()


def draw_prediction(
    path: Path,
    image: NDArray[Any],
    truth: NDArray[Any],
    found: NDArray[Any],
    *,
    title: str = "",
    names: Sequence[str] = ("image", "truth", "found"),
) -> None:
    """Image, true cells and found cells side by side; image [H, W], the others ids or a mask [H, W]."""
    blank = np.zeros(image.shape, np.int32)
    panels = (outlined(image, blank, TRUTH), outlined(image, truth, TRUTH), outlined(image, found, FOUND))
    figure, axes = _panels(3, image.shape, title)
    for axis, panel, name in zip(axes, panels, names, strict=True):
        axis.imshow(panel, interpolation="nearest")
        axis.set_title(name)
    _save(figure, path)


def draw_weight(path: Path, image: NDArray[Any], instances: NDArray[Any], weight: NDArray[Any]) -> None:
    """Image, weight map and its ridge close by: where the weight is greatest, enlarged, with the cells' outlines."""
    figure, axes = _panels(3, image.shape, "the weight map of Eq. 2: the border between touching cells counts most")
    axes[0].imshow(outlined(image, instances, TRUTH), interpolation="nearest")
    axes[0].set_title("cells")
    shown = axes[1].imshow(weight, cmap="magma", vmin=0, interpolation="nearest")
    axes[1].set_title("weight of each pixel")
    figure.colorbar(shown, ax=axes[1], fraction=0.046, pad=0.03)
    rows, columns = _around_peak(weight, 48)
    axes[2].imshow(weight[rows, columns], cmap="magma", vmin=0, vmax=weight.max(), interpolation="nearest")
    ids = np.unique(instances[rows, columns])
    for each in ids[ids > 0]:
        axes[2].contour((instances[rows, columns] == each).astype(float), [0.5], colors="white", linewidths=0.8)
    axes[2].set_title("the ridge, enlarged")
    _save(figure, path)


def _around_peak(weight: NDArray[Any], side: int) -> tuple[slice, slice]:
    peak = np.unravel_index(ndimage.uniform_filter(weight.astype(float), side // 2).argmax(), weight.shape)
    starts = [int(np.clip(p - side // 2, 0, max(0, n - side))) for p, n in zip(peak, weight.shape, strict=True)]
    return slice(starts[0], starts[0] + side), slice(starts[1], starts[1] + side)


def draw_elastic(
    path: Path,
    before: tuple[NDArray[Any], NDArray[Any]],
    after: tuple[NDArray[Any], NDArray[Any]],
    lines: tuple[NDArray[Any], NDArray[Any]],
) -> None:
    """One elastic draw: (image, instances) before and after, and where a regular grid has gone.

    lines: masks [H, W] of the grid's lines before and after, warped by the code that warps labels.
    """
    figure, axes = _panels(2, before[0].shape, "one random elastic draw; the cells and the grid move as one")
    for axis, (image, ids), mask, name in zip(axes, (before, after), lines, ("before", "after"), strict=True):
        picture = outlined(image, ids, TRUTH)
        line = np.kron(mask, np.ones((_ZOOM, _ZOOM), bool))
        picture[line] = (0.4 * picture[line] + 0.6 * np.array([255, 220, 90])).astype(np.uint8)
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(name)
    _save(figure, path)


def draw_seams(path: Path, image: NDArray[Any], difference: NDArray[Any], step: int, sd: float) -> None:
    """|tiled - in one piece| of the logits in units of their sd, with the places where seams would be."""
    figure, axes = _panels(
        2, image.shape, f"seam check: greatest difference {difference.max() / sd:.1e} sd of the logits"
    )
    axes[0].imshow(image, cmap="gray", interpolation="nearest")
    axes[0].set_title("image and tiles")
    for axis in axes:
        for row in range(step, image.shape[0], step):
            axis.axhline(row - 0.5, color="#ff8c00", linewidth=0.6)
        for column in range(step, image.shape[1], step):
            axis.axvline(column - 0.5, color="#ff8c00", linewidth=0.6)
    shown = axes[1].imshow(np.log10(difference / sd + 1e-12), cmap="viridis", vmin=-12, vmax=0, interpolation="nearest")
    axes[1].set_title("log10 of the difference / sd")
    figure.colorbar(shown, ax=axes[1], fraction=0.046, pad=0.03)
    _save(figure, path)


def draw_errors(path: Path, errors: Sequence[tuple[str, NDArray[Any], NDArray[np.uint8]]], threshold: float) -> None:
    """Where cells are split (red) and merged (blue): (title, image [H, W], kinds [H, W] of `metrics.warping_map`) each.

    `threshold` is what the prediction was cut at. A path that ends in .tif gets a page an image, pixel for pixel; any
    other a sheet on which marks are thickened.
    """
    if path.suffix.lower() in (".tif", ".tiff"):
        with replacing(path) as temporary, tifffile.TiffWriter(temporary) as file:
            for title, image, kinds in errors:
                file.write(_marked(image, kinds, 0), photometric="rgb", description=title, metadata=None)
        return
    columns = min(3, len(errors))
    rows = -(-len(errors) // columns)
    tallest = max(image.shape[0] / image.shape[1] for _, image, _ in errors)
    figure = Figure(figsize=(4.6 * columns, (4.6 * min(tallest, 2) + 0.4) * rows + 0.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    figure.suptitle(f"prediction above {threshold:.1f}; red: a cell is split, blue: cells are merged")
    for axis in axes:
        axis.set_axis_off()
    for axis, (title, image, kinds) in zip(axes, errors, strict=False):
        axis.imshow(_marked(image, kinds, max(image.shape) // 200), interpolation="nearest")
        axis.set_title(title, fontsize=9)
    _save(figure, path)


def _marked(image: NDArray[Any], kinds: NDArray[np.uint8], reach: int) -> NDArray[np.uint8]:
    picture = outlined(image, np.zeros(image.shape, np.int32), TRUTH, zoom=1)
    for kind, colour in (("split", SPLIT), ("merge", MERGED)):
        mark = kinds == ERROR_KINDS.index(kind)
        if reach:
            mark = ndimage.binary_dilation(mark, np.ones((3, 3)), iterations=reach)
        picture[mark] = colour
    return picture


def draw_curves(path: Path, logs: Mapping[str, Sequence[Mapping[str, float | None]]]) -> None:
    """Loss and validation scores of one or several runs, from the rows of their log.csv, by name."""
    scores = [
        (key, label)
        for key, label in (
            ("val_iou", "IoU of the cells' area"),
            ("val_cell_iou", "mean IoU of each cell"),
            ("val_pixel_error", "pixel error"),
        )
        if any(row.get(key) is not None for log in logs.values() for row in log)
    ]
    figure = Figure(figsize=(4.6 * (1 + len(scores)), 3.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, 1 + len(scores)))
    for number, (name, log) in enumerate(logs.items()):
        # a name is text, and no formula
        name = name.replace("$", r"\$").encode("utf-8", "replace").decode()
        colour = f"C{number}"
        _curve(axes[0], log, "loss", f"{name}: training", colour, "-")
        _curve(axes[0], log, "val_loss", f"{name}: validation", colour, "o--")
        for axis, (key, _) in zip(axes[1:], scores, strict=True):
            _curve(axis, log, key, name, colour, "o-")
            best = [row for row in log if row.get("best") and row.get(key) is not None]
            if best:
                last = best[-1]
                axis.plot([last["step"]], [last[key]], marker="*", markersize=13, color=colour)
    axes[0].set_title("loss")
    if any((row.get(key) or 0) > 0 for log in logs.values() for row in log for key in ("loss", "val_loss")):
        axes[0].set_yscale("log")
    for axis, (_, label) in zip(axes[1:], scores, strict=True):
        axis.set_title(f"{label} (validation)")
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    _save(figure, path)


@dataclass(frozen=True, slots=True)
class Curve:
    """One way of training or predicting: bytes counted for each tile, useful Mpixel a second expected of it (none where
    nothing was measured), and (tile, bytes, useful Mpixel a second) that were measured."""

    name: str
    tiles: Sequence[int]
    counted_bytes: Sequence[int]
    expected: Sequence[float]
    measured: Sequence[tuple[int, int, float]]


def draw_profile(path: Path, curves: Sequence[Curve], title: str) -> None:
    """Memory against tile, with the cards that people have; useful pixels a second against memory."""
    figure = Figure(figsize=(12.5, 5.2), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    figure.suptitle(title)
    for number, curve in enumerate(curves):
        colour, style = _COLOURS[number % len(_COLOURS)], "--" if curve.name.startswith("predict") else "-"
        memory.plot(curve.tiles, _gb(curve.counted_bytes), style, color=colour, linewidth=1.6, label=curve.name)
        if curve.measured:
            tiles, taken, speeds = zip(*curve.measured, strict=True)
            memory.plot(tiles, _gb(taken), "o", color=colour, markersize=4.5)
            speed.plot(_gb(taken), speeds, "o", color=colour, markersize=4.5)
        if curve.expected:
            speed.plot(_gb(curve.counted_bytes), curve.expected, style, color=colour, linewidth=1.6, label=curve.name)
    top = max(26.0, *(size / 1e9 for curve in curves for size in curve.counted_bytes[:1]))
    for card in _CARDS_GB:
        memory.axhline(card, color="0.6", linewidth=0.8, zorder=0)
        memory.annotate(
            f"{card} GB", (1, card), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
        if speed.lines:
            speed.axvline(card, color="0.6", linewidth=0.8, zorder=0)
            speed.annotate(
                f"{card}", (card, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8
            )
    least = min(min(curve.counted_bytes) for curve in curves) / 1e9
    sides = sorted({side for curve in curves for side in curve.tiles})
    memory.set(xlabel="side of the tile that goes in (pixels)", ylabel="memory (GB)")
    memory.set(xscale="log", yscale="log", ylim=(least / 1.5, top * 1.3))
    memory.set_xticks([side for side in (100, 200, 400, 800, 1600, 3200) if sides[0] / 1.1 < side < sides[-1] * 1.1])
    memory.xaxis.set_minor_formatter("")
    memory.set_title("how large may a tile be?  lines: counted, dots: measured", fontsize=10)
    memory.legend(fontsize=8, loc="lower right")
    if speed.lines:
        speed.set(xlabel="memory (GB)", ylabel="useful output Mpixel a second")
        speed.set(xscale="log", xlim=(least / 1.5, top * 1.3), ylim=(0, None))
        speed.set_title("what is it worth?  lines: at the rate of the largest measured", fontsize=10, pad=16)
    else:
        speed.set_axis_off()
        speed.annotate("nothing was measured", (0.5, 0.5), xycoords="axes fraction", ha="center")
    for axis in (memory, speed):
        axis.grid(alpha=0.25)
    for axis in (memory.xaxis, memory.yaxis, speed.xaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    _save(figure, path)


def _gb(sizes: Sequence[int]) -> list[float]:
    return [size / 1e9 for size in sizes]


def _curve(axis: Axes, log: Sequence[Mapping[str, float | None]], key: str, name: str, colour: str, style: str) -> None:
    points = [(row["step"], row[key]) for row in log if row.get(key) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), style, color=colour, label=name, markersize=3, linewidth=1.2)


def _panels(count: int, shape: tuple[int, ...], title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.6 * count, 4.6 * shape[0] / shape[1] + 0.7), layout="constrained")
    axes = figure.subplots(1, count)
    for axis in axes:
        axis.set_axis_off()
    if title:
        figure.suptitle(title)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)
