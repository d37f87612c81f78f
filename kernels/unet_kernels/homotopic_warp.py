"""The truth warped towards a prediction without a change of topology, and what is wrong where it cannot follow.

The measure of the ISBI 2012 challenge; no gradient, on a CPU. Specification, with sources:
unet_kernels/reference/topology.py; docs/mathematics.md, section 7.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import _checks, _native
from .reference import topology

__all__ = ["ERROR_KINDS", "homotopic_warp"]

ERROR_KINDS = topology.KINDS


def launch_cpu(
    prediction: Tensor, truth: Tensor, counted: Tensor, thresholds: Tensor, radius: int, kinds: Tensor | None
) -> Tensor:
    """The C++ kernel: float32, uint8 and uint8 [D, H, W], float64 [T], contiguous; fills kinds, returns the counts."""
    counts = torch.empty(len(thresholds), len(prediction), len(ERROR_KINDS), dtype=torch.int64, device="cpu")
    status = _native.native().unet_homotopic_warp_cpu(
        prediction.data_ptr(),
        truth.data_ptr(),
        counted.data_ptr(),
        *prediction.shape,
        thresholds.data_ptr(),
        len(thresholds),
        radius,
        counts.data_ptr(),
        None if kinds is None else kinds.data_ptr(),
    )
    if status:
        raise MemoryError(f"homotopic_warp needs about 30 bytes a pixel of {list(prediction.shape[1:])} and thread")
    return counts


def specified(
    prediction: Tensor, truth: Tensor, counted: Tensor, thresholds: Tensor, radius: int, kinds: Tensor | None
) -> Tensor:
    """The same by the specification."""
    # numpy would round a threshold to the image's float32, and 0.9999999999999999 is not 1
    counts = torch.empty(len(thresholds), len(prediction), len(ERROR_KINDS), dtype=torch.int64, device="cpu")
    for i, threshold in enumerate(thresholds.tolist()):
        for z, (p, t, c) in enumerate(zip(prediction.double().numpy(), truth.numpy(), counted.numpy(), strict=True)):
            warped = topology.homotopic_warp(p, t > 0, threshold, c > 0)
            found = topology.mismatch_kinds(warped, p > threshold, c > 0, radius)
            counts[i, z] = torch.from_numpy(np.bincount(found.ravel(), minlength=len(ERROR_KINDS)))
            counts[i, z, 0] = 0
            if kinds is not None:
                kinds[i, z] = torch.from_numpy(found)
    return counts


def homotopic_warp(
    prediction: Tensor,
    truth: Tensor,
    thresholds: Sequence[float],
    *,
    counted: Tensor | None = None,
    radius: int = 20,
    kinds: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Warp truth towards prediction > threshold by flips of simple points; count what remains, by kind.

    Args:
        prediction: [D, H, W] floating, on a CPU; rounded to float32, and that compared in float64, strictly.
        truth: [D, H, W] boolean or integer: above 0 is cell.
        thresholds: T numbers.
        counted: [D, H, W] boolean: only these pixels are flipped, and only these can be mismatches; None is all.
        radius: pixels to each side of a cell pixel in which it is looked whether its removal parts the cell.
        kinds: return what is wrong where, too.

    Returns:
        (counts, kinds): int64 [T, D, 7] of `ERROR_KINDS`, whose 0 (none) is 0; and None, or uint8 [T, D, H, W] with
        the kind of each pixel, 0 where nothing is wrong.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes differ, or an argument is out of range.

    >>> cells = torch.tensor([[[1, 1, 0, 1, 1]] * 3])
    >>> counts, _ = homotopic_warp(torch.ones(1, 3, 5), cells, [0.5])  # a gap that is closed is a merge
    >>> dict(zip(ERROR_KINDS, counts[0, 0].tolist()))["merge"]
    3
    """
    _checks.expect_float("prediction", prediction, "D, H, W")
    _checks.expect_on_cpu("prediction", prediction)
    _checks.expect_mask("truth", truth)
    if counted is not None:
        _checks.expect_tensor("counted", counted, "D, H, W", (torch.bool,), "boolean")
    for name, other in (("truth", truth), ("counted", counted)):
        if other is not None:
            _checks.expect_size(name, other, prediction.shape, "like prediction")
            _checks.expect_device(name, other, "prediction", prediction)
    radius = _checks.expect_whole("radius", radius)
    if radius < 1:
        raise ValueError(f"radius must be at least 1, got {radius}")
    if counted is None:
        counted = torch.ones(prediction.shape, dtype=torch.bool, device="cpu")
    levels = torch.tensor([float(t) for t in thresholds], dtype=torch.float64, device="cpu")
    shape = (len(levels), *prediction.shape)
    found = torch.zeros(shape, dtype=torch.uint8, device="cpu") if kinds else None
    cell = _checks.above_zero(truth).to(torch.uint8).contiguous()
    image, where = prediction.detach().float().contiguous(), counted.to(torch.uint8).contiguous()
    work = specified if _native.missing("homotopic_warp") else launch_cpu
    return work(image, cell, where, levels, radius, found), found
