"""From disk to disk under the memory of a 6 GB card: is it exact, does it stay inside, and is the device kept busy?

predict: at least 0.9 of the pixels a second that the bare net gives on the same tiles, in float32 and in bfloat16,
because windows are read and results written meanwhile; no more reserved than the budget; where the first tile finds no
memory, the same labels by smaller ones.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch

from benchmarks.harness import measure
from benchmarks.sections import Context, Failed
from unet_fast import FastUNet, Normalisation
from unet_fast.greys import Greys
from unet_fast.inference import Answer, Inference, grouped
from unet_fast.measuring import CONTEXT_BYTES
from unet_fast.prediction import predict_files
from unet_fast.sources import ArraySource
from unet_fast.tiling import plan_tiles

TITLE = "Prediction, disk to disk"
ORDER = 88
SECONDS = 60.0

BUDGET = 6_000_000_000


def run(context: Context) -> dict[str, Any]:
    side = 700 if context.smoke else 4096
    pixels = np.random.default_rng(0).integers(0, 60000, (side, side)).astype(np.uint16)
    dtypes = (torch.float32,) if context.smoke else (torch.float32, torch.bfloat16)
    with tempfile.TemporaryDirectory() as place:
        tifffile.imwrite(Path(place) / "image.tif", pixels, tile=(256, 256), compression="zlib")
        rows = [_row(context, dtype, pixels, Path(place)) for dtype in dtypes]
    shares = ", ".join(f"{row['share of the bare net']:.2f}" for row in rows)
    result = {"headline": f"{shares} of the bare net's pixels a second", "rows": rows}
    wrong = [row for row in rows if not (row["seams"]["exact"] and row["labels by smaller tiles differ"] <= 1e-4)]
    over = [row for row in rows if (row["bytes"] or 0) > BUDGET]
    if wrong or over:
        raise Failed(f"{len(wrong)} rows with seams, {len(over)} above the budget", result)
    return result


def _row(context: Context, dtype: torch.dtype, pixels: np.ndarray[Any, Any], place: Path) -> dict[str, Any]:
    device = context.device
    torch.manual_seed(0)
    net = FastUNet(features=context.features).to(device, dtype).eval()
    net.normalisation = Normalisation("range", low=0, high=60000)
    # a CPU's library takes more than a card's
    memory = BUDGET
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    image, labels = place / "image.tif", place / "labels.tif"
    # the first call loads and tunes
    predict_files(net, image, labels, memory=memory)
    found = predict_files(net, image, labels, memory=memory, seams=True).files[0]
    taken = torch.cuda.max_memory_reserved(device) + CONTEXT_BYTES if device.type == "cuda" else None
    assert found.tile_in is not None
    assert found.seams is not None
    bare = _bare(context, net, pixels, found.tile_in, found.batch)
    differ = _by_smaller_tiles(net, pixels, labels, found.tile_in)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tile_in": found.tile_in[0],
        "tiles": found.tiles,
        "batch": found.batch,
        "mpixel_per_s": found.mpixel_per_s,
        "bare mpixel_per_s": bare,
        "share of the bare net": (found.mpixel_per_s or 0.0) / bare,
        "bytes": taken,
        "labels by smaller tiles differ": differ,
        "seams": {"exact": found.seams.exact, "difference": found.seams.largest_difference, "sd": found.seams.sd},
    }


def _bare(context: Context, net: FastUNet, pixels: np.ndarray[Any, Any], tile_in: tuple[int, int], batch: int) -> float:
    """Mpixel a second of the net alone, on a tile that lies on the device."""
    like = next(net.parameters())
    plan = plan_tiles(pixels.shape, tile_in=tile_in, model=net)
    window = torch.rand(batch, 1, *tile_in, device=like.device).to(like.dtype)
    with torch.no_grad():
        seconds = measure(lambda: net(window), like.device, **context.effort).median_s
    return pixels.size / 1e6 / (seconds * len(plan) / batch)


def _by_smaller_tiles(net: FastUNet, pixels: np.ndarray[Any, Any], labels: Path, tile_in: tuple[int, int]) -> float:
    """The share of labels that differ where the first tile found no memory and smaller ones went on."""
    out = np.zeros(pixels.shape, np.uint8)
    answer, source = Answer.of(net, "labels", None), ArraySource(pixels[None, None])
    told: list[str] = []
    refused = iter([True])

    class Short(torch.nn.Module):
        depth, in_channels, out_channels = net.depth, 1, 2

        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if next(refused, False):
                raise torch.OutOfMemoryError("CUDA out of memory (for the sake of the report)")
            return net(x)

    def take(group: Any, results: Any) -> None:
        for tile, result in zip(group, results, strict=True):
            out[tile.row : tile.row + tile.rows, tile.column : tile.column + tile.columns] = result

    plan = plan_tiles(pixels.shape, tile_in=tile_in, model=net)
    work = Inference(Short(), Greys(source, net.normalisation), answer, say=told.append)
    work.run(grouped(plan.tiles(), 1), plan.tile_in, take)
    assert len(told) == 1, told
    return float((out != tifffile.imread(labels)).mean())
