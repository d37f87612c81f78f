"""What does the weight map of Eq. 2 cost on the device, from ids to weights, and how does it grow?

predict: bound by launches (some 20 us) for a tile of 572 with many cells; 1 ms for 2048 x 2048 with a thousand cells;
few large cells cost most, because a pixel looks as far as its second-nearest cell, and no further than Eq. 2 reaches.
"""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

import unet_kernels
from benchmarks.harness import measure, paired
from benchmarks.sections import Context, affordable
from unet_kernels import reference

TITLE = "The border weight on the fly"
ORDER = 42
SECONDS = 20.0


def run(context: Context) -> dict[str, Any]:
    if context.smoke:
        cases = [(64, 3), (64, 20)]
    elif context.device.type == "cpu":
        cases = [(512, 20), (512, 200), (512, 2000)]
    else:
        cases = [(572, 2), (572, 20), (572, 200), (572, 2000), (2048, 1000), (8192, 10_000)]
    rows = [_row(context, *case) for case in affordable(context, cases)]
    headline = ", ".join(f"{row['side']} with {row['cells']}: {row['weight_us']:.0f} us" for row in rows)
    return {"headline": headline, "lane": unet_kernels.lane("border_weight", context.device), "maps": rows}


def _row(context: Context, side: int, cells: int) -> dict[str, Any]:
    ids = instances(side, cells).to(context.device)
    if side <= 1024:
        want = reference.border_weight(ids.cpu())
        torch.testing.assert_close(unet_kernels.border_weight(ids).cpu(), want, rtol=2e-6, atol=2e-6)
        for ours, theirs in zip(
            unet_kernels.two_nearest_cells(ids), reference.two_nearest_cells(ids.cpu()), strict=True
        ):
            if not torch.equal(ours.cpu(), theirs):
                raise AssertionError(f"{side} x {side}, {cells} cells: distances differ from the reference")
    if not torch.equal(unet_kernels.border_weight(ids), unet_kernels.border_weight(ids)):
        raise AssertionError(f"{side} x {side}, {cells} cells: the weights differ from call to call")
    found = paired(lambda: ids.clone(), lambda: unet_kernels.border_weight(ids), context.device, **context.effort)
    whole = measure(lambda: unet_kernels.two_nearest_cells(ids), context.device, **context.effort)
    return {
        "side": side,
        "cells": cells,
        "weight_us": found.b.median_us,
        "distances_us": whole.median_us,
        "a copy_us": found.a.median_us,
        "weight_ns_per_pixel": 1e3 * found.b.median_us / side**2,
        "how": found.b.how,
    }


@functools.cache
def instances(side: int, cells: int) -> Tensor:
    """Discs that overlap a little, drawn one over the other: [1, side, side] int32."""
    rng = np.random.default_rng(0)
    radius = 0.45 * side / np.sqrt(max(1, cells))
    ids, reach = np.zeros((side, side), np.int32), int(radius) + 1
    for cell, (row, column) in enumerate(rng.uniform(0, side, (cells, 2)), 1):
        top, left = max(0, int(row) - reach), max(0, int(column) - reach)
        part = ids[top : int(row) + reach + 1, left : int(column) + reach + 1]
        y, x = np.ogrid[top : top + part.shape[0], left : left + part.shape[1]]
        part[(y - row) ** 2 + (x - column) ** 2 < radius**2] = cell
    return torch.from_numpy(ids)[None]
