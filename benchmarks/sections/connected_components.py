"""Do on-the-fly instances cost anything? Our labelling against the same algorithm in plain PyTorch, and a copy.

predict: three passes over one byte and four a pixel, then a cumulative sum; below 0.1 ms for 572 x 572, bound by
launches; the plain PyTorch version needs some hundred launches and as many waits for the GPU.
"""

from typing import Any

import torch

import unet_kernels
from benchmarks.harness import measure, paired
from benchmarks.sections import Context, Skipped, affordable
from unet_kernels import reference

TITLE = "Connected components of a mask"
ORDER = 45
SECONDS = 15.0


def run(context: Context) -> dict[str, Any]:
    lane, why = unet_kernels.lane("connected_components", context.device)
    if lane != "native":
        raise Skipped(why)
    sides = [64] if context.smoke else [572, 2048]
    cases = [(side, share) for side in sides for share in (0.6, 0.9)]
    rows = [_row(context, *case) for case in affordable(context, cases)]
    return {"headline": f"our kernel is right on {len(rows)} masks", "lane": why, "masks": rows}


def _row(context: Context, side: int, share: float) -> dict[str, Any]:
    """Noise: near a share of 0.6 components are long, thin and branching, the worst case of a union-find."""
    generator = torch.Generator().manual_seed(side)
    mask = (torch.rand(1, side, side, generator=generator) < share).to(context.device)
    for connectivity in (4, 8):
        ours = unet_kernels.connected_components(mask, connectivity=connectivity)
        if not torch.equal(ours, reference.connected_components(mask, connectivity)):
            raise AssertionError(
                f"{side} x {side}, {share:.0%}, connectivity {connectivity}: differs from the reference"
            )

    # the reference waits for the device in every round: no graph can hold it
    plain = measure(lambda: reference.connected_components(mask), context.device, graph=False, **context.effort)
    found = paired(
        lambda: mask.clone(), lambda: unet_kernels.connected_components(mask), context.device, **context.effort
    )
    return {
        "side": side,
        "share of cell": share,
        "components": int(unet_kernels.connected_components(mask).max()),
        "plain torch_us": plain.median_us,
        "ours_us": found.b.median_us,
        "a copy_us": found.a.median_us,
        "how": found.b.how,
    }
