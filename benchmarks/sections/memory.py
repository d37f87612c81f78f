"""Does a training step take the memory that `unet_fast.memory` counts?

predict: within 3 % on a GPU, where what cuDNN takes for itself comes on top. A CPU's operations take other paths, and
a smoke run's maps are no larger than their copies: there the figures prove the script only.
"""

from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.harness import peak_bytes
from benchmarks.sections import Context, affordable, short
from unet_fast import FastUNet, geometry
from unet_fast.memory import estimate

TITLE = "Memory: counted and taken"
ORDER = 85
SECONDS = 45.0


def run(context: Context) -> dict[str, Any]:
    tiles = [188] if context.smoke else [188, 572, 1084]
    cases = [(tile, dtype, how) for tile in tiles for dtype in context.dtypes for how in ("none", "level")]
    rows = [_row(context, *case) for case in affordable(context, cases)]
    shares = [row["taken/counted"] for row in rows] or [0.0]
    return {"headline": f"steps take {min(shares):.2f} to {max(shares):.2f} of what was counted", "steps": rows}


def _row(context: Context, tile_in: int, dtype: torch.dtype, recompute: str) -> dict[str, Any]:
    net = FastUNet(features=context.features, recompute=recompute).to(context.device, dtype)
    tile_out = geometry.output_size(tile_in, net.depth)
    x = torch.randn(1, 1, tile_in, tile_in, device=context.device).to(dtype)
    target = torch.zeros(1, tile_out, tile_out, dtype=torch.long, device=context.device)

    def step() -> None:
        F.cross_entropy(net(x).float(), target).backward()
        net.zero_grad(set_to_none=True)

    found = estimate(net, tile_in, dtype=dtype)
    counted = found.dynamic - found.input
    taken = peak_bytes(step, context.device).allocated_bytes
    return {
        "tile_in": tile_in,
        "dtype": short(dtype),
        "recompute": recompute,
        "counted_bytes": counted,
        "taken_bytes": taken,
        "taken/counted": taken / counted,
        "peak at": found.peak_at,
    }
