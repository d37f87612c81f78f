"""Is crop_concat faster than torch.cat of a cropped view, and how near is it to a plain copy, level by level?

Cold: the cache is overwritten before every call, as the decoder finds a skip that was written long ago.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

import unet_kernels
from benchmarks.harness import channels_last, expect_same, paired, poison
from benchmarks.levels import Concat, concats
from benchmarks.sections import Context, affordable, short

TITLE = "crop_concat against torch.cat of a view"
ORDER = 30
SECONDS = 30.0


def run(context: Context) -> dict[str, Any]:
    levels = concats(context.tile_in, context.features)
    cases = list(itertools.product(context.dtypes, levels))
    rows = [_row(context, *case) for case in affordable(context, cases)]
    totals = ", ".join(
        f"{short(dtype)} {sum(row['ours_us'] for row in rows if row['dtype'] == short(dtype)):.0f} us against "
        f"{sum(row['cat_us'] for row in rows if row['dtype'] == short(dtype)):.0f}"
        for dtype in context.dtypes
    )
    return {"headline": f"all levels: {totals}", "cases": f"{len(rows)} of {len(cases)}", "levels": rows}


def _row(context: Context, dtype: torch.dtype, level: Concat) -> dict[str, Any]:
    device, moved_bytes = context.device, level.min_bytes(dtype.itemsize)
    up = channels_last(torch.randn(1, level.c_up, level.size, level.size, device=device).to(dtype))
    skip = channels_last(torch.randn(1, level.c_skip, level.skip_size, level.skip_size, device=device).to(dtype))
    poison(moved_bytes // 2, device)
    expect_same(unet_kernels.crop_concat(up, skip), _cat(up, skip), f"{level.name} {dtype}")
    found = paired(
        lambda: _cat(up, skip), lambda: unet_kernels.crop_concat(up, skip), device, cold=True, **context.effort
    )
    gbps = moved_bytes / found.b.median_s / 1e9
    return {
        "level": level.name,
        "dtype": short(dtype),
        "channels": level.c_up + level.c_skip,
        "size_px": level.size,
        "cat_us": found.a.median_us,
        "ours_us": found.b.median_us,
        "cat/ours": found.ratio,
        "spread": f"{found.ratio_min:.2f}..{found.ratio_max:.2f}",
        "ours_gbps": gbps,
        "share of copy": gbps / context.roof.copy_gbps(),
        "how": found.b.how,
    }


def _cat(up: Tensor, skip: Tensor) -> Tensor:
    rows, columns = up.shape[2:]
    top, left = (skip.shape[2] - rows) // 2, (skip.shape[3] - columns) // 2
    return torch.cat([up, skip[:, :, top : top + rows, left : left + columns]], 1)
