"""How a prediction's segments overlap the truth's cells, as the sums behind Rand and information scores.

Of the ISBI 2012 challenge; no gradient, on a CPU. Specification, with sources: unet_kernels/reference/topology.py;
docs/mathematics.md, section 7.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import _checks, _native, reference
from .reference import topology

__all__ = ["rand_sums", "watershed_cells"]


def launch_cpu(prediction: Tensor, truth: Tensor, thresholds: Tensor, thinned: bool) -> tuple[Tensor, Tensor]:
    """The C++ kernel: float32 and int32 [D, H, W], float64 [T], contiguous."""
    squares = torch.empty(len(thresholds), len(prediction), 4, dtype=torch.int64, device="cpu")
    logs = torch.empty(len(thresholds), len(prediction), 3, dtype=torch.float64, device="cpu")
    status = _native.native().unet_rand_sums_cpu(
        prediction.data_ptr(),
        truth.data_ptr(),
        *prediction.shape,
        thresholds.data_ptr(),
        len(thresholds),
        thinned,
        squares.data_ptr(),
        logs.data_ptr(),
    )
    if status:
        raise MemoryError(f"rand_sums needs about 30 bytes a pixel of {list(prediction.shape[1:])} and thread")
    return squares, logs


def specified(prediction: Tensor, truth: Tensor, thresholds: Tensor, thinned: bool) -> tuple[Tensor, Tensor]:
    """The same by the specification."""
    # numpy would round a threshold to the image's float32, and 0.9999999999999999 is not 1
    squares = torch.empty(len(thresholds), len(prediction), 4, dtype=torch.int64, device="cpu")
    logs = torch.empty(len(thresholds), len(prediction), 3, dtype=torch.float64, device="cpu")
    for i, threshold in enumerate(thresholds.tolist()):
        for z, (p, t) in enumerate(zip(prediction.double().numpy(), truth.numpy(), strict=True)):
            cells = (p > threshold) & (t >= 0)
            if thinned:
                segments = topology.watershed_cells(cells)
            else:
                segments = reference.connected_components(torch.from_numpy(cells)[None])[0].numpy()
            sums = topology.rand_sums(t, segments)
            squares[i, z], logs[i, z] = (
                torch.tensor(sums[0], device="cpu"),
                torch.tensor(sums[1], dtype=torch.float64, device="cpu"),
            )
    return squares, logs


def rand_sums(
    prediction: Tensor, truth: Tensor, thresholds: Sequence[float], *, thinned: bool = False
) -> tuple[Tensor, Tensor]:
    """Sums over the pixels of true cells, at each threshold and in each slice.

    With n_ij the pixels of cell i in segment j, t_i and s_j their sums over j and i; each pixel of a cell that lies in
    no segment is a segment by itself.

    Args:
        prediction: [D, H, W] floating, on a CPU; rounded to float32, and that compared in float64, strictly.
        truth: [D, H, W] integer cell ids, 0 = background, negative = ignore (and background of the prediction).
        thresholds: T numbers.
        thinned: segments are `watershed_cells(prediction > threshold)` instead of its 4-connected components.

    Returns:
        (squares, logs): int64 [T, D, 4], of n, t_i^2, s_j^2, n_ij^2; float64 [T, D, 3], of t_i log t_i, s_j log s_j,
        n_ij log n_ij.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes differ, or an id does not fit 32 bits.

    >>> squares, _ = rand_sums(torch.ones(1, 1, 5), torch.tensor([[[1, 1, 0, 2, 2]]]), [0.5])
    >>> squares.tolist()  # 4 pixels; two cells of 2, one segment that holds all 4
    [[[4, 8, 16, 8]]]
    """
    _checks.expect_float("prediction", prediction, "D, H, W")
    _checks.expect_on_cpu("prediction", prediction)
    _checks.expect_integer("truth", truth, "D, H, W")
    _checks.expect_mask("truth", truth)
    _checks.expect_size("truth", truth, prediction.shape, "like prediction")
    _checks.expect_device("truth", truth, "prediction", prediction)
    levels = torch.tensor([float(t) for t in thresholds], dtype=torch.float64, device="cpu")
    work = specified if _native.missing("rand_sums") else launch_cpu
    return work(prediction.detach().float().contiguous(), _ids(truth).contiguous(), levels, thinned)


def _ids(truth: Tensor) -> Tensor:
    """truth as int32, checked; what is ignored is -1."""
    wide = truth.long()
    # what lies beyond int64 has become negative
    beyond = truth.dtype == torch.uint64 and bool((wide < 0).any())
    if beyond or (wide.numel() and int(wide.max()) > torch.iinfo(torch.int32).max):
        raise ValueError(f"truth must hold ids that fit 32 bits, got {truth.numpy().max()}; renumber them from 1")
    return wide.clamp(min=-1).to(torch.int32)


def watershed_cells(mask: Tensor) -> Tensor:
    """The 4-connected components of each slice, grown over the rest until they meet at dams one pixel wide.

    Args:
        mask: [D, H, W] boolean or integer, above 0 is cell; on a CPU.

    Returns:
        int32 [D, H, W]: ids from 1, 0 = dam. A slice without a cell is one basin, 1.

    Raises:
        TypeError: mask is neither boolean nor integer.
        ValueError: mask is not 3-D.

    >>> watershed_cells(torch.tensor([[[1, 0, 0, 0, 1]]])).tolist()
    [[[1, 1, 0, 2, 2]]]
    """
    _checks.expect_mask("mask", mask)
    _checks.expect_on_cpu("mask", mask)
    cells = _checks.above_zero(mask).contiguous()
    if _native.missing("watershed_cells"):
        basins = [topology.watershed_cells(slice_) for slice_ in cells.numpy()]
        return (
            torch.from_numpy(np.stack(basins)) if basins else torch.empty(mask.shape, dtype=torch.int32, device="cpu")
        )
    ids = torch.empty(mask.shape, dtype=torch.int32, device="cpu")
    cells = cells.to(torch.uint8)
    status = _native.native().unet_watershed_cells_cpu(cells.data_ptr(), *mask.shape, ids.data_ptr())
    if status:
        raise MemoryError(f"watershed_cells needs about 20 bytes a pixel of {list(mask.shape[1:])} and thread")
    return ids
