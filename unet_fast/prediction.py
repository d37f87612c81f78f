"""From image files to label files: `predict` for a folder, disk to disk."""

from pathlib import Path
from typing import Any

import numpy as np

from .cells import find_cells
from .data import check_finite
from .errors import BadInput
from .files import SUFFIXES, Stack, read_stack, writable_folder, write_picture, write_tiff
from .model import FastUNet
from .pairs import images_in
from .progress import Progress
from .tiling import plan_tiles, predict

__all__ = ["FILE_OUTPUTS", "predict_files"]

FILE_OUTPUTS = ("labels", "instances", "probabilities")


def predict_files(
    model: FastUNet,
    images: Path,
    out: Path,
    *,
    output: str = "labels",
    axes: str | None = None,
    tile_in: int | None = None,
    memory: str | None = None,
    threshold: float | None = None,
    min_pixels: int = 1,
    progress: bool = False,
) -> list[Path]:
    """Segment a file, or each image of a folder.

    Every image is read and checked before anything is written, and each result appears whole or not at all.

    Args:
        model: the net; its normalisation is applied.
        images: a file or a folder.
        out: for one image a file (.tif, .png), otherwise a folder, in which results have the images' names and .tif.
        output: "labels", the class of each pixel; "instances", cell ids (`unet_fast.cells.find_cells`);
            "probabilities", float32 [K, H, W] or [Z, K, H, W].
        axes: of the image files, where they do not say.
        tile_in, memory: side of a tile, or a budget for it; see `unet_fast.plan_tiles`.
        threshold: probability above which a pixel is a cell, for labels and instances of two classes.
        min_pixels: smaller cells are dropped; for instances only.
        progress: show progress on stderr.

    Returns:
        the files written, in the images' order.

    Raises:
        BadInput: an image cannot be read, has other channels than the model, NaN pixels; a tile that does not fit; a
            place that cannot be written, or is the images' own.
    """
    if output not in FILE_OUTPUTS:
        raise BadInput(f"output must be one of {', '.join(FILE_OUTPUTS)}, got {output!r}")
    if threshold is not None and not (0 <= threshold <= 1 and output != "probabilities" and model.out_channels == 2):
        raise BadInput(f"threshold must lie between 0 and 1, for cells of two classes, got {threshold:g} for {output}")
    sources = images_in(images)
    targets = _targets(images, sources, out, output)
    slices = 0
    for source, target in zip(sources, targets, strict=True):
        stack = _readable(source, model, axes)
        if stack.is_stack and target.suffix.lower() == ".png":
            raise BadInput(f"{target} cannot hold a stack; use .tif")
        plan_tiles(stack.pixels.shape, tile_in=tile_in, memory=memory, model=model)
        slices += len(stack.pixels)
    for folder in {target.parent for target in targets}:
        writable_folder(folder)
    cut = {"tile_in": tile_in, "memory": memory}
    with Progress("predict", slices, shown=progress) as bar:
        for source, target in zip(sources, targets, strict=True):
            stack = read_stack(source, axes=axes)
            _write(target, _segment(model, stack, output, cut, threshold, min_pixels, bar), stack.is_stack)
    return targets


def _targets(images: Path, sources: list[Path], out: Path, output: str) -> list[Path]:
    if images.is_file() and out.suffix.lower() in SUFFIXES:
        if out.suffix.lower() not in (".tif", ".tiff", ".png"):
            raise BadInput(f"{out} must end in .tif or .png: {out.suffix} changes the values it stores")
        if out.suffix.lower() == ".png" and output == "probabilities":
            raise BadInput(f"{out} cannot hold probabilities; use .tif")
        targets = [out]
    else:
        if out.suffix.lower() in SUFFIXES:
            raise BadInput(f"{out} must be a folder, for the {len(sources)} images of {images}")
        if out.exists() and any(out.samefile(source.parent) for source in sources):
            raise BadInput(f"{out} is the folder of the images; choose another place for the results")
        targets = [out / f"{source.stem}.tif" for source in sources]
    by_target: dict[Path, Path] = {}
    for source, target in zip(sources, targets, strict=True):
        if target.is_dir():
            raise BadInput(f"{target} must be a file, a folder is in its place")
        if target in by_target:
            raise BadInput(f"{by_target[target].name} and {source.name} would both be written to {target}")
        if target.exists() and any(target.samefile(s) for s in sources):
            raise BadInput(f"{target} is one of the images; choose another place for the results")
        by_target[target] = source
    return targets


def _readable(source: Path, model: FastUNet, axes: str | None) -> Stack:
    stack = read_stack(source, axes=axes)
    check_finite(stack)
    channels = stack.pixels.shape[1]
    if channels != model.in_channels:
        raise BadInput(f"{source} has {channels} channel(s), the model was trained on {model.in_channels}")
    return stack


def _segment(
    model: FastUNet,
    stack: Stack,
    output: str,
    cut: dict[str, Any],
    threshold: float | None,
    min_pixels: int,
    bar: Progress,
) -> np.ndarray[Any, Any]:
    wanted, slices = "probabilities" if output == "probabilities" else "labels", []
    for name, plane in zip(stack.names, stack.pixels, strict=True):
        slices.append(predict(model, plane, axes="CYX", output=wanted, threshold=threshold, **cut))
        bar.advance(name)
    result: np.ndarray[Any, Any] = np.stack(slices)
    if output == "instances":
        cells = find_cells(result, min_pixels=min_pixels)
        result = cells.astype(np.uint16 if cells.max() < 2**16 else np.uint32)
    return result


def _write(target: Path, result: np.ndarray[Any, Any], is_stack: bool) -> None:
    if target.suffix.lower() == ".png":
        write_picture(target, result[0])
    else:
        axes = "ZCYX" if result.ndim == 4 else "ZYX"
        write_tiff(target, result if is_stack else result[0], axes if is_stack else axes[1:])
