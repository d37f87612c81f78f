"""Distances to the two nearest cells, the gap between touching cells, and the weight map that they make (Eq. 2).

    w[n, y, x] = w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2))

instances [N, H, W]: cell ids, 0 = background, negative = ignore. d1, d2: exact Euclidean distances in pixels, centre
to centre, to the nearest and second-nearest distinct cell of the uncut map. Integers until the last square root.
No gradient: labels have none. Derivation and proof: docs/mathematics.md, section 5.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks, _native, reference

__all__ = ["border_weight", "cut_gap", "two_nearest_cells"]

REGIONS = ("background", "all")


def launch_two_nearest_cells_cpu(instances: Tensor, max_radius: float | None) -> tuple[Tensor, Tensor]:
    """The C++ kernel: instances [N, H, W] int32 on a CPU."""
    instances = instances.contiguous()
    d1 = torch.empty(instances.shape, dtype=torch.float32)
    d2 = torch.empty_like(d1)
    reach = math.inf if max_radius is None else max_radius
    status = _native.native().unet_two_nearest_cells_cpu(
        instances.data_ptr(), *instances.shape, reach, d1.data_ptr(), d2.data_ptr()
    )
    if status:
        raise MemoryError(f"two_nearest_cells needs 24 bytes a pixel of {list(instances.shape[1:])}")
    return d1, d2


def _two_nearest(instances: Tensor, max_radius: float | None) -> tuple[Tensor, Tensor]:
    if _native.why_not(instances.device):
        d1, d2 = reference.two_nearest_cells(instances, max_radius)
        return d1.contiguous(), d2.contiguous()
    return launch_two_nearest_cells_cpu(instances, max_radius)


@torch.library.custom_op("unet::two_nearest_cells", mutates_args=())
def _two_nearest_op(instances: Tensor, max_radius: float | None) -> tuple[Tensor, Tensor]:
    return _two_nearest(instances, max_radius)


@_two_nearest_op.register_fake
def _(instances: Tensor, max_radius: float | None) -> tuple[Tensor, Tensor]:
    d1 = torch.empty(instances.shape, dtype=torch.float32, device=instances.device)
    return d1, torch.empty_like(d1)


@torch.library.custom_op("unet::cut_gap", mutates_args=())
def _cut_gap_op(instances: Tensor) -> Tensor:
    return reference.cut_gap(instances).contiguous()


@_cut_gap_op.register_fake
def _(instances: Tensor) -> Tensor:
    return torch.empty(instances.shape, dtype=instances.dtype, device=instances.device)


@torch.library.custom_op("unet::border_weight", mutates_args=())
def _border_weight_op(
    instances: Tensor, w0: float, sigma_px: float, class_weight: Sequence[float] | None, region: str, gap: bool
) -> Tensor:
    return reference.border_weight(
        instances, w0, sigma_px, class_weight, region, gap, nearest=_two_nearest
    ).contiguous()


@_border_weight_op.register_fake
def _(
    instances: Tensor, w0: float, sigma_px: float, class_weight: Sequence[float] | None, region: str, gap: bool
) -> Tensor:
    return torch.empty(instances.shape, dtype=torch.float32, device=instances.device)


def two_nearest_cells(instances: Tensor, *, max_radius: float | None = None) -> tuple[Tensor, Tensor]:
    """Distances to the nearest and the second-nearest distinct cell.

    Args:
        instances: [N, H, W], any integer dtype: cell ids (connected or not), 0 = background, negative = ignore.
        max_radius: pixels; a cell further away counts as absent. None searches the whole image.

    Returns:
        (d1, d2), float32 [N, H, W]: exact Euclidean distances in pixels, centre to centre. d1 is 0 inside a cell;
        a missing cell is `inf`.

    Raises:
        TypeError: instances is no integer tensor, or max_radius no number.
        ValueError: instances is not 3-D, an id does not fit 32 bits, or max_radius is negative.

    >>> d1, d2 = two_nearest_cells(torch.tensor([[[1, 0, 0, 7]]]))
    >>> d1.tolist(), d2.tolist()
    ([[[0.0, 1.0, 1.0, 0.0]]], [[[3.0, 2.0, 2.0, 3.0]]])
    """
    if max_radius is not None:
        max_radius = _checks.expect_number("max_radius", max_radius, low=0)
    d1, d2 = _two_nearest_op(_ids(instances), max_radius)
    return d1, d2


def cut_gap(instances: Tensor) -> Tensor:
    """instances with a background gap between cells that touch.

    A cell pixel with a 4-neighbour of another cell becomes 0, on both sides alike: the gap is two pixels wide, and
    the result of a mirrored map is the mirrored result. This is the separation border that the paper introduces; the
    loss's target is `cut_gap(instances) > 0`.

    Args:
        instances: [N, H, W], any integer dtype: cell ids, 0 = background, negative = ignore (kept, and no cell).

    Returns:
        [N, H, W], dtype of instances.

    Raises:
        TypeError: instances is no integer tensor.
        ValueError: instances is not 3-D, or an id does not fit 32 bits.

    >>> cut_gap(torch.tensor([[[1, 1, 2, 2, 0, 3]]])).tolist()
    [[[1, 0, 0, 2, 0, 3]]]
    """
    return _cut_gap_op(_ids(instances)).to(instances.dtype)


def border_weight(
    instances: Tensor,
    *,
    w0: float = 10.0,
    sigma_px: float = 5.0,
    class_weight: Sequence[float] | None = None,
    region: str = "background",
    gap: bool = True,
) -> Tensor:
    """The weight map of Eq. 2 of Ronneberger et al. 2015: w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2)).

    Args:
        instances: [N, H, W], any integer dtype: cell ids, 0 = background, negative = ignore.
        w0: height of the border term.
        sigma_px: its width in pixels.
        class_weight: (background, cell), the w_c of Eq. 2, applied everywhere; None is 1 for both.
        region: where the border term applies: "background" (the paper's purpose, and Freiburg's own code) or "all"
            (Eq. 2 to the letter).
        gap: background means that of `cut_gap(instances)`; d1 and d2 are those of the uncut cells all the same.

    Returns:
        float32 [N, H, W]. A pixel without a second cell has no border term; ignored pixels weigh 0.

    Raises:
        TypeError: instances is no integer tensor, or a setting no number.
        ValueError: instances is not 3-D, an id does not fit 32 bits, or a setting is out of range.

    >>> border_weight(torch.tensor([[[1, 0, 2]]]))[0, 0].tolist()  # 1 + 10 exp(-(1 + 1)^2 / 50) in the middle
    [1.0, 10.231163024902344, 1.0]
    """
    w0 = _checks.expect_number("w0", w0, low=0)
    sigma_px = _checks.expect_number("sigma_px", sigma_px, low=0, strictly=True)
    _checks.expect_choice("region", region, REGIONS)
    balance = None
    if class_weight is not None:
        if not isinstance(class_weight, Sequence) or isinstance(class_weight, str) or len(class_weight) != 2:
            raise ValueError(f"class_weight must be a pair (background, cell), got {class_weight!r}")
        parts = zip(("background", "cell"), class_weight, strict=True)
        balance = [_checks.expect_number(f"class_weight of {part}", c, low=0) for part, c in parts]
    return _border_weight_op(_ids(instances), w0, sigma_px, balance, region, bool(gap))


@torch.library.custom_op("unet::instance_ids", mutates_args=())
def _ids_op(instances: Tensor) -> Tensor:
    # a captured graph cannot wait for an answer; what it replays was checked when it was warmed up
    capturing = instances.is_cuda and torch.cuda.is_current_stream_capturing()
    if instances.numel() and not capturing:
        limits = torch.iinfo(torch.int32)
        low, high = (int(extreme) for extreme in instances.long().aminmax())
        if instances.dtype == torch.uint64 and low < 0:
            # beyond int64: torch has no larger integers to look with
            high = int(instances.cpu().numpy().max())
        if low < limits.min or high > limits.max:
            wrong = high if high > limits.max else low
            raise ValueError(f"instances must hold ids that fit 32 bits, got {wrong}; renumber them from 1")
    return instances.to(torch.int32, copy=True)


@_ids_op.register_fake
def _(instances: Tensor) -> Tensor:
    return instances.to(torch.int32, copy=True)


def _ids(instances: Tensor) -> Tensor:
    """instances as int32, checked."""
    _checks.expect_integer("instances", instances, "N, H, W")
    narrow = instances.dtype in (torch.int32, torch.int16, torch.uint16, torch.int8, torch.uint8)
    # what always fits needs no look at the values
    return instances.to(torch.int32) if narrow else _ids_op(instances)
