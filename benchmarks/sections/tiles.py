"""What is a larger tile worth on this device, and which way of training would be chosen for a 6 GB card?

The rows of `unet-fast profile`: bytes counted and taken, time, useful Mpixel a second, share of the roof. predict:
useful pixels a second grow with the tile as (tile_out / tile_in)^2, so 1404 gives 1.7 times what 572 gives; bfloat16
twice to three times what float32 (tf32) gives; recomputation costs a quarter. Speeds are this device's, not those of a
6 GB card.
"""

from dataclasses import asdict
from typing import Any

from benchmarks.sections import Context
from unet_fast import FastUNet
from unet_fast.profiling import Way, profile

TITLE = "Tiles: what a larger one is worth"
ORDER = 87
SECONDS = 75.0

WAYS = (
    Way("train"),
    Way("train", "bfloat16"),
    Way("train", "bfloat16", "level"),
    Way("predict"),
    Way("predict", "bfloat16"),
)


def run(context: Context) -> dict[str, Any]:
    tiles = [188, 204] if context.smoke else [188, 380, 572, 828, 1084, 1404, 1980, 2588]
    ways = WAYS[:2] if context.smoke else WAYS
    seconds = min(4.0 if context.smoke else 45.0, context.left_s - 5.0)
    net = FastUNet(features=context.features)
    found = profile(net, ways=ways, tiles=tiles, device=context.device, seconds=max(1.0, seconds))
    rows = [{"way": str(row.way), **{k: v for k, v in asdict(row).items() if k != "way"}} for row in found.rows]
    measured = [row for row in found.rows if row.useful_mpixel_per_s is not None]
    best = max(measured, key=lambda row: row.useful_mpixel_per_s or 0.0, default=None)
    said = "nothing could be measured"
    if best is not None:
        said = f"most useful pixels: {best.useful_mpixel_per_s:.3g} Mpixel/s, {best.way}, tile {best.tile_in}"
    return {"headline": said, "roof_tflops": found.roof_tflops, "rows": rows}
